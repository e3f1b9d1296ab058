//! A path at which this process listens.
//!
//! Between finding that nobody listens at a path and listening there, another process could do the
//! same, and one of the two would never be reached. No system call replaces a socket only if it is
//! the one that was found, so a lock file beside the path, held meanwhile, keeps other processes of
//! this program out. A lock on the folder would need the permission to read it, and every process
//! with that permission could hold it.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::geteuid;

use crate::server::access::{Access, AccessError, path_of};
use crate::sys::{FileId, file_id, folder_of};

/// Why there is no listening at a path.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// Something that is no socket is in the way.
    #[error("{} exists and is not a socket; remove it, or name another path", .0.display())]
    NotASocket(PathBuf),
    /// Another process listens there, or is about to.
    #[error("another process listens on {}; name another path", .0.display())]
    InUse(PathBuf),
    /// The path does not fit into an address.
    #[error(
        "{} has {} bytes, and the path of a Unix socket at most {LONGEST}; name a shorter path, or \
         one relative to the working directory",
        .0.display(),
        .0.as_os_str().len()
    )]
    TooLong(PathBuf),
    /// There is no folder for the socket.
    #[error("{}: there is no folder {}; make the folder, or name another path", .0.display(), folder_of(.0).display())]
    NoFolder(PathBuf),
    /// This process may not make the socket.
    #[error(
        "{}: the user of this process (uid {user}) may not make a socket in {}; give that user the \
         folder, or name another path",
        path.display(),
        folder_of(path).display()
    )]
    Forbidden {
        /// Where.
        path: PathBuf,
        /// The process's effective user.
        user: u32,
        /// Why.
        source: io::Error,
    },
    /// A socket is there that this process may not connect to.
    #[error(
        "{} is a socket that the user of this process may not connect to; remove it if no process \
         listens there, or name another path",
        .0.display()
    )]
    NotOurs(PathBuf),
    /// Somebody has put another file in the place of the socket.
    #[error(
        "{}: another file took the socket's place at once; name a path in a folder that only this \
         process's user can write",
        .0.display()
    )]
    Replaced(PathBuf),
    /// The socket does not get its group or its mode.
    #[error("{}", path.display())]
    Access {
        /// Where.
        path: PathBuf,
        /// What failed.
        source: AccessError,
    },
    /// Listening failed.
    #[error("listening on {} failed", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Most bytes of a socket's path: `sun_path` has room for them and a NUL (unix(7)).
const LONGEST: usize = 107;

/// The longest queue of frontends that the host allows.
const QUEUE: i32 = i32::MAX;

impl PathError {
    /// Why the system refused to listen at this path.
    fn from_io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        let is_folder = folder_of(&path).is_dir();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory if !is_folder => {
                PathError::NoFolder(path)
            }
            io::ErrorKind::PermissionDenied => PathError::Forbidden {
                path,
                user: geteuid().as_raw(),
                source,
            },
            _ => PathError::Listen { path, source },
        }
    }
}

/// How often, and how long apart, the lock is tried for when the socket is removed. Another process
/// holds it for microseconds, unless it is stopped.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);

/// A socket's path, and which socket is ours. It is removed with this value, unless something
/// else is there by then.
#[derive(Debug)]
pub(super) struct BoundPath {
    path: PathBuf,
    id: FileId,
}

impl BoundPath {
    /// Listens at a path. A socket there on which no process listens is replaced. The new one is
    /// its owner's alone before it has what `access` says, and takes no connections before that.
    ///
    /// # Errors
    ///
    /// [`PathError`] where the path is taken or the system refuses.
    pub(super) fn listen(path: &Path, access: &Access) -> Result<(Self, UnixListener), PathError> {
        let failed = |source| PathError::from_io(path, source);
        if path.as_os_str().len() > LONGEST {
            return Err(PathError::TooLong(path.to_owned()));
        }
        is_stale(path)?;
        let Some(_lock) = Lock::take(path).map_err(failed)? else {
            return Err(PathError::InUse(path.to_owned()));
        };
        if is_stale(path)? {
            fs::remove_file(path).map_err(failed)?;
        }
        let socket = bind_private(path).map_err(failed)?;
        let (file, id) = own_file(path)?;
        match listen_with(&socket, &file, access, path) {
            Ok(()) => {
                let path = path.to_owned();
                Ok((BoundPath { path, id }, UnixListener::from(socket)))
            }
            Err(error) => {
                let _ = fs::remove_file(path);
                Err(error)
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn remove(&self) -> io::Result<()> {
        let mut lock = Lock::take(&self.path)?;
        for _ in 0..TRIES {
            if lock.is_some() {
                break;
            }
            std::thread::sleep(PAUSE);
            lock = Lock::take(&self.path)?;
        }
        if lock.is_none() {
            let text = "another process holds the lock beside it";
            return Err(io::Error::new(io::ErrorKind::WouldBlock, text));
        }
        if file_id(&self.path)? == self.id {
            fs::remove_file(&self.path)?;
        } else {
            log::info!(
                "{} is another file now and is not removed",
                self.path.display()
            );
        }
        Ok(())
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        match self.remove() {
            // Somebody has removed it, or the folder that it was in.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                log::warn!(
                    "Removing the socket {} failed: {error}",
                    self.path.display()
                );
            }
            Ok(()) => {}
        }
    }
}

/// A socket that is bound at a path, with a file that is its owner's alone.
fn bind_private(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Access::before_binding(&socket)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Listens on a bound socket whose file gets this group and mode first.
fn listen_with(
    socket: &OwnedFd,
    file: &File,
    access: &Access,
    path: &Path,
) -> Result<(), PathError> {
    access.open_up(file).map_err(|source| PathError::Access {
        path: path.to_owned(),
        source,
    })?;
    listen(socket, QUEUE).map_err(|source| PathError::from_io(path, source.into()))
}

/// The file of the socket that was bound at a path just now. The owner of the folder can put
/// another one there, which must not get this one's group and mode.
fn own_file(path: &Path) -> Result<(File, FileId), PathError> {
    let replaced = || PathError::Replaced(path.to_owned());
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOENT => replaced(),
        error => PathError::from_io(path, error.into()),
    })?;
    let file = File::from(file);
    let found = file
        .metadata()
        .map_err(|error| PathError::from_io(path, error))?;
    if !found.file_type().is_socket() || found.uid() != geteuid().as_raw() {
        return Err(replaced());
    }
    match is_listened_at(&path_of(&file)) {
        // Our own socket does not listen yet.
        Ok(false) => Ok((file, FileId::of(&found))),
        Err(error) if is_shortage(&error) => Err(PathError::from_io(path, error)),
        _ => Err(replaced()),
    }
}

/// Whether this process or the host has no more of what a system call needs.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS)
    )
}

/// Whether there is a socket at the path, at which no process listens.
fn is_stale(path: &Path) -> Result<bool, PathError> {
    let failed = |source| PathError::from_io(path, source);
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(PathError::NotASocket(path.to_owned())),
        Ok(_) => match is_listened_at(path) {
            Ok(true) => Err(PathError::InUse(path.to_owned())),
            Ok(false) => Ok(true),
            // It was removed just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Err(PathError::NotOurs(path.to_owned()))
            }
            Err(error) => Err(failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// Whether a process listens at this socket. Never waits for it: a socket with as many connections
/// as may wait there (EAGAIN) is in use, and so is one of another type (EPROTOTYPE).
fn is_listened_at(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Ok(true),
        Err(Errno::CONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A lock that this program takes to listen at a path or to remove it.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// The lock for this socket's path, unless another process has it.
    fn take(socket: &Path) -> io::Result<Option<Self>> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let file = open(&path, flags | OFlags::NONBLOCK, Mode::RUSR | Mode::WUSR)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            let file = File::from(file);
            let locked = FileId::of(&file.metadata()?);
            // The process that had it before has removed it.
            match file_id(&path) {
                Ok(id) if id == locked => return Ok(Some(Lock { path, _file: file })),
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is locked, so that it is nobody else's.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_many_that_find_a_stale_socket_listens_and_is_reached() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for _ in 0..200 {
            // As one that nobody listens at any more. A listener that is dropped still listens in a
            // child that another test has just started.
            drop(bind_private(&path).unwrap());
            let start = std::sync::Barrier::new(3);
            let bound: Vec<_> = std::thread::scope(|scope| {
                let starter = || {
                    start.wait();
                    BoundPath::listen(&path, &Access::default())
                };
                let starters = [(); 3].map(|()| scope.spawn(starter));
                let results = starters.map(|starter| starter.join().unwrap());
                results
                    .into_iter()
                    .filter_map(|result| match result {
                        Ok(bound) => Some(bound),
                        Err(PathError::InUse(_)) => None,
                        Err(error) => panic!("{error}"),
                    })
                    .collect()
            });
            let [(bound, listener)] = &bound[..] else {
                panic!("{} listen", bound.len());
            };
            assert_eq!(file_id(&path).unwrap(), bound.id);
            let _client = std::os::unix::net::UnixStream::connect(&path).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener.accept().unwrap();
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_socket_is_its_owners_alone_from_the_first_instant() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _socket = bind_private(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().mode();
        // Not 0755, as bind(2) makes it of the usual umask.
        assert_eq!(mode & 0o7777, 0o600);
        // Nor does it take connections before its group and mode are set.
        assert!(!is_listened_at(&path).unwrap());
    }

    #[test]
    fn a_file_that_took_the_sockets_place_does_not_get_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let refused = || matches!(own_file(&path), Err(PathError::Replaced(_)));
        assert!(refused(), "nothing is there");
        fs::write(&path, "precious").unwrap();
        assert!(refused(), "no socket is there");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/log", &path).unwrap();
        assert!(refused(), "a link is there");
        fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        assert!(refused(), "another process's socket is there");
        drop(other);
        fs::remove_file(&path).unwrap();
        let _socket = bind_private(&path).unwrap();
        assert!(own_file(&path).is_ok());
    }

    #[test]
    fn a_path_of_107_bytes_is_listened_at_and_a_longer_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let prefix = folder.path().as_os_str().len() + 1;
        let path = folder.path().join("x".repeat(LONGEST - prefix));
        let (bound, _listener) = BoundPath::listen(&path, &Access::default()).unwrap();
        assert_eq!(bound.path().as_os_str().len(), 107);
        let path = folder.path().join("x".repeat(LONGEST + 1 - prefix));
        let refused = BoundPath::listen(&path, &Access::default()).unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains("has 108 bytes") && text.contains("at most 107"),
            "{text}"
        );
    }

    #[test]
    fn a_path_that_is_being_bound_or_removed_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = Lock::take(&path).unwrap().unwrap();
        assert_eq!(fs::metadata(&lock.path).unwrap().mode() & 0o077, 0);
        let refused = BoundPath::listen(&path, &Access::default()).unwrap_err();
        assert!(matches!(refused, PathError::InUse(_)), "{refused}");
        drop(lock);
        BoundPath::listen(&path, &Access::default()).unwrap();
    }

    #[test]
    fn a_lock_file_that_was_left_behind_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = folder.path().join("socket.lock");
        File::create(&lock).unwrap();
        BoundPath::listen(&path, &Access::default()).unwrap();
        assert!(!lock.exists());
    }
}
