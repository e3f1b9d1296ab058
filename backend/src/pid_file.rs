//! The file that says which process this is (`--pid-file`).
//!
//! The process holds a lock on the file for as long as it lives, by which the next one knows a file
//! that was left behind (as QEMU does). A file appears whole, under its name: a launcher that waits
//! for the file never reads half of it.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use crate::sys::{FileId, file_id, folder_of};

/// Most bytes that are read. The longest number has 10, and an end of its line.
const LONGEST: u64 = 32;

/// Why there is no such file.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    /// Another process is the one that the file names.
    #[error(
        "--pid-file {}: another process has this file{}; name another file",
        path.display(),
        pid.as_deref().map(|pid| format!(", {pid}")).unwrap_or_default()
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// What the file says.
        pid: Option<String>,
    },
    /// Something else is there.
    #[error(
        "--pid-file {}: what is there is not the number of a process; remove it, or name another \
         file",
        .0.display()
    )]
    Foreign(PathBuf),
    /// There is no folder for the file.
    #[error(
        "--pid-file {}: there is no folder {}; make the folder, or name another file",
        .0.display(),
        folder_of(.0).display()
    )]
    NoFolder(PathBuf),
    /// The system refuses.
    #[error("--pid-file {}: writing it failed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The file, which is removed with this value, unless another file is there by then.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    id: FileId,
    /// Holds the lock.
    _file: File,
}

impl PidFile {
    /// Writes this process's number and a line's end to a new file, mode 0644 less the umask. A
    /// file that a process has left behind is replaced; nothing else is, and no link is followed.
    ///
    /// # Errors
    ///
    /// [`PidFileError`] where something else is there, or the system refuses.
    pub fn write(path: &Path) -> Result<Self, PidFileError> {
        let failed = |source| PidFileError::Io {
            path: path.to_owned(),
            source,
        };
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        let beside = PathBuf::from(beside);
        // Of a process that had the same number.
        let _ = fs::remove_file(&beside);
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&beside)
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                    if !folder_of(path).is_dir() =>
                {
                    PidFileError::NoFolder(path.to_owned())
                }
                _ => failed(error),
            })?;
        let written = writeln!(file, "{}", std::process::id())
            .and_then(|()| Ok(flock(&file, FlockOperation::NonBlockingLockExclusive)?))
            .map_err(failed)
            .and_then(|()| place(&beside, path));
        // Gone already where it was renamed.
        let _ = fs::remove_file(&beside);
        written?;
        let id = file_id(path).map_err(failed)?;
        let path = path.to_owned();
        Ok(PidFile {
            path,
            id,
            _file: file,
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|id| id == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Gives a file its name, where nothing or a file without a process has that name.
fn place(file: &Path, path: &Path) -> Result<(), PidFileError> {
    let failed = |source| PidFileError::Io {
        path: path.to_owned(),
        source,
    };
    loop {
        let placed = match left_behind(path)? {
            // Two that find nothing do not both succeed.
            None => fs::hard_link(file, path),
            // The lock keeps others from doing the same.
            Some(_locked) => fs::rename(file, path),
        };
        match placed {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            placed => return placed.map_err(failed),
        }
    }
}

/// The file of a process that is no more, locked; none where there is no file.
fn left_behind(path: &Path) -> Result<Option<File>, PidFileError> {
    let failed = |source| PidFileError::Io {
        path: path.to_owned(),
        source,
    };
    let foreign = || PidFileError::Foreign(path.to_owned());
    // What the path names may be a FIFO, whose opening waits.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    loop {
        let mut options = File::options();
        let options = options.read(true).custom_flags(flags.bits().cast_signed());
        let file = match options.open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
                return Err(foreign());
            }
            // A socket.
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
                return Err(foreign());
            }
            Err(error) => return Err(failed(error)),
        };
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(foreign());
        }
        let mut text = String::new();
        let read = (&file).take(LONGEST).read_to_string(&mut text);
        let pid = text.trim_end();
        let is_number = pid.bytes().all(|byte| byte.is_ascii_digit()) && pid.len() <= 10;
        if read.is_err() || !is_number {
            return Err(foreign());
        }
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(PidFileError::InUse {
                    path: path.to_owned(),
                    pid: (!pid.is_empty()).then(|| pid.to_owned()),
                });
            }
            Err(error) => return Err(failed(error.into())),
        }
        // Unless the process has removed it before its end gave up the lock.
        let locked = file.metadata().map_err(failed)?;
        match file_id(path) {
            Ok(id) if id == FileId::of(&locked) => return Ok(Some(file)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn own() -> String {
        format!("{}\n", std::process::id())
    }

    #[test]
    fn the_file_has_the_number_and_goes_with_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let file = PidFile::write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), own());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_was_left_behind_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        for left in ["", "1\n", "4194304"] {
            fs::write(&path, left).unwrap();
            let reader = File::open(&path).unwrap();
            let _file = PidFile::write(&path).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), own());
            // Replaced, and not written over.
            assert_eq!(io::read_to_string(reader).unwrap(), left);
        }
    }

    #[test]
    fn the_file_of_a_process_that_lives_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let _file = PidFile::write(&path).unwrap();
        let text = PidFile::write(&path).unwrap_err().to_string();
        assert_eq!(
            text,
            format!(
                "--pid-file {}: another process has this file, {}; name another file",
                path.display(),
                std::process::id()
            )
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_the_number_of_a_process_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let refused = || matches!(PidFile::write(&path), Err(PidFileError::Foreign(_)));
        for precious in [
            "precious",
            "1\n2\n",
            "\u{661}",
            "12345678901",
            &"1".repeat(33),
        ] {
            fs::write(&path, precious).unwrap();
            assert!(refused(), "{precious}");
            assert_eq!(fs::read_to_string(&path).unwrap(), precious);
        }
        fs::remove_file(&path).unwrap();
        symlink("/etc/hostname", &path).unwrap();
        assert!(refused(), "a link");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(refused(), "a folder");
        fs::remove_dir(&path).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(refused(), "a socket");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_took_its_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let file = PidFile::write(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn of_many_that_find_a_file_that_was_left_behind_or_none_one_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        for round in 0..100 {
            if round % 2 == 0 {
                fs::write(&path, "1\n").unwrap();
            }
            let start = std::sync::Barrier::new(3);
            let placed = std::thread::scope(|scope| {
                let starter = |number: usize| {
                    let (start, path) = (&start, &path);
                    let own = folder.path().join(number.to_string());
                    scope.spawn(move || {
                        let file = File::create(&own).unwrap();
                        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
                        start.wait();
                        let placed = place(&own, path);
                        let _ = fs::remove_file(&own);
                        placed.is_ok().then_some(file)
                    })
                };
                let starters = [1, 2, 3].map(starter);
                starters.map(|starter| starter.join().unwrap())
            });
            assert_eq!(placed.iter().flatten().count(), 1, "round {round}");
            drop(placed);
            fs::remove_file(&path).unwrap();
        }
    }
}
