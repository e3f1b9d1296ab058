//! Accepts frontends, also where the process has no descriptor left.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

/// What came of accepting.
pub(super) enum Arrival {
    Frontend(UnixStream),
    /// It left before, or another process took it.
    Nobody,
    /// It was accepted and disconnected: there is no descriptor for its connection.
    TurnedAway(io::Error),
    /// It waits on: not even that was possible.
    NotNow(io::Error),
}

/// A descriptor that is given up to accept and disconnect a frontend. One that was left waiting
/// would keep the listener readable, and the server spinning.
pub(super) struct Reserve(Option<OwnedFd>);

impl Reserve {
    pub(super) fn new() -> Self {
        Reserve(open("/dev/null", OFlags::CLOEXEC | OFlags::PATH, Mode::empty()).ok())
    }

    /// Accepts the frontend that waits.
    pub(super) fn accept(&mut self, listener: &UnixListener) -> Arrival {
        match accept(listener) {
            Ok(frontend) => {
                if self.0.is_none() {
                    *self = Self::new();
                }
                Arrival::Frontend(frontend)
            }
            Err(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => Arrival::Nobody,
            Err(error @ (Errno::MFILE | Errno::NFILE)) => {
                self.0 = None;
                let arrived = accept(listener);
                let turned_away = arrived.map(drop).is_ok();
                *self = Self::new();
                if turned_away {
                    Arrival::TurnedAway(error.into())
                } else {
                    Arrival::NotNow(error.into())
                }
            }
            Err(error) => Arrival::NotNow(error.into()),
        }
    }
}

/// Frontends' sockets need not be non-blocking: the door asks for that at each call.
fn accept(listener: &UnixListener) -> rustix::io::Result<UnixStream> {
    accept_with(listener, SocketFlags::CLOEXEC).map(UnixStream::from)
}
