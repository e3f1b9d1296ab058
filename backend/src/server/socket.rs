//! Where frontends come from: a path, or a descriptor that the launcher passed.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType, getpeername, sockopt};

use crate::server::access::{Access, Stranger};
use crate::server::bound::{BoundPath, PathError};

/// Why there is no socket to serve on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path cannot be listened at.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The launcher has not passed the descriptor.
    #[error(
        "{option} {fd}: not an open descriptor; pass the number of one that this process inherits, \
         without FD_CLOEXEC"
    )]
    NotOpen {
        /// The option that names the descriptor.
        option: &'static str,
        /// The descriptor.
        fd: RawFd,
    },
    /// The descriptor is something else.
    #[error("{option} {fd}: not a Unix stream socket; pass a listening or a connected one")]
    NotAUnixStream {
        /// The option that names the descriptor.
        option: &'static str,
        /// The descriptor.
        fd: RawFd,
    },
    /// No frontend can come from it.
    #[error(
        "{option} {fd}: this socket neither listens nor is connected; call listen(2) on it first, \
         or pass one end of a socket pair"
    )]
    Unconnected {
        /// The option that names the descriptor.
        option: &'static str,
        /// The descriptor.
        fd: RawFd,
    },
    /// The socket pair was made by a user whose frontends are not served.
    #[error("{option} {fd}: connected by a user that is not served")]
    Stranger {
        /// The option that names the descriptor.
        option: &'static str,
        /// The descriptor.
        fd: RawFd,
        /// That user.
        source: Stranger,
    },
    /// The system refuses what serving on the descriptor needs.
    #[error("{option} {fd}: preparing to serve on this socket failed")]
    Adopt {
        /// The option that names the descriptor.
        option: &'static str,
        /// The descriptor.
        fd: RawFd,
        /// Why.
        source: io::Error,
    },
}

/// A socket at which frontends arrive.
pub struct Socket {
    arrivals: Arrivals,
    origin: Origin,
    access: Access,
}

/// How frontends arrive.
enum Arrivals {
    /// One after the other.
    Listener(UnixListener),
    /// The one there is, until it is served.
    Connected(Option<UnixStream>),
}

#[derive(Debug)]
enum Origin {
    /// Bound by this process, which removes the path in the end.
    Path(BoundPath),
    /// Inherited, listening.
    Listening(RawFd),
    /// Inherited, connected: there is no second frontend.
    Connected(RawFd),
}

impl Socket {
    /// Listens at a path, with this group and mode. A socket there on which no process listens is
    /// replaced.
    ///
    /// # Errors
    ///
    /// [`SocketError`] where the path is taken or the system refuses.
    pub fn bind(path: &Path, access: &Access) -> Result<Self, SocketError> {
        let (bound, listener) = BoundPath::listen(path, access)?;
        Ok(Socket {
            arrivals: Arrivals::Listener(listener),
            origin: Origin::Path(bound),
            access: access.clone(),
        })
    }

    /// Serves on an inherited descriptor: a listening Unix stream socket, or a connected one. This
    /// object owns the descriptor from now on. `option` is how the user named it.
    ///
    /// # Errors
    ///
    /// [`SocketError`] where the descriptor is not such a socket, or the system refuses.
    #[expect(
        unsafe_code,
        reason = "a descriptor that the launcher passed is only a number"
    )]
    pub fn from_fd(option: &'static str, fd: RawFd, access: &Access) -> Result<Self, SocketError> {
        if !is_inherited(fd) {
            return Err(SocketError::NotOpen { option, fd });
        }
        // SAFETY: the descriptor is open, was passed on the command line for this purpose, and is
        // none that this process has opened itself.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        let is_unix_stream = sockopt::socket_domain(owned.as_fd()) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(owned.as_fd()) == Ok(SocketType::STREAM);
        if !is_unix_stream {
            return Err(SocketError::NotAUnixStream { option, fd });
        }
        let adopt = |source| SocketError::Adopt { option, fd, source };
        fcntl_setfd(&owned, FdFlags::CLOEXEC).map_err(|error| adopt(error.into()))?;
        let listening = sockopt::socket_acceptconn(owned.as_fd());
        if listening.map_err(|error| adopt(error.into()))? {
            let listener = UnixListener::from(owned);
            listener.set_nonblocking(true).map_err(adopt)?;
            Ok(Socket {
                arrivals: Arrivals::Listener(listener),
                origin: Origin::Listening(fd),
                access: access.clone(),
            })
        } else {
            match getpeername(&owned) {
                // Also where the peer has closed its end by now.
                Ok(_) => {}
                Err(Errno::NOTCONN) => return Err(SocketError::Unconnected { option, fd }),
                Err(error) => return Err(adopt(error.into())),
            }
            let frontend = UnixStream::from(owned);
            let admitted = access.admit(&frontend).map_err(adopt)?;
            admitted.map_err(|source| SocketError::Stranger { option, fd, source })?;
            Ok(Socket {
                arrivals: Arrivals::Connected(Some(frontend)),
                origin: Origin::Connected(fd),
                access: access.clone(),
            })
        }
    }

    /// Where frontends arrive one after the other. Accepting never waits.
    pub(super) fn listener(&self) -> Option<&UnixListener> {
        match &self.arrivals {
            Arrivals::Listener(listener) => Some(listener),
            Arrivals::Connected(_) => None,
        }
    }

    /// The frontend that was connected from the beginning. There is one, once.
    pub(super) fn take_connected(&mut self) -> Option<UnixStream> {
        match &mut self.arrivals {
            Arrivals::Listener(_) => None,
            Arrivals::Connected(frontend) => frontend.take(),
        }
    }

    /// Whether this frontend is served here.
    pub(super) fn admit(&self, frontend: &UnixStream) -> io::Result<Result<(), Stranger>> {
        self.access.admit(frontend)
    }

    /// Whether the first frontend is the last.
    pub(super) fn is_for_one_frontend(&self) -> bool {
        matches!(self.origin, Origin::Connected(_))
    }
}

/// Whether the launcher has passed a descriptor. Where it has not, the number may be one of this
/// process's own descriptors by now, even a socket; those have FD_CLOEXEC, and no descriptor that
/// has come through execve(2) does.
#[expect(unsafe_code, reason = "a number that may be no descriptor")]
fn is_inherited(fd: RawFd) -> bool {
    // SAFETY: the call takes numbers only.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags != -1 && flags & libc::FD_CLOEXEC == 0
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Path(path) => write!(f, "{}", path.path().display()),
            Origin::Listening(fd) => write!(f, "listening descriptor {fd}"),
            Origin::Connected(fd) => write!(f, "connected descriptor {fd}"),
        }
    }
}
