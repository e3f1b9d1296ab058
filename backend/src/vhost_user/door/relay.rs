//! One connection at the door: its messages in, its replies out, and its end.
//!
//! At most one message each way is kept, and the next one is not read before it is passed on. Nor
//! is it while the crate owes a reply: so a refusal's reply is in its place, and a frontend that
//! reads nothing costs one message. The door never blocks but in [`poll`], where it waits for
//! everything that can happen to the connection.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vhost::vhost_user::message::FrontendReq;

use crate::vhost_user::door::checks::{Checks, Refused};
use crate::vhost_user::door::closing::PeerFds;
use crate::vhost_user::door::message::{Header, Message};
use crate::vhost_user::door::stream::{Incoming, Outgoing, Received};
use crate::vhost_user::door::{Limits, Refusal};

/// Wakes the door, from any thread or signal handler: something happened to the session.
#[derive(Debug)]
pub(in crate::vhost_user) struct Bell(OwnedFd);

impl Bell {
    /// # Errors
    ///
    /// Those of eventfd(2).
    pub(in crate::vhost_user) fn new() -> io::Result<Self> {
        Ok(Bell(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Another descriptor of it, for a signal handler to write.
    ///
    /// # Errors
    ///
    /// Those of dup(2).
    pub(in crate::vhost_user) fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.try_clone()
    }

    /// Has the door see what happened.
    pub(in crate::vhost_user) fn ring(&self) {
        // Fails only where the counter is full, and then the door wakes as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// A session as its door sees it.
pub(in crate::vhost_user) trait Guarded: Send + Sync {
    fn bell(&self) -> &Bell;

    /// What happened that the connection cannot outlive. Asked when the bell was rung.
    fn fault(&self) -> Option<Refusal>;

    /// Nobody waits for an acknowledgement any more: what holds one back lets go.
    fn release_held(&self);
}

/// Why a connection ended.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::vhost_user) enum End {
    /// The frontend has sent all it wants to, and every message was passed on.
    Frontend,
    /// The crate has ended it, and knows why.
    Backend,
    /// The door has.
    Refused(Refusal),
}

/// See the module.
pub(in crate::vhost_user) struct Door<'a> {
    outer: &'a UnixStream,
    inner: &'a UnixStream,
    session: &'a dyn Guarded,
    limits: Limits,
    checks: Checks,
    requests: Incoming,
    replies: Incoming,
    to_inner: Outgoing,
    to_outer: Outgoing,
    /// The message that was passed on last, with the first of its numbers.
    last: Option<(FrontendReq, u64)>,
    /// The request whose reply the crate owes.
    owed: Option<FrontendReq>,
    /// When the message that is being received began.
    begun: Option<Instant>,
    /// The frontend has sent a message.
    heard: bool,
    /// The frontend sends nothing any more.
    finished: bool,
    /// Since when the frontend is gone.
    gone: Option<Instant>,
}

impl<'a> Door<'a> {
    /// A door between a frontend and the crate. Both sockets are used without blocking.
    pub(in crate::vhost_user) fn new(
        outer: &'a UnixStream,
        inner: &'a UnixStream,
        session: &'a dyn Guarded,
        limits: Limits,
    ) -> Self {
        Door {
            outer,
            inner,
            session,
            limits,
            checks: Checks::new(limits),
            requests: Incoming::new(),
            replies: Incoming::new(),
            to_inner: Outgoing::new(),
            to_outer: Outgoing::new(),
            last: None,
            owed: None,
            begun: None,
            heard: false,
            finished: false,
            gone: None,
        }
    }

    /// Passes messages on until the connection ends.
    pub(in crate::vhost_user) fn stand(&mut self) -> End {
        loop {
            match self.pass_on().and_then(|()| self.wait()) {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// Whether the frontend has sent a message.
    pub(in crate::vhost_user) fn has_heard(&self) -> bool {
        self.heard
    }

    /// The message that was passed on last, for the log.
    pub(in crate::vhost_user) fn last_message(&self) -> String {
        match self.last {
            Some((request, number)) => format!("{request:?} ({number:#x})"),
            None => "no message".to_owned(),
        }
    }

    /// Does everything that can be done without waiting.
    fn pass_on(&mut self) -> Result<(), End> {
        loop {
            if self.to_inner.send(self.inner).is_err() {
                return Err(End::Backend);
            }
            if self.to_outer.send(self.outer).is_err() {
                // The frontend is gone, and poll says so.
                self.to_outer.clear();
            }
            if self.to_outer.is_empty() && self.receive_reply()? {
                continue;
            }
            if !self.may_receive() {
                break;
            }
            if !self.receive_request()? {
                break;
            }
        }
        // Whatever was sent before the end is carried out, as far as it is a message.
        if self.finished && self.to_inner.is_empty() && self.owed.is_none() {
            return Err(End::Frontend);
        }
        Ok(())
    }

    fn may_receive(&self) -> bool {
        !self.finished
            && self.owed.is_none()
            && self.to_inner.is_empty()
            && self.to_outer.is_empty()
    }

    /// Takes a reply of the crate. False where there is none.
    fn receive_reply(&mut self) -> Result<bool, End> {
        match self.replies.receive(self.inner) {
            Ok(Received::NotYet) => Ok(false),
            Ok(Received::Message(reply) | Received::TooManyDescriptors(reply, _)) => {
                let request = reply.header.request;
                if self.owed == Some(request) {
                    self.owed = None;
                }
                let bytes = self.checks.correct(request).unwrap_or(reply.bytes);
                if self.gone.is_none() {
                    self.to_outer.put(bytes, reply.descriptors);
                }
                Ok(true)
            }
            Ok(Received::End | Received::Nonsense(_)) | Err(_) => Err(End::Backend),
        }
    }

    /// Takes a message of the frontend. False where there is none.
    fn receive_request(&mut self) -> Result<bool, End> {
        match self.requests.receive(self.outer) {
            Ok(Received::NotYet) => {
                if self.requests.has_begun() {
                    self.begun.get_or_insert_with(Instant::now);
                }
                Ok(false)
            }
            Ok(Received::Message(message)) => {
                self.begun = None;
                self.heard = true;
                self.admit(message).map(|()| true)
            }
            Ok(Received::TooManyDescriptors(message, refusal)) => {
                self.begun = None;
                self.refuse(message.header, &refusal).map(|()| true)
            }
            Ok(Received::Nonsense(refusal)) => Err(End::Refused(refusal)),
            Ok(Received::End) if self.requests.has_begun() => {
                Err(End::Refused(self.unfinished("the frontend left it")))
            }
            Ok(Received::End) => {
                self.finished = true;
                Ok(false)
            }
            Err(error) => Err(End::Refused(Refusal(format!(
                "receiving from the frontend failed: {error}"
            )))),
        }
    }

    fn admit(&mut self, mut message: Message) -> Result<(), End> {
        match self.checks.admit(&mut message) {
            Ok(answered) => {
                let Header { request, len, .. } = message.header;
                let files = message.descriptors.len();
                log::trace!("{request:?}: {len} bytes, {files} descriptors");
                let number = message.body().first_chunk().copied();
                self.last = Some((request, number.map_or(0, u64::from_ne_bytes)));
                self.owed = answered.then_some(message.header.request);
                self.to_inner.put(message.bytes, message.descriptors);
                Ok(())
            }
            Err(refusal) => self.refuse(message.header, &refusal),
        }
    }

    fn refuse(&mut self, header: Header, refusal: &Refusal) -> Result<(), End> {
        let request = header.request;
        match self.checks.refuse(header) {
            Refused::Answered(reply) => {
                log::error!("{request:?} refused: {refusal}");
                self.to_outer.put(reply, PeerFds::default());
                Ok(())
            }
            Refused::Ends => Err(End::Refused(Refusal(format!(
                "{request:?} refused: {refusal}"
            )))),
        }
    }

    fn unfinished(&self, why: &str) -> Refusal {
        let progress = self.requests.progress();
        Refusal(format!(
            "a message is not finished ({progress}): {why}; send each message at once"
        ))
    }

    /// Waits until there is something to do.
    fn wait(&mut self) -> Result<(), End> {
        let mut outer = PollFlags::empty();
        outer.set(PollFlags::IN, self.may_receive());
        outer.set(PollFlags::OUT, !self.to_outer.is_empty());
        let mut inner = PollFlags::empty();
        inner.set(PollFlags::IN, self.to_outer.is_empty());
        inner.set(PollFlags::OUT, !self.to_inner.is_empty());
        let deadline = match (self.begun, self.gone) {
            (_, Some(gone)) => Some(gone + self.limits.aftermath),
            (Some(begun), None) => Some(begun + self.limits.message),
            (None, None) => None,
        };
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(if self.gone.is_some() {
                End::Frontend
            } else {
                let seconds = self.limits.message.as_secs();
                End::Refused(self.unfinished(&format!("{seconds} s have passed")))
            });
        }
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let bell = || PollFd::new(&self.session.bell().0, PollFlags::IN);
        // No allocation: this may run when the frontend has its reply already.
        let (mut fds, mut count) = ([bell(), bell(), bell()], 1);
        let mut wait_for = |fd| {
            if let Some(place) = fds.get_mut(count) {
                *place = fd;
                count += 1;
            }
        };
        // One that is gone, or of which nothing is wanted, would be reported again and again.
        if !inner.is_empty() {
            wait_for(PollFd::new(self.inner, inner));
        }
        if self.gone.is_none() {
            wait_for(PollFd::new(self.outer, outer));
        }
        let fds = fds.get_mut(..count).unwrap_or_default();
        match poll(fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => {
                return Err(End::Refused(Refusal(format!(
                    "waiting for the frontend failed: {error}"
                ))));
            }
        }
        let reported = |fd: Option<&PollFd<'_>>| fd.map_or(PollFlags::empty(), PollFd::revents);
        let rung = !reported(fds.first()).is_empty();
        // Not a frontend that only sends nothing any more: it may still read.
        let hung_up = reported(fds.last()).intersects(PollFlags::HUP | PollFlags::ERR);
        if self.gone.is_none() && hung_up {
            self.gone = Some(Instant::now());
            self.to_outer.clear();
            self.session.release_held();
        }
        if rung {
            let _ = rustix::io::read(&self.session.bell().0, &mut [0; 8]);
            if let Some(fault) = self.session.fault() {
                return Err(End::Refused(fault));
            }
        }
        Ok(())
    }
}
