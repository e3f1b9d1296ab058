//! How a state file is opened: locked, and only where nobody else can change it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, FlockOperation, OFlags, Statx, StatxFlags, fallocate, flock,
    statx,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use vm_memory::{FileOffset, MmapRegion};

use crate::file_system::FileSystem;
use crate::state::file::StateFileError;
use crate::state::file::layout::HEADER;

/// Who else may write: the group and all others.
const OTHERS_MAY_WRITE: u32 = 0o022;

/// Opens the file, or creates an empty one with mode 0600, and locks it.
pub(super) fn open_locked(path: &Path) -> Result<File, StateFileError> {
    // What the path names may be a device or a FIFO, whose opening may wait.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StateFileError::NoFolder(path.to_owned()),
            io::ErrorKind::IsADirectory => StateFileError::Foreign(path.to_owned()),
            _ if path.is_symlink() => StateFileError::Link(path.to_owned()),
            _ => StateFileError::io(path, "opening")(error),
        })?;
    let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    let stat = statx(&file, c"", AtFlags::EMPTY_PATH, mask)
        .map_err(|error| StateFileError::io(path, "examining")(error.into()))?;
    check(&stat, path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(StateFileError::InUse(path.to_owned())),
        Err(error) => Err(StateFileError::io(path, "locking")(error.into())),
    }
}

/// Refuses a file that another user can change, and one whose pages may come from elsewhere:
/// truncated under this process it would end it, a page that does not come would block it, and what
/// it says would not be this program's.
fn check(stat: &Statx, path: &Path) -> Result<(), StateFileError> {
    let path = path.to_owned();
    let mode = u32::from(stat.stx_mode);
    let (owner, user) = (stat.stx_uid, geteuid().as_raw());
    if FileType::from_raw_mode(mode) != FileType::RegularFile {
        return Err(StateFileError::Foreign(path));
    }
    if owner != user && owner != 0 {
        return Err(StateFileError::OtherOwner { path, owner, user });
    }
    if mode & OTHERS_MAY_WRITE != 0 {
        let mode = mode & 0o7777;
        return Err(StateFileError::Writable { path, mode });
    }
    match FileSystem::of(stat) {
        FileSystem::Far(kind) => Err(StateFileError::FarFileSystem { path, kind }),
        // In a chroot(2) its mount may be hidden, and a path is the launcher's word.
        FileSystem::Local | FileSystem::Unknown => Ok(()),
    }
}

/// The length of the file, bytes.
pub(super) fn len_of(file: &File, path: &Path) -> Result<u64, StateFileError> {
    let metadata = file.metadata();
    Ok(metadata
        .map_err(StateFileError::io(path, "examining"))?
        .len())
}

/// The first bytes of a file of this length, with zeros after its end.
pub(super) fn read_head(
    file: &File,
    len: u64,
    path: &Path,
) -> Result<[u8; HEADER], StateFileError> {
    let mut bytes = [0; HEADER];
    let present = bytes.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    let (present, _) = bytes.split_at_mut(present);
    file.read_exact_at(present, 0)
        .map_err(StateFileError::io(path, "reading"))?;
    Ok(bytes)
}

/// A shared mapping of the first `len` bytes.
pub(super) fn map(file: &File, len: usize, path: &Path) -> Result<MmapRegion, StateFileError> {
    let failed = || StateFileError::io(path, "mapping");
    let clone = file.try_clone().map_err(failed())?;
    MmapRegion::from_file(FileOffset::new(clone, 0), len)
        .map_err(|error| failed()(io::Error::other(error)))
}

/// Gives the first `len` bytes of the file their place in the file system, and makes the file at
/// least this long, in zeros: a store to a mapping that finds the file system full would be the end
/// of the process.
pub(super) fn reserve(file: &File, len: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Err(Errno::OPNOTSUPP) => {
            let old_len = file.metadata()?.len();
            file.write_all_at(&vec![0; len.saturating_sub(old_len) as usize], old_len)
        }
        allocated => Ok(allocated?),
    }
}
