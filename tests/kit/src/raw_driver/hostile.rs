//! The control channel without a library: any bytes, any descriptors, any order.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Header flags: version 1, and the sender wants an acknowledgement.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// A vhost-user message header with version 1.
pub fn header(code: u32, need_reply: bool, size: u32) -> [u8; 12] {
    let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&code.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// Whether a socket has bytes to read or has ended.
///
/// # Panics
///
/// If polling fails.
pub fn readable(stream: &UnixStream) -> bool {
    let now = Timespec::default();
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    poll(&mut fds, Some(&now)).expect("a socket can be polled") != 0
}

/// A payload of two 32-bit halves, like SET_VRING_NUM's.
pub fn pair(index: u32, value: u32) -> u64 {
    u64::from(index) | u64::from(value) << 32
}

/// A control channel that sends anything.
#[derive(Debug)]
pub struct Control(UnixStream);

impl Control {
    /// Over a connected socket. Reads time out.
    ///
    /// # Panics
    ///
    /// If the socket takes no time-out.
    pub fn over(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(super::PATIENCE))
            .expect("a time-out");
        Control(stream)
    }

    /// [`over`](Self::over), with these features and all the protocol features that are offered
    /// negotiated, and nothing else.
    ///
    /// # Panics
    ///
    /// If any of it is refused.
    pub fn negotiated(stream: UnixStream, features: u64) -> Self {
        const GET_FEATURES: u32 = 1;
        const SET_FEATURES: u32 = 2;
        const SET_OWNER: u32 = 3;
        const GET_PROTOCOL_FEATURES: u32 = 15;
        const SET_PROTOCOL_FEATURES: u32 = 16;
        let mut control = Self::over(stream);
        let say = |control: &Self, code, body: &[u8]| {
            let sent = control.message(code, false, body, &[]);
            sent.expect("the backend listens");
        };
        say(&control, SET_OWNER, &[]);
        say(&control, GET_FEATURES, &[]);
        control.reply().expect("the features");
        say(&control, GET_PROTOCOL_FEATURES, &[]);
        let (_, offered) = control.reply().expect("the protocol features");
        say(&control, SET_PROTOCOL_FEATURES, &offered);
        let taken = control.ask(SET_FEATURES, &[features], &[]);
        assert_eq!(taken.expect("an answer"), 0, "SET_FEATURES");
        control
    }

    /// Whether there are bytes to read, or the end.
    ///
    /// # Panics
    ///
    /// If polling fails.
    pub fn is_readable(&self) -> bool {
        readable(&self.0)
    }

    /// Sends bytes and descriptors as they are, in one message.
    ///
    /// # Errors
    ///
    /// If the peer is gone.
    ///
    /// # Panics
    ///
    /// If there are more descriptors than one message carries.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let iov = [IoSlice::new(bytes)];
        Ok(sendmsg(&self.0, &iov, &mut ancillary, SendFlags::NOSIGNAL)?)
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// If the peer is gone.
    pub fn message(
        &self,
        code: u32,
        need_reply: bool,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<usize> {
        let mut bytes = header(code, need_reply, body.len() as u32).to_vec();
        bytes.extend_from_slice(body);
        self.send(&bytes, fds)
    }

    /// Sends a message with u64 bodies and wants to hear how it went.
    ///
    /// # Errors
    ///
    /// If the peer is gone.
    pub fn ask(&mut self, code: u32, words: &[u64], fds: &[BorrowedFd<'_>]) -> io::Result<u64> {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.message(code, true, &body, fds)?;
        self.reply().map(|(_, body)| {
            let mut word = [0; 8];
            let len = body.len().min(8);
            word[..len].copy_from_slice(&body[..len]);
            u64::from_le_bytes(word)
        })
    }

    /// The next message from the backend: code and body.
    ///
    /// # Errors
    ///
    /// If the backend ends the connection or says nothing.
    ///
    /// # Panics
    ///
    /// If the backend announces more than a message has.
    pub fn reply(&mut self) -> io::Result<(u32, Vec<u8>)> {
        let mut head = [0; 12];
        self.0.read_exact(&mut head)?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let size = word(8) as usize;
        assert!(size <= 4096, "a reply of {size} bytes");
        let mut body = vec![0; size];
        self.0.read_exact(&mut body)?;
        Ok((word(0), body))
    }

    /// Reads until the backend ends the connection.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn wait_for_end(&mut self) {
        let mut rest = [0; 4096];
        loop {
            match self.0.read(&mut rest) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
                Err(error) => panic!("the backend does not end the connection: {error}"),
            }
        }
    }

    /// Shuts the sending half down.
    ///
    /// # Panics
    ///
    /// If the system refuses.
    pub fn finish(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Write);
    }
}
