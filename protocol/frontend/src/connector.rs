//! Where connections come from.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::connection::connect;
use crate::{Deadline, Error, Options, ShutdownHandle};

/// The pause before the second attempt to connect to a path, and the longest pause. They double.
/// No event says when a socket is listened to, so this is asked again and again.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Where a frontend gets its connection from, and the next one after an outage: a path, a socket
/// that is connected already, or a function.
///
/// Paths and sockets convert into it, so that [`Frontend::connect`](crate::Frontend::connect)
/// takes them as they are.
#[derive(Debug)]
pub struct Connector(Kind);

enum Kind {
    /// It can be had once.
    Stream(UnixStream),
    Again(Reconnector),
}

/// What gives any number of connections.
pub(crate) enum Reconnector {
    Path(PathBuf),
    Function(Box<dyn Fn() -> io::Result<UnixStream> + Send + Sync>),
}

impl Connector {
    /// A backend that listens at `path`.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Connector(Kind::Again(Reconnector::Path(path.into())))
    }

    /// A socket that is connected to a backend already. There will be no other, so
    /// [`Options::reconnect`](crate::Options::reconnect) is refused.
    pub fn stream(socket: UnixStream) -> Self {
        Connector(Kind::Stream(socket))
    }

    /// A function that connects, each time that a connection is needed. It should not take long:
    /// nothing interrupts it. Before it connects to another process than last time, the previous
    /// process must have ended: one that was only slow would still write to the shared memory.
    pub fn function(connect: impl Fn() -> io::Result<UnixStream> + Send + Sync + 'static) -> Self {
        Connector(Kind::Again(Reconnector::Function(Box::new(connect))))
    }

    pub(crate) fn can_reconnect(&self) -> bool {
        matches!(self.0, Kind::Again(_))
    }

    /// The first connection, and where the others come from.
    pub(crate) fn connect(
        self,
        options: &Options,
        shutdown: &ShutdownHandle,
        deadline: Deadline,
    ) -> Result<(UnixStream, Option<Reconnector>), Error> {
        match self.0 {
            Kind::Stream(socket) => Ok((socket, None)),
            Kind::Again(again) => {
                let socket = match options.wait_for_listener {
                    true => again.connect_when_listening(shutdown, deadline)?,
                    false => again.connect(deadline)?,
                };
                Ok((socket, Some(again)))
            }
        }
    }
}

impl Reconnector {
    /// Connects to a backend that may have been launched just now: as long as its socket does not
    /// exist, or nobody listens at it, it is tried again, until the deadline.
    fn connect_when_listening(
        &self,
        shutdown: &ShutdownHandle,
        deadline: Deadline,
    ) -> Result<UnixStream, Error> {
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.connect(deadline) {
                Err(error) if is_too_early(&error) && !deadline.has_passed() => error,
                connected => return connected,
            };
            shutdown.wait(deadline.or(pause))?;
            if shutdown.was_used() {
                return Err(Error::ShutDown);
            }
            if deadline.has_passed() {
                return Err(error);
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    pub(crate) fn connect(&self, deadline: Deadline) -> Result<UnixStream, Error> {
        match self {
            Reconnector::Path(path) => connect(path, deadline),
            Reconnector::Function(connect) => {
                connect().map_err(crate::sys::io("connect to the backend"))
            }
        }
    }
}

/// Whether this is what a path is like before its backend listens at it.
fn is_too_early(error: &Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    match error {
        Error::Connect { source, .. } => matches!(source.kind(), NotFound | ConnectionRefused),
        _ => false,
    }
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Kind::Stream(_) => f.write_str("stream"),
            Kind::Again(Reconnector::Path(path)) => path.fmt(f),
            Kind::Again(Reconnector::Function(_)) => f.write_str("function"),
        }
    }
}

impl From<&Path> for Connector {
    fn from(path: &Path) -> Self {
        Connector::path(path)
    }
}

impl From<&PathBuf> for Connector {
    fn from(path: &PathBuf) -> Self {
        Connector::path(path)
    }
}

impl From<PathBuf> for Connector {
    fn from(path: PathBuf) -> Self {
        Connector::path(path)
    }
}

impl From<&str> for Connector {
    fn from(path: &str) -> Self {
        Connector::path(path)
    }
}

impl From<UnixStream> for Connector {
    fn from(socket: UnixStream) -> Self {
        Connector::stream(socket)
    }
}
