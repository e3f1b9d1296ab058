//! Closes descriptors that a peer sent.
//!
//! close(2) asks the server of a file on FUSE or on a network file system (the flush of every
//! close), and no signal ends that wait. A descriptor has to be closed even where it is refused, so
//! one that may wait is closed by a thread of its own: neither a connection nor the server waits
//! for it. Only the end of the process does, as the kernel has it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::thread;

use rustix::fs::{AtFlags, FileType, StatxFlags, fcntl_get_seals, statx};

use crate::file_system::FileSystem;
use crate::sys::lock;

/// How many descriptors may wait to be closed. A peer that sends more waits for them itself.
const MOST: usize = 16;

/// Descriptors that a peer sent. Dropping them never waits for a file system, unless
/// [`MOST`] others do.
#[derive(Debug, Default)]
pub(super) struct PeerFds(Vec<OwnedFd>);

impl PeerFds {
    pub(super) fn push(&mut self, fd: OwnedFd) {
        self.0.push(fd);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }

    /// Closes them.
    pub(super) fn clear(&mut self) {
        for fd in self.0.drain(..) {
            close(fd);
        }
    }
}

impl Drop for PeerFds {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Closes a descriptor that a peer sent, on another thread if that may wait.
pub(super) fn close(fd: OwnedFd) {
    if may_wait(fd.as_fd()) {
        CLOSING.hand_over(fd);
    }
}

/// Whether close(2) of it may wait for another process or host. Asks no file system.
fn may_wait(fd: BorrowedFd<'_>) -> bool {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let Ok(stat) = statx(fd, c"", flags, StatxFlags::TYPE | StatxFlags::MNT_ID) else {
        return true;
    };
    match FileType::from_raw_mode(stat.stx_mode.into()) {
        // An anonymous inode has no type.
        FileType::Fifo | FileType::Socket | FileType::Unknown => false,
        // A memfd has seals.
        _ => fcntl_get_seals(fd).is_err() && FileSystem::of(&stat) != FileSystem::Local,
    }
}

static CLOSING: Closing = Closing(Mutex::new(Waiting {
    descriptors: Vec::new(),
    has_thread: false,
}));

/// Descriptors that are closed by a thread, which is there while there are some.
struct Closing(Mutex<Waiting>);

struct Waiting {
    descriptors: Vec<OwnedFd>,
    has_thread: bool,
}

impl Closing {
    /// Closes it elsewhere, or here where that is not possible.
    fn hand_over(&'static self, fd: OwnedFd) {
        let mut waiting = lock(&self.0);
        if waiting.descriptors.len() >= MOST {
            drop(waiting);
            return drop(fd);
        }
        waiting.descriptors.push(fd);
        if !waiting.has_thread {
            let thread = thread::Builder::new().name("close".to_owned());
            waiting.has_thread = thread.spawn(|| self.close_all()).is_ok();
        }
    }

    /// One after the other: those behind one that waits are as likely to.
    fn close_all(&self) {
        loop {
            let mut waiting = lock(&self.0);
            let Some(fd) = waiting.descriptors.pop() else {
                waiting.has_thread = false;
                return;
            };
            drop(waiting);
            drop(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn files_of_file_systems_that_are_not_local_are_closed_elsewhere_and_no_others() {
        let local: [OwnedFd; 5] = [
            std::io::pipe().unwrap().0.into(),
            UnixStream::pair().unwrap().0.into(),
            eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            memfd_create("memory", MemfdFlags::CLOEXEC).unwrap(),
            File::open(std::env::current_exe().unwrap()).unwrap().into(),
        ];
        for fd in local {
            assert!(!may_wait(fd.as_fd()), "{fd:?}");
        }
        // As any file system whose files may come from elsewhere.
        let far = File::open("/proc/self/status").unwrap();
        assert!(may_wait(far.as_fd()));
    }

    #[test]
    fn what_is_handed_over_is_closed_and_the_thread_ends() {
        static CLOSING: Closing = Closing(Mutex::new(Waiting {
            descriptors: Vec::new(),
            has_thread: false,
        }));
        let (mut reader, writer) = std::io::pipe().unwrap();
        for _ in 0..3 * MOST {
            CLOSING.hand_over(writer.try_clone().unwrap().into());
        }
        CLOSING.hand_over(writer.into());
        // The end of the pipe: every descriptor is closed.
        assert_eq!(std::io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
        while lock(&CLOSING.0).has_thread {
            thread::yield_now();
        }
    }
}
