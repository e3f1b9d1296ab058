//! Lines to and from QEMU over a socket, with a limit for each.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Error;

/// An end of a socket that carries lines.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
    /// Bytes read but not taken yet.
    buffer: Vec<u8>,
}

/// A listening socket that QEMU connects to as it starts, so no connecting has to be retried.
pub(super) fn listen(path: &Path) -> Result<UnixListener, Error> {
    UnixListener::bind(path).map_err(Error::system(format!("listen at {}", path.display())))
}

impl Channel {
    /// Takes QEMU's connection.
    pub(super) fn accept(listener: &UnixListener, limit: Duration) -> Result<Self, Error> {
        const WHAT: &str = "connection from QEMU";
        let mut descriptors = [PollFd::new(listener, PollFlags::IN)];
        let timeout = Timespec::try_from(limit).ok();
        match poll(&mut descriptors, timeout.as_ref()) {
            Ok(0) => return Err(late(WHAT, limit)),
            Ok(_) => {}
            Err(error) => return Err(Error::system(format!("wait for a {WHAT}"))(error.into())),
        }
        let (stream, _) = listener
            .accept()
            .map_err(Error::system(format!("take a {WHAT}")))?;
        stream
            .set_write_timeout(Some(limit))
            .map_err(Error::system("set a socket's time limit"))?;
        Ok(Channel {
            stream,
            buffer: Vec::new(),
        })
    }

    /// Sends a line.
    pub(super) fn send(&mut self, line: impl fmt::Display) -> Result<(), Error> {
        let bytes = format!("{line}\n");
        self.stream
            .write_all(bytes.as_bytes())
            .map_err(Error::system(format!("send {line} to QEMU")))
    }

    /// The next line, without its end. `what` names the line in an error.
    pub(super) fn line(&mut self, deadline: &Deadline, what: &str) -> Result<String, Error> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.buffer[searched..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let line: Vec<u8> = self.buffer.drain(..=searched + end).collect();
                let line = &line[..line.len() - 1];
                return Ok(String::from_utf8_lossy(line).into_owned());
            }
            searched = self.buffer.len();
            let left = deadline.left().ok_or_else(|| late(what, deadline.limit))?;
            self.stream
                .set_read_timeout(Some(left))
                .map_err(Error::system("set a socket's time limit"))?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Error::Closed { what: what.into() }),
                Ok(count) => self.buffer.extend_from_slice(&bytes[..count]),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => {
                        return Err(Error::Closed { what: what.into() });
                    }
                    _ => return Err(Error::system(format!("read a {what} from QEMU"))(error)),
                },
            }
        }
    }
}

/// The end of a time limit.
#[derive(Debug)]
pub(super) struct Deadline {
    limit: Duration,
    end: Instant,
}

impl Deadline {
    /// This long from now.
    pub(super) fn after(limit: Duration) -> Self {
        Deadline {
            limit,
            end: Instant::now() + limit,
        }
    }

    /// The time left, which is not zero.
    pub(super) fn left(&self) -> Option<Duration> {
        let left = self.end.checked_duration_since(Instant::now())?;
        (!left.is_zero()).then_some(left)
    }
}

fn late(what: &str, limit: Duration) -> Error {
    Error::Late {
        what: what.to_owned(),
        limit,
    }
}
