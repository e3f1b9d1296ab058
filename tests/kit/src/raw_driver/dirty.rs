//! The log of written pages (VHOST_USER_SET_LOG_BASE).

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostBackend;
use vhost::VhostUserDirtyLogRegion;
use vhost::vhost_user::Frontend;

use super::memory::{REGION_GPA, REGION_SIZE};

/// VHOST_LOG_PAGE.
const PAGE: u64 = 4_096;

/// One bit for each page up to the end of a [`Memory`](super::Memory).
const LEN: u64 = (REGION_GPA + REGION_SIZE).div_ceil(8 * PAGE);

/// A log in memory of its own.
#[derive(Debug)]
pub struct DirtyLog(File);

impl DirtyLog {
    /// A log with no page in it, known to the backend.
    ///
    /// # Panics
    ///
    /// If the backend refuses it.
    pub fn shared(control: &Frontend) -> Self {
        let file = File::from(memfd_create("dirty-log", MemfdFlags::CLOEXEC).expect("memfd"));
        file.set_len(LEN).expect("room in the memfd");
        let region = VhostUserDirtyLogRegion {
            mmap_size: LEN,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        let shared = control.set_log_base(0, Some(region));
        shared.expect("SET_LOG_BASE");
        DirtyLog(file)
    }

    /// The guest-physical addresses of the pages that were written since this was last asked.
    ///
    /// # Panics
    ///
    /// If the log cannot be read.
    pub fn taken(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; LEN as usize];
        self.0.read_exact_at(&mut bytes, 0).expect("the log");
        self.0
            .write_all_at(&vec![0; LEN as usize], 0)
            .expect("the log");
        let bits = (0..8 * LEN).filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1);
        bits.map(|page| page * PAGE).collect()
    }
}

/// The addresses of the pages in which these bytes lie.
pub fn pages(at: u64, len: u64) -> BTreeSet<u64> {
    let end = if len == 0 {
        0
    } else {
        (at + len).div_ceil(PAGE)
    };
    (at / PAGE..end).map(|page| page * PAGE).collect()
}
