//! Deadlines, shutting down, and what ends every sleep.
//!
//! Every sleep here, and in [`wait_set`](super::wait_set), ends: by what was waited for, at its deadline, when the backend closes the
//! connection (as the kernel does for a backend that dies), or by a [`ShutdownHandle`].

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::{DupFlags, Errno};

use super::Error;
use super::error::Failure;

/// When a wait gives up.
///
/// A [`Duration`] counts from the moment of the conversion, so that a `Deadline` made once
/// bounds several calls together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// Waits until the backend answers, dies, or the frontend is shut down.
    pub const NEVER: Deadline = Deadline(None);

    pub(super) fn instant(self) -> Option<Instant> {
        self.0
    }

    /// How long it is until then; `None` for ever.
    pub fn remaining(self) -> Option<Duration> {
        self.0
            .map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether it has passed.
    pub fn has_passed(self) -> bool {
        self.remaining() == Some(Duration::ZERO)
    }

    /// The earlier of the two.
    pub(super) fn or(self, other: impl Into<Deadline>) -> Deadline {
        match (self.0, other.into().0) {
            (Some(a), Some(b)) => Deadline(Some(a.min(b))),
            (a, b) => Deadline(a.or(b)),
        }
    }
}

impl From<Instant> for Deadline {
    fn from(at: Instant) -> Self {
        Deadline(Some(at))
    }
}

impl From<Duration> for Deadline {
    /// That long from now; never, where no clock reaches so far.
    fn from(after: Duration) -> Self {
        Deadline(Instant::now().checked_add(after))
    }
}

/// An eventfd, not blocking, closed on exec.
pub(super) fn eventfd() -> Result<OwnedFd, Error> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    rustix::event::eventfd(0, flags).map_err(|e| Error::Io {
        what: "create an eventfd",
        source: e.into(),
    })
}

/// Makes an eventfd readable, and has whoever watches it hear of that: where its counter is full, as
/// nobody but a peer makes it, it is emptied first.
pub(super) fn signal(fd: &OwnedFd) {
    loop {
        match rustix::io::write(fd, &1u64.to_ne_bytes()) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => drain(fd),
            _ => return,
        }
    }
}

/// Makes an eventfd unreadable.
pub(super) fn drain(fd: &OwnedFd) {
    while rustix::io::read(fd, &mut [0; 8]) == Err(Errno::INTR) {}
}

/// Sleeps until one of the descriptors reports, or the deadline passes (then none of them has).
pub(super) fn poll(fds: &mut [PollFd<'_>], deadline: Deadline) -> Result<(), Error> {
    loop {
        let timeout = deadline
            .remaining()
            .and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(fds, timeout.as_ref()) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => {
                return Err(Error::Io {
                    what: "poll",
                    source: e.into(),
                });
            }
        }
    }
}

/// Ends every wait on a frontend, those to come included, with [`Error::ShutDown`].
///
/// It is meant for a VMM that exits, or that gives a backend up, while threads wait. It says
/// nothing to the backend.
#[derive(Clone, Debug)]
pub struct ShutdownHandle(Arc<OwnedFd>);

impl ShutdownHandle {
    /// A handle for [`Frontend::from_stream_with`](super::Frontend::from_stream_with).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where this process has no descriptor left.
    pub fn new() -> Result<Self, Error> {
        Ok(ShutdownHandle(Arc::new(eventfd()?)))
    }

    /// Shuts the frontend down, for good.
    pub fn shut_down(&self) {
        signal(&self.0);
    }

    pub(super) fn was_used(&self) -> bool {
        let mut fds = [PollFd::new(&*self.0, PollFlags::IN)];
        poll(&mut fds, Duration::ZERO.into()).is_ok() && !fds[0].revents().is_empty()
    }

    /// Sleeps until it is used, or the deadline passes.
    pub(super) fn wait(&self, deadline: Deadline) -> Result<(), Error> {
        poll(&mut [PollFd::new(&*self.0, PollFlags::IN)], deadline)
    }
}

impl AsFd for ShutdownHandle {
    /// Readable once shut down.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What ends waits on every queue.
pub(super) struct ConnectionWatch {
    /// The present connection's control socket, behind the same number over every reconnect.
    /// vhost's `Frontend` has its own descriptor of it.
    socket: OwnedFd,
    /// Counts the connections.
    connections: AtomicU64,
    pub(super) shutdown: ShutdownHandle,
}

/// How a wait ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    /// There was a call.
    Called,
    /// The deadline passed.
    TimedOut,
    /// No queue will be served on this connection any more.
    Failed(Failure),
}

impl ConnectionWatch {
    pub(super) fn new(socket: &UnixStream, shutdown: ShutdownHandle) -> Result<Self, Error> {
        let socket = socket.try_clone().map_err(|source| Error::Io {
            what: "duplicate the control socket",
            source,
        })?;
        Ok(ConnectionWatch {
            socket: socket.into(),
            connections: AtomicU64::new(0),
            shutdown,
        })
    }

    /// Numbers the present connection.
    pub(super) fn connection(&self) -> u64 {
        self.connections.load(Ordering::Acquire)
    }

    /// The present connection's number, and its socket by another descriptor.
    pub(super) fn present_socket(&self) -> Result<(u64, OwnedFd), Error> {
        // First the number: a socket that is newer than it is only looked for again.
        let connection = self.connection();
        let socket = self.socket.try_clone().map_err(|source| Error::Io {
            what: "duplicate the control socket",
            source,
        })?;
        Ok((connection, socket))
    }

    /// Watches another connection's socket from now on. Whoever sleeps on the former one is
    /// woken by its end.
    pub(super) fn follow(&self, socket: &UnixStream) -> Result<(), Error> {
        #[expect(
            unsafe_code,
            reason = "dup3 needs an OwnedFd, which must not be dropped here"
        )]
        // SAFETY: the descriptor is open for as long as this object, and `ManuallyDrop` keeps it
        // so. dup3 replaces what is behind the number in one step, so it never is closed for
        // those who use it meanwhile.
        let own = unsafe { OwnedFd::from_raw_fd(self.socket.as_raw_fd()) };
        let mut own = ManuallyDrop::new(own);
        loop {
            match rustix::io::dup3(socket, &mut own, DupFlags::CLOEXEC) {
                Ok(()) => {
                    self.connections.fetch_add(1, Ordering::Release);
                    return Ok(());
                }
                Err(Errno::INTR | Errno::BUSY) => {}
                Err(e) => {
                    return Err(Error::Io {
                        what: "duplicate the control socket",
                        source: e.into(),
                    });
                }
            }
        }
    }

    /// Sleeps until the connection fails; `None` at the deadline.
    pub(super) fn until_failure(&self, deadline: Deadline) -> Result<Option<Failure>, Error> {
        let mut fds = self.watched();
        poll(&mut fds, deadline)?;
        Ok(failure(&fds))
    }

    /// Whether the connection has failed, without waiting.
    pub(super) fn failure(&self) -> Result<Option<Failure>, Error> {
        self.until_failure(Duration::ZERO.into())
    }

    fn watched(&self) -> [PollFd<'_>; 2] {
        [
            PollFd::from_borrowed_fd(self.shutdown.as_fd(), PollFlags::IN),
            // Not IN: a reply to a control message is none of our business.
            PollFd::new(&self.socket, PollFlags::RDHUP),
        ]
    }
}

impl AsFd for ConnectionWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What could not be done, and why.
pub(super) fn io(what: &'static str) -> impl Fn(Errno) -> Error {
    move |error| Error::Io {
        what,
        source: error.into(),
    }
}

fn failure(watched: &[PollFd<'_>]) -> Option<Failure> {
    let reports = |n: usize| !watched[n].revents().is_empty();
    if reports(0) {
        Some(Failure::ShutDown)
    } else if reports(1) {
        Some(Failure::Disconnected)
    } else {
        None
    }
}
