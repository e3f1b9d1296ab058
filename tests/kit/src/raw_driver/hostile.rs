//! The control channel without a library: any bytes, any descriptors, any order.

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::memory::{Memory, REGION_GPA, REGION_SIZE, REGION_VA};
use super::message;
use super::ring::{Ring, fd_of};

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
        let mut control = Self::over(stream);
        let say = |control: &Self, code, body: &[u8]| {
            let sent = control.message(code, false, body, &[]);
            sent.expect("the backend listens");
        };
        say(&control, message::SET_OWNER, &[]);
        say(&control, message::GET_FEATURES, &[]);
        control.reply().expect("the features");
        say(&control, message::GET_PROTOCOL_FEATURES, &[]);
        let (_, offered) = control.reply().expect("the protocol features");
        say(&control, message::SET_PROTOCOL_FEATURES, &offered);
        let taken = control.ask(message::SET_FEATURES, &[features], &[]);
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

    /// [`ask`](Self::ask), for what must be granted.
    ///
    /// # Errors
    ///
    /// If the peer is gone.
    ///
    /// # Panics
    ///
    /// If it is refused.
    pub fn granted(&mut self, code: u32, words: &[u64], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let answer = self.ask(code, words, fds)?;
        assert_eq!(answer, 0, "message {code} is refused");
        Ok(())
    }

    /// Shares a region of memory that is this file from its start: SET_MEM_TABLE.
    ///
    /// # Errors
    ///
    /// If the peer is gone.
    pub fn share(&mut self, file: BorrowedFd<'_>) -> io::Result<u64> {
        let table = [1, REGION_GPA, REGION_SIZE, REGION_VA, 0];
        self.ask(message::SET_MEM_TABLE, &table, &[file])
    }

    /// Adds a region at this guest-physical address to the memory: ADD_MEM_REG.
    ///
    /// # Errors
    ///
    /// If the peer is gone.
    pub fn add_region(&mut self, at: u64, len: u64, file: BorrowedFd<'_>) -> io::Result<u64> {
        let region = [0, at, len, at - REGION_GPA + REGION_VA, 0];
        self.ask(message::ADD_MEM_REG, &region, &[file])
    }

    /// Starts a ring with these descriptors for kick and call, from index 0.
    ///
    /// # Errors
    ///
    /// If the peer is gone, or the backend refuses one of the messages: which.
    pub fn start_with(
        &mut self,
        queue: u32,
        ring: &Ring,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let (index, config) = (u64::from(queue), ring.config());
        let (table, used) = (config.desc_table_addr, config.used_ring_addr);
        let addresses = [index, table, used, config.avail_ring_addr, 0];
        let steps: [(u32, &[u64], &[BorrowedFd<'_>]); 6] = [
            (
                message::SET_VRING_NUM,
                &[pair(queue, ring.size().into())],
                &[],
            ),
            (message::SET_VRING_ADDR, &addresses, &[]),
            (message::SET_VRING_BASE, &[pair(queue, 0)], &[]),
            (message::SET_VRING_CALL, &[index], &[call]),
            (message::SET_VRING_KICK, &[index], &[kick]),
            (message::SET_VRING_ENABLE, &[pair(queue, 1)], &[]),
        ];
        for (code, words, fds) in steps {
            if self.ask(code, words, fds)? != 0 {
                let text = format!("message {code} is refused");
                return Err(io::Error::other(text));
            }
        }
        Ok(())
    }

    /// [`start_with`](Self::start_with), with the ring's own descriptors.
    ///
    /// # Errors
    ///
    /// Those of [`start_with`](Self::start_with).
    pub fn start(&mut self, queue: u32, ring: &Ring) -> io::Result<()> {
        self.start_with(queue, ring, fd_of(ring.kick_fd()), fd_of(ring.call()))
    }

    /// A whole connection that serves one queue: features, memory, and a started ring.
    ///
    /// # Errors
    ///
    /// Those of [`start_with`](Self::start_with), or if the memory is refused.
    pub fn serving(
        stream: UnixStream,
        features: u64,
        memory: &Memory,
        queue: u16,
        ring: &Ring,
    ) -> io::Result<Self> {
        let mut control = Self::negotiated(stream, features);
        if control.share(memory.file().as_fd())? != 0 {
            return Err(io::Error::other("the memory is refused"));
        }
        control.start(queue.into(), ring)?;
        Ok(control)
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
