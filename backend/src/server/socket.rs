//! Where frontends come from: a path, or a descriptor that the launcher passed.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::vhost_user::Listener;

/// Why there is no socket to serve on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something that is no socket is in the way.
    #[error("{} exists and is not a socket; remove it, or name another path", .0.display())]
    NotASocket(PathBuf),
    /// Another process listens there.
    #[error("another process listens on {}; name another path", .0.display())]
    InUse(PathBuf),
    /// Listening failed.
    #[error("listening on {} failed", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The descriptor is not open.
    #[error(
        "{option} {fd}: not an open descriptor; pass the number of one that this process inherits"
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
    listener: Listener,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    /// Bound by this process, which removes the path in the end.
    Path(PathBuf),
    /// Inherited, listening.
    Listening(RawFd),
    /// Inherited, connected: there is no second frontend.
    Connected(RawFd),
}

impl Socket {
    /// Listens at a path. A socket there on which no process listens is replaced.
    ///
    /// # Errors
    ///
    /// [`SocketError`] where the path is taken or the system refuses.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen {
            path: path.to_owned(),
            source,
        };
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(failed)?;
                }
                Ok(_) => return Err(SocketError::InUse(path.to_owned())),
                Err(error) => return Err(failed(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        Ok(Socket {
            listener: listener.into(),
            origin: Origin::Path(path.to_owned()),
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
    pub fn from_fd(option: &'static str, fd: RawFd) -> Result<Self, SocketError> {
        let link = format!("/proc/self/fd/{fd}");
        if fd < 0 || std::fs::symlink_metadata(link).is_err() {
            return Err(SocketError::NotOpen { option, fd });
        }
        // SAFETY: the descriptor is open, was passed on the command line for this purpose, and
        // nothing else in this process knows of it.
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
            // The crate would spin on a non-blocking listener.
            listener.set_nonblocking(false).map_err(adopt)?;
            Ok(Socket {
                listener: listener.into(),
                origin: Origin::Listening(fd),
            })
        } else {
            let listener = Listener::for_peer_of(UnixStream::from(owned)).map_err(adopt)?;
            Ok(Socket {
                listener,
                origin: Origin::Connected(fd),
            })
        }
    }

    pub(super) fn listener(&mut self) -> &mut Listener {
        &mut self.listener
    }

    /// Whether the first frontend is the last.
    pub(super) fn is_for_one_frontend(&self) -> bool {
        matches!(self.origin, Origin::Connected(_))
    }
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
            Origin::Path(path) => write!(f, "{}", path.display()),
            Origin::Listening(fd) => write!(f, "listening descriptor {fd}"),
            Origin::Connected(fd) => write!(f, "connected descriptor {fd}"),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Origin::Path(path) = &self.origin
            && let Err(error) = std::fs::remove_file(path)
        {
            log::warn!("Removing the socket {} failed: {error}", path.display());
        }
    }
}
