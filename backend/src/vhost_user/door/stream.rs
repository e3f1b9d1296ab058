//! Messages in and out of a socket, of which neither ever blocks: each call does what the socket
//! takes or has now. A message under way is all that is kept.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::vhost_user::door::Refusal;
use crate::vhost_user::door::closing::{self, PeerFds};
use crate::vhost_user::door::message::{HEADER, Header, LONGEST, MOST_DESCRIPTORS, Message};

/// What a socket had.
#[derive(Debug)]
pub(super) enum Received {
    /// Not a whole message yet; more may come.
    NotYet,
    Message(Message),
    /// Something that no message begins with: where the next one begins is unknown.
    Nonsense(Refusal),
    /// A whole message, of whose descriptors some were closed again.
    TooManyDescriptors(Message, Refusal),
    /// The end of the stream.
    End,
}

/// A message that is being received.
///
/// A read never goes past the end of a message: it would also receive the descriptors of the next
/// one (unix(7), SCM_RIGHTS).
pub(super) struct Incoming {
    bytes: Vec<u8>,
    /// How many of `bytes` are there.
    filled: usize,
    header: Option<Header>,
    descriptors: PeerFds,
    /// Descriptors were closed again: by us, or by the kernel, which had no room for them.
    lost: Option<&'static str>,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Incoming {
            bytes: vec![0; HEADER],
            filled: 0,
            header: None,
            descriptors: PeerFds::default(),
            lost: None,
        }
    }

    /// Whether a part of a message has arrived.
    pub(super) fn has_begun(&self) -> bool {
        self.filled != 0
    }

    /// What has arrived of the message, for the log.
    pub(super) fn progress(&self) -> String {
        match self.header {
            Some(header) => format!(
                "{:?}, {} of {} bytes",
                header.request,
                self.filled,
                self.bytes.len()
            ),
            None => format!("{} of {HEADER} bytes of a header", self.filled),
        }
    }

    /// Receives what is there, up to the end of a message.
    ///
    /// # Errors
    ///
    /// Those of recvmsg(2).
    pub(super) fn receive(&mut self, from: &UnixStream) -> io::Result<Received> {
        loop {
            while self.filled < self.bytes.len() {
                match self.receive_some(from) {
                    Ok(0) | Err(Errno::CONNRESET) => return Ok(Received::End),
                    Ok(received) => self.filled += received,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Ok(Received::NotYet),
                    Err(error) => return Err(error.into()),
                }
            }
            match self.header {
                None => {
                    match Header::parse(self.bytes.first_chunk().copied().unwrap_or_default()) {
                        Ok(header) => {
                            self.bytes.resize(HEADER + header.len, 0);
                            self.header = Some(header);
                        }
                        Err(refusal) => return Ok(Received::Nonsense(refusal)),
                    }
                }
                Some(header) => return Ok(self.take(header)),
            }
        }
    }

    fn take(&mut self, header: Header) -> Received {
        let whole = std::mem::replace(self, Self::new());
        let message = Message {
            header,
            bytes: whole.bytes,
            descriptors: whole.descriptors,
        };
        match whole.lost {
            None => Received::Message(message),
            Some(why) => Received::TooManyDescriptors(message, Refusal(why.to_owned())),
        }
    }

    fn receive_some(&mut self, from: &UnixStream) -> Result<usize, Errno> {
        let rest = self.bytes.get_mut(self.filled..).unwrap_or_default();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        // The flag, rather than O_NONBLOCK: an inherited socket's description is shared.
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(from, &mut [IoSliceMut::new(rest)], &mut ancillary, flags)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                for descriptor in received {
                    if self.descriptors.len() < MOST_DESCRIPTORS {
                        self.descriptors.push(descriptor);
                    } else {
                        closing::close(descriptor);
                        self.lost = Some(TOO_MANY);
                    }
                }
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            let full = self.descriptors.len() == MOST_DESCRIPTORS;
            self.lost = Some(if full { TOO_MANY } else { NO_ROOM });
        }
        Ok(received.bytes)
    }
}

const TOO_MANY: &str = "it carries more than 32 descriptors; send those that belong to it";
const NO_ROOM: &str = "its descriptors do not fit into this process; raise its limit of open \
     files (RLIMIT_NOFILE), or share less";

/// A message that is being sent.
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    descriptors: PeerFds,
}

impl Outgoing {
    pub(super) fn new() -> Self {
        Outgoing {
            bytes: Vec::with_capacity(LONGEST),
            sent: 0,
            descriptors: PeerFds::default(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Sends this, once the one before is sent.
    pub(super) fn put(&mut self, bytes: Vec<u8>, descriptors: PeerFds) {
        debug_assert!(self.is_empty(), "one message at a time");
        self.bytes = bytes;
        self.sent = 0;
        self.descriptors = descriptors;
    }

    /// Forgets what is not sent.
    pub(super) fn clear(&mut self) {
        self.put_away();
    }

    /// Sends as much as the socket takes.
    ///
    /// # Errors
    ///
    /// Those of sendmsg(2).
    pub(super) fn send(&mut self, to: &UnixStream) -> io::Result<()> {
        while !self.is_empty() {
            match self.send_some(to) {
                Ok(sent) => {
                    self.sent += sent;
                    // They went with the first byte.
                    self.descriptors.clear();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.put_away();
        Ok(())
    }

    fn send_some(&self, to: &UnixStream) -> Result<usize, Errno> {
        let descriptors: Vec<_> = self.descriptors.iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            // They fit: a message has no more.
            let _ = ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let rest = self.bytes.get(self.sent..).unwrap_or_default();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(to, &[IoSlice::new(rest)], &mut ancillary, flags)
    }

    fn put_away(&mut self) {
        self.bytes.clear();
        self.sent = 0;
        self.descriptors.clear();
    }
}
