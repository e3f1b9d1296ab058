//! Deadlines, shutting down, and what ends every sleep.
//!
//! Every sleep here, and in [`wait_set`](super::wait_set), ends: when the awaited thing happens, at
//! the deadline, when the backend closes the connection (the kernel does that for a backend that
//! dies), or by a [`ShutdownHandle`].

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::{DupFlags, Errno};

use crate::Error;
use crate::error::Failure;
use crate::sys::{eventfd, io, poll, signal};

/// When a wait ends without a result.
///
/// A [`Duration`] counts from its conversion, so one `Deadline` bounds several calls together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline(Option<Instant>);

impl Deadline {
    /// Waits until the backend answers or dies, or the frontend is shut down.
    pub const NEVER: Deadline = Deadline(None);

    pub(crate) fn instant(self) -> Option<Instant> {
        self.0
    }

    /// The time until then; `None`: forever.
    pub fn remaining(self) -> Option<Duration> {
        self.0
            .map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Whether it has passed.
    pub fn has_passed(self) -> bool {
        self.remaining() == Some(Duration::ZERO)
    }

    /// The earlier of the two.
    pub(crate) fn or(self, other: impl Into<Deadline>) -> Deadline {
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
    /// That long from now; [`NEVER`](Self::NEVER) if that is beyond what the clock can count.
    fn from(after: Duration) -> Self {
        Deadline(Instant::now().checked_add(after))
    }
}

/// Ends every wait on a frontend, present and future, with [`Error::ShutDown`].
///
/// It is for a VMM that exits, or drops a backend, while threads wait. The backend is not told.
#[derive(Clone, Debug)]
pub struct ShutdownHandle(Arc<OwnedFd>);

impl ShutdownHandle {
    /// A handle for [`Options::shutdown`](crate::Options::shutdown).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if this process has no descriptor left.
    pub fn new() -> Result<Self, Error> {
        Ok(ShutdownHandle(Arc::new(eventfd()?)))
    }

    /// Shuts the frontend down, permanently.
    pub fn shut_down(&self) {
        signal(&self.0);
    }

    pub(crate) fn was_used(&self) -> bool {
        let mut fds = [PollFd::new(&*self.0, PollFlags::IN)];
        poll(&mut fds, Duration::ZERO.into()).is_ok() && !fds[0].revents().is_empty()
    }

    /// Sleeps until it is used, or the deadline passes.
    pub(crate) fn wait(&self, deadline: Deadline) -> Result<(), Error> {
        poll(&mut [PollFd::new(&*self.0, PollFlags::IN)], deadline)
    }
}

impl AsFd for ShutdownHandle {
    /// Readable once shut down.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The connection and the shutdown handle, whose end ends waits on every queue.
pub(crate) struct ConnectionWatch {
    /// The current connection's control socket. The descriptor's number stays the same over
    /// reconnects. vhost's `Frontend` has a descriptor of its own.
    socket: OwnedFd,
    /// Counts the connections.
    connections: AtomicU64,
    pub(crate) shutdown: ShutdownHandle,
}

/// Why a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// The call eventfd was signalled.
    Called,
    /// The deadline passed.
    TimedOut,
    /// The connection is lost, or the frontend shut down.
    Failed(Failure),
}

impl ConnectionWatch {
    pub(crate) fn new(socket: &UnixStream, shutdown: ShutdownHandle) -> Result<Self, Error> {
        let socket = socket
            .try_clone()
            .map_err(io("duplicate the control socket"))?;
        Ok(ConnectionWatch {
            socket: socket.into(),
            connections: AtomicU64::new(0),
            shutdown,
        })
    }

    /// The number of the current connection.
    pub(crate) fn connection(&self) -> u64 {
        self.connections.load(Ordering::Acquire)
    }

    /// The current connection's number, and another descriptor of its socket.
    pub(crate) fn present_socket(&self) -> Result<(u64, OwnedFd), Error> {
        // Read the number first: if the socket is newer, it is merely fetched again.
        let connection = self.connection();
        let socket = self
            .socket
            .try_clone()
            .map_err(io("duplicate the control socket"))?;
        Ok((connection, socket))
    }

    /// Watches the next connection's socket from now on. Threads that sleep on the previous socket
    /// wake when it is closed.
    pub(crate) fn follow(&self, socket: &UnixStream) -> Result<(), Error> {
        #[expect(
            unsafe_code,
            reason = "dup3 needs an OwnedFd, which must not be dropped here"
        )]
        // SAFETY: `self.socket` keeps the descriptor open, and `ManuallyDrop` keeps this second
        // owner from closing it. dup3 replaces the file behind the number in one step, so other
        // threads never find the number closed.
        let own = unsafe { OwnedFd::from_raw_fd(self.socket.as_raw_fd()) };
        let mut own = ManuallyDrop::new(own);
        loop {
            match rustix::io::dup3(socket, &mut own, DupFlags::CLOEXEC) {
                Ok(()) => {
                    self.connections.fetch_add(1, Ordering::Release);
                    return Ok(());
                }
                Err(Errno::INTR | Errno::BUSY) => {}
                Err(error) => return Err(io("duplicate the control socket")(error)),
            }
        }
    }

    /// Sleeps until the connection fails; `None` at the deadline.
    pub(crate) fn until_failure(&self, deadline: Deadline) -> Result<Option<Failure>, Error> {
        let mut fds = self.watched();
        poll(&mut fds, deadline)?;
        Ok(failure(&fds))
    }

    /// Whether the connection has failed, without waiting.
    pub(crate) fn failure(&self) -> Result<Option<Failure>, Error> {
        self.until_failure(Duration::ZERO.into())
    }

    fn watched(&self) -> [PollFd<'_>; 2] {
        [
            PollFd::from_borrowed_fd(self.shutdown.as_fd(), PollFlags::IN),
            // Not IN: replies to control messages are for vhost's `Frontend`.
            PollFd::new(&self.socket, PollFlags::RDHUP),
        ]
    }
}

impl AsFd for ConnectionWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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
