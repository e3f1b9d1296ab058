//! The memory that a test's driver shares with the backend.

use std::fs::File;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Where the region lies in the addresses that descriptors have.
pub const REGION_GPA: u64 = 0x4000_0000;
/// Where it lies in the addresses of SET_VRING_ADDR: far from the other, so that a mix-up shows.
pub const REGION_VA: u64 = 0x7654_0000_0000;
/// Its length; the file is sparse.
pub const REGION_SIZE: u64 = 64 << 20;

/// The space of each ring at the start of the region.
pub(super) const RING_AREA: u64 = 0x1_0000;
/// The most rings.
const RINGS: u64 = 17;

/// A shared region: rings first, then buffers.
#[derive(Debug)]
pub struct Memory {
    file: File,
    map: GuestMemoryMmap<()>,
    /// Free ranges of buffer space, by address.
    free: Vec<(u64, u64)>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// A new region, all zero.
    ///
    /// # Panics
    ///
    /// If the system gives none.
    pub fn new() -> Self {
        let file = memfd_create("raw-driver", MemfdFlags::CLOEXEC).expect("memfd");
        let file = File::from(file);
        file.set_len(REGION_SIZE).expect("room in the memfd");
        let backing = FileOffset::new(file.try_clone().expect("dup"), 0);
        let region = (
            GuestAddress(REGION_GPA),
            REGION_SIZE as usize,
            Some(backing),
        );
        let map = GuestMemoryMmap::from_ranges_with_files([region]).expect("a mapping");
        let start = REGION_GPA + RINGS * RING_AREA;
        Memory {
            file,
            map,
            free: vec![(start, REGION_GPA + REGION_SIZE)],
        }
    }

    /// Another view of the same region, with the buffer space in the upper half of it.
    ///
    /// # Panics
    ///
    /// If the system gives none.
    pub fn sharing(other: &Self) -> Self {
        Memory {
            file: other.file.try_clone().expect("dup"),
            map: other.map.clone(),
            free: vec![(REGION_GPA + REGION_SIZE / 2, REGION_GPA + REGION_SIZE)],
        }
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The region, by guest-physical address.
    pub fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    /// Writes bytes.
    ///
    /// # Panics
    ///
    /// If the address is not in the region.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.map
            .write_slice(bytes, GuestAddress(at))
            .expect("an address in the region");
    }

    /// Reads bytes.
    ///
    /// # Panics
    ///
    /// If the address is not in the region.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("an address in the region");
        bytes
    }

    /// Allocates a buffer. An empty one has an address too.
    ///
    /// # Panics
    ///
    /// If none of that length is free.
    pub fn allocate(&mut self, len: usize) -> u64 {
        // Room after each, so that a write past its end does not hit another buffer.
        let len = (len as u64).next_multiple_of(16) + 16;
        let (start, _) = self
            .free
            .iter_mut()
            .find(|(start, end)| end - *start >= len)
            .expect("buffer space in the region");
        let at = *start;
        *start += len;
        at
    }

    /// Frees a buffer.
    pub fn release(&mut self, at: u64, len: usize) {
        let end = at + (len as u64).next_multiple_of(16) + 16;
        let index = self.free.partition_point(|(start, _)| *start < at);
        self.free.insert(index, (at, end));
        self.free.dedup_by(|later, earlier| {
            let touch = earlier.1 == later.0;
            if touch {
                earlier.1 = later.1;
            }
            touch
        });
    }
}
