//! Descriptors that a frontend can hand over, good and bad.

use std::fs::File;
use std::io::{PipeWriter, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};

/// A memfd of this length, all holes.
///
/// # Panics
///
/// If the system gives none.
pub fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("hostile", MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(len).expect("a length");
    file
}

/// A memfd of this length of huge pages, none of which is reserved: where the host has none, the
/// first access raises SIGBUS.
///
/// # Panics
///
/// If the system gives none.
pub fn huge_memfd(len: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(memfd_create("huge", flags).expect("memfd"));
    file.set_len(len).expect("a length");
    file
}

/// An eventfd with this count, whose reads and writes block.
///
/// # Panics
///
/// If the system gives none.
pub fn blocking_eventfd(count: u32) -> OwnedFd {
    eventfd(count, EventfdFlags::CLOEXEC).expect("eventfd")
}

/// A blocking eventfd that takes no more.
///
/// # Panics
///
/// If the system gives none.
pub fn full_eventfd() -> OwnedFd {
    let full = blocking_eventfd(0);
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).expect("a write");
    full
}

/// Takes O_NONBLOCK away. It is a flag of the open file description, which the backend shares.
///
/// # Panics
///
/// If the system refuses.
pub fn make_blocking(fd: impl AsFd) {
    let flags = fcntl_getfl(&fd).expect("F_GETFL");
    fcntl_setfl(fd, flags & !OFlags::NONBLOCK).expect("F_SETFL");
}

/// Writes until no more fits.
///
/// # Panics
///
/// If the system refuses.
pub fn fill(pipe: &mut PipeWriter) {
    let flags = fcntl_getfl(&*pipe).expect("F_GETFL");
    fcntl_setfl(&*pipe, flags | OFlags::NONBLOCK).expect("F_SETFL");
    while pipe.write(&[0; 4096]).is_ok() {}
    fcntl_setfl(&*pipe, flags).expect("F_SETFL");
}
