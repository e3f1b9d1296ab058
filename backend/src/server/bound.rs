//! A path at which this process listens.
//!
//! Between finding that nobody listens at a path and listening there, another process could do the
//! same, and one of the two would never be reached. No system call replaces a socket only if it is
//! the one that was found, so a lock file beside the path, held meanwhile, keeps other processes of
//! this program out. A lock on the folder would need the permission to read it, and every process
//! with that permission could hold it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Why there is no listening at a path.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// Something that is no socket is in the way.
    #[error("{} exists and is not a socket; remove it, or name another path", .0.display())]
    NotASocket(PathBuf),
    /// Another process listens there, or is about to.
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

/// What a file is, whatever its name.
type FileId = (u64, u64);

impl BoundPath {
    /// Listens at a path. A socket there on which no process listens is replaced.
    ///
    /// # Errors
    ///
    /// [`PathError`] where the path is taken or the system refuses.
    pub(super) fn listen(path: &Path) -> Result<(Self, UnixListener), PathError> {
        let failed = |source| PathError::Listen {
            path: path.to_owned(),
            source,
        };
        is_stale(path)?;
        let Some(_lock) = Lock::take(path).map_err(failed)? else {
            return Err(PathError::InUse(path.to_owned()));
        };
        if is_stale(path)? {
            fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let id = file_id(path).map_err(failed)?;
        let path = path.to_owned();
        Ok((BoundPath { path, id }, listener))
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

fn file_id(path: &Path) -> io::Result<FileId> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Whether there is a socket at the path, at which no process listens.
fn is_stale(path: &Path) -> Result<bool, PathError> {
    let failed = |source| PathError::Listen {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(PathError::NotASocket(path.to_owned())),
        Ok(_) => match is_listened_at(path) {
            Ok(true) => Err(PathError::InUse(path.to_owned())),
            Ok(false) => Ok(true),
            // It was removed just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
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
            let locked = fstat(&file)?;
            // The process that had it before has removed it.
            match file_id(&path) {
                Ok(id) if id == (locked.st_dev, locked.st_ino) => {
                    let _file = File::from(file);
                    return Ok(Some(Lock { path, _file }));
                }
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
            drop(UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(3);
            let bound: Vec<_> = std::thread::scope(|scope| {
                let starter = || {
                    start.wait();
                    BoundPath::listen(&path)
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
    fn a_path_that_is_being_bound_or_removed_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = Lock::take(&path).unwrap().unwrap();
        let refused = BoundPath::listen(&path).unwrap_err();
        assert!(matches!(refused, PathError::InUse(_)), "{refused}");
        drop(lock);
        BoundPath::listen(&path).unwrap();
    }

    #[test]
    fn a_lock_file_that_was_left_behind_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = folder.path().join("socket.lock");
        File::create(&lock).unwrap();
        BoundPath::listen(&path).unwrap();
        assert!(!lock.exists());
    }
}
