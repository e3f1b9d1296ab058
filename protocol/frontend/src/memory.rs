//! The memory shared with the backend: one memfd, mapped once.
//!
//! Everything that [`Layout`] places is inside the region, so access by its offsets cannot fail.
//! The backend may write to all of it at any time: data is read once, into private memory, and
//! checked there. The memfd is sealed against resizing, so no access ever faults.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use crate::Error;

/// The region's address in both of vhost-user's address spaces. Any number works; this one reveals
/// nothing of the VMM's address space, and keeps 0 from being an address.
const BASE: u64 = 0x1_0000;

const PAGE: usize = 4096;

/// Allocates the region's bytes, from the front.
#[derive(Default)]
pub(crate) struct Layout {
    end: usize,
}

impl Layout {
    /// The offset of `len` bytes of its own, aligned to `align`.
    pub(crate) fn reserve(&mut self, len: usize, align: usize) -> usize {
        let start = self.end.next_multiple_of(align);
        self.end = start + len;
        start
    }
}

/// The shared region.
pub(crate) struct SharedMemory {
    region: MmapRegion,
    file: Arc<File>,
}

impl SharedMemory {
    /// A zeroed region that holds all of `layout`.
    pub(crate) fn new(layout: &Layout) -> Result<Self, Error> {
        let error = |source: std::io::Error| Error::Io {
            what: "create the shared memory",
            source,
        };
        let len = layout.end.next_multiple_of(PAGE);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd =
            rustix::fs::memfd_create("vhost-user-timer", flags).map_err(|e| error(e.into()))?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(|e| error(e.into()))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(|e| error(e.into()))?;
        let file = Arc::new(File::from(fd));
        let region = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), len)
            .map_err(|e| error(std::io::Error::other(e)))?;
        Ok(SharedMemory { region, file })
    }

    /// The region's row in SET_MEM_TABLE.
    pub(crate) fn region_info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: self.region.size() as u64,
            userspace_addr: BASE,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The backend's address of an offset.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        BASE + offset as u64
    }

    fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        self.region
            .get_slice(offset, len)
            .expect("the layout's offsets lie inside the region")
    }

    /// An index or flag that both sides access.
    pub(crate) fn atomic(&self, offset: usize) -> &AtomicU16 {
        self.region
            .get_atomic_ref(offset)
            .expect("the layout's offsets lie inside the region, aligned")
    }

    /// Words that the backend may write at any time.
    // Eight `get_atomic_ref`s instead make a reading of the time page 3 ns slower, of 51.
    #[expect(unsafe_code, reason = "vm-memory has no arrays of atomics")]
    pub(crate) fn words<const N: usize>(&self, offset: usize) -> &[AtomicU64; N] {
        let slice = self.slice(offset, size_of::<[AtomicU64; N]>());
        let words = slice.ptr_guard().as_ptr().cast::<[AtomicU64; N]>();
        assert!(words.is_aligned(), "the layout's offsets are aligned");
        // SAFETY: the slice's bytes stay mapped as long as this object, and the address is aligned.
        // Concurrent writes are allowed: the words are atomics.
        unsafe { &*words }
    }

    /// A futex that both sides access.
    pub(crate) fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        self.region
            .get_atomic_ref(offset)
            .expect("the layout's offsets lie inside the region, aligned")
    }

    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        self.slice(offset, bytes.len()).copy_from(bytes);
    }

    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.slice(offset, bytes.len()).copy_to(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backend_cannot_resize_the_region_under_the_vmm() {
        let mut layout = Layout::default();
        layout.reserve(1, 1);
        let memory = SharedMemory::new(&layout).unwrap();
        assert!(memory.file.set_len(0).is_err());
        assert!(memory.file.set_len(1 << 20).is_err());
    }

    #[test]
    fn reservations_are_aligned_and_apart() {
        let mut layout = Layout::default();
        assert_eq!(layout.reserve(3, 16), 0);
        assert_eq!(layout.reserve(8, 64), 64);
        assert_eq!(layout.reserve(2, 2), 72);
    }
}
