//! Whether a file can be memory that the backend touches: the kind of file, its file system, and
//! its length, before anything of it is mapped.
//!
//! A page fault waits for the file system. One whose files come from another process or host (FUSE,
//! NFS and others) lets that peer block a thread of ours in a fault that no signal ends, so only
//! file systems of this host's kernel are accepted. Nothing here may wait for a file system either:
//! fstat(2) and fstatfs(2) ask a FUSE server, so neither is called before the answer is known to be
//! local.
//!
//! A file that shrinks later, or has no room for a page, is caught when it is touched: see `trap`.

use std::fmt::Write as _;
use std::os::fd::BorrowedFd;

use rustix::fs::{
    AtFlags, FileType, OFlags, StatxFlags, fcntl_get_seals, fcntl_getfl, fstatfs, statx,
};
use rustix::param::page_size;

use super::Refusal;
use crate::file_system::FileSystem;

/// How many regions a frontend may share at most: what the crate announces.
const MAX_REGIONS: u64 = 509;

/// Descriptors that the process keeps for everything but memory regions.
const OTHER_DESCRIPTORS: u64 = 128;

/// HUGETLBFS_MAGIC (linux/magic.h).
const HUGETLBFS: u64 = 0x9584_58f6;

/// How many regions each of `sockets` frontends may share, where the process may have
/// `descriptors` (RLIMIT_NOFILE): a region keeps one, and the frontends share them evenly.
pub(in crate::vhost_user) fn region_limit(descriptors: u64, sockets: u64) -> u64 {
    let free = descriptors.saturating_sub(OTHER_DESCRIPTORS);
    (free / sockets.max(1)).clamp(1, MAX_REGIONS)
}

/// Whether `len` bytes from `offset` of the file can be a memory region.
///
/// # Errors
///
/// A [`Refusal`] where touching them could block or fault.
pub(in crate::vhost_user) fn check_region(
    file: BorrowedFd<'_>,
    offset: u64,
    len: u64,
) -> Result<(), Refusal> {
    check(file, offset, len).map_err(|why| Refusal(format!("the memory region's file {why}")))
}

/// Whether `len` bytes from `offset` of the file can be the dirty log.
///
/// # Errors
///
/// A [`Refusal`] where touching them could block or fault.
pub(in crate::vhost_user) fn check_log(
    file: BorrowedFd<'_>,
    offset: u64,
    len: u64,
) -> Result<(), Refusal> {
    check(file, offset, len).map_err(|why| Refusal(format!("the dirty log's file {why}")))
}

fn check(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), String> {
    // Only tmpfs and hugetlbfs have seals, and the kernel knows that without asking anybody.
    let in_memory = fcntl_get_seals(file).is_ok();
    // Without DONT_SYNC a network file system asks its server.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let mask = StatxFlags::TYPE | StatxFlags::SIZE | StatxFlags::MNT_ID;
    let stat = statx(file, c"", flags, mask)
        .map_err(|error| format!("cannot be examined: {error}; send a memfd"))?;
    match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::RegularFile => {}
        kind => return Err(format!("is {}; send a memfd", name_of(kind))),
    }
    if !in_memory {
        check_file_system(FileSystem::of(&stat))?;
    }
    let access = fcntl_getfl(file).map_err(|error| format!("cannot be examined: {error}"))?;
    if access & OFlags::RWMODE != OFlags::RDWR {
        return Err("is not open for reading and writing; open it with O_RDWR".to_owned());
    }
    let page = if in_memory {
        page_of(file)
    } else {
        page_size() as u64
    };
    check_length(stat.stx_size, offset, len, page)
}

fn check_file_system(file_system: FileSystem) -> Result<(), String> {
    match file_system {
        FileSystem::Local => Ok(()),
        FileSystem::Far(kind) => Err(format!(
            "lies on {kind}, whose pages may come from another process or host; send a memfd or a \
             file on tmpfs, hugetlbfs or a local disk"
        )),
        FileSystem::Unknown => Err(
            "lies on a file system that is not mounted where the backend can see it, so that its \
             pages may come from another process or host; send a memfd, or mount the file system \
             in the backend's mount namespace"
                .to_owned(),
        ),
    }
}

/// As a sentence has it.
fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a directory",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::Symlink => "a symbolic link",
        FileType::RegularFile => "a regular file",
        FileType::Unknown => "no file but a kernel object",
    }
}

/// What a mapping of this file of tmpfs or hugetlbfs consists of: the huge page's size where it has
/// some, bytes.
fn page_of(file: BorrowedFd<'_>) -> u64 {
    match fstatfs(file) {
        Ok(stat) if stat.f_type as u64 == HUGETLBFS => stat.f_bsize as u64,
        _ => page_size() as u64,
    }
}

/// `size` is the file's, `page` what its mapping consists of, bytes.
fn check_length(size: u64, offset: u64, len: u64, page: u64) -> Result<(), String> {
    if len == 0 {
        return Err("is to be mapped with length 0; send a length".to_owned());
    }
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(format!(
            "has {size:#x} bytes, and {len:#x} from offset {offset:#x} are to be mapped; extend the \
             file before sending it"
        ));
    }
    let mut why = String::new();
    // The crate unmaps the length that was sent; the kernel unmaps no part of a huge page.
    let huge = page > page_size() as u64;
    if !offset.is_multiple_of(page) {
        let _ = write!(why, "is to be mapped from offset {offset:#x}");
    } else if huge && !len.is_multiple_of(page) {
        let _ = write!(why, "is to be mapped for {len:#x} bytes");
    }
    if why.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{why}; send a multiple of its page size, {page:#x}"
    ))
}

#[cfg(test)]
mod tests;
