//! The shared memory while a ring is served, with the last region cached: an address near the
//! previous one is found without a search.
//!
//! Every access is checked against the region that it goes to. The peer may write to all of the
//! memory at any time: what is read here is read once, into private memory, and judged there.

use std::sync::atomic::{AtomicU16, Ordering};

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice,
};

/// Bytes of the shared memory.
type Slice<'a, B> = VolatileSlice<'a, BS<'a, B>>;

/// The memory, and the region that was used last: a chain's buffers usually lie in one.
pub(crate) struct RegionCache<'a, B: Bitmap + 'static> {
    mem: &'a GuestMemoryMmap<B>,
    last: Option<&'a GuestRegionMmap<B>>,
}

impl<'a, B: Bitmap + 'static> RegionCache<'a, B> {
    pub(crate) fn new(mem: &'a GuestMemoryMmap<B>) -> Self {
        RegionCache { mem, last: None }
    }

    /// The bytes, where one region has them all.
    fn slice(&mut self, at: GuestAddress, len: usize) -> Option<Slice<'a, B>> {
        if let Some(region) = self.last
            && let Some(slice) = slice_of(region, at, len)
        {
            return Some(slice);
        }
        let region = self.mem.find_region(at)?;
        self.last = Some(region);
        slice_of(region, at, len)
    }

    /// Whether all of these bytes are shared.
    pub(crate) fn has(&mut self, at: GuestAddress, len: usize) -> bool {
        len == 0 || self.slice(at, len).is_some() || self.mem.check_range(at, len)
    }

    /// Copies bytes out. False where some of them are not shared.
    pub(crate) fn read(&mut self, at: GuestAddress, bytes: &mut [u8]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        match self.slice(at, bytes.len()) {
            Some(slice) => slice.copy_to(bytes) == bytes.len(),
            // Another region may follow where this one ends.
            None => self.mem.read_slice(bytes, at).is_ok(),
        }
    }

    /// Copies bytes in. False where some of their places are not shared.
    pub(crate) fn write(&mut self, at: GuestAddress, bytes: &[u8]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        match self.slice(at, bytes.len()) {
            Some(slice) => {
                slice.copy_from(bytes);
                true
            }
            None => self.mem.write_slice(bytes, at).is_ok(),
        }
    }

    /// An area of a ring; `None` where no region has all of it.
    pub(crate) fn ring_area(&mut self, at: u64, len: usize) -> Option<RingArea<'a, B>> {
        let at = GuestAddress(at);
        self.slice(at, len)?;
        let region = self.last?;
        let start = usize::try_from(offset_in(region, at)?).ok()?;
        Some(RingArea { region, start, len })
    }
}

fn offset_in<B: Bitmap>(region: &GuestRegionMmap<B>, at: GuestAddress) -> Option<u64> {
    at.0.checked_sub(region.start_addr().0)
}

fn slice_of<B: Bitmap>(
    region: &GuestRegionMmap<B>,
    at: GuestAddress,
    len: usize,
) -> Option<Slice<'_, B>> {
    let offset = MemoryRegionAddress(offset_in(region, at)?);
    region.get_slice(offset, len).ok()
}

/// An area of a ring: its available or its used ring.
pub(crate) struct RingArea<'a, B: Bitmap + 'static> {
    region: &'a GuestRegionMmap<B>,
    start: usize,
    len: usize,
}

impl<'a, B: Bitmap + 'static> RingArea<'a, B> {
    /// The field at this offset; `None` past the area's end.
    pub(crate) fn field(&self, offset: usize) -> Option<SharedU16<'a, B>> {
        (offset.checked_add(size_of::<u16>())? <= self.len).then_some(())?;
        let at = self.start.checked_add(offset)?;
        Some(SharedU16 {
            value: self.region.get_atomic_ref(at).ok()?,
            region: self.region,
            at,
        })
    }

    fn entries(&self, offset: usize, len: usize) -> Option<Slice<'a, B>> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then_some(())?;
        let mapping: &'a MmapRegion<B> = self.region;
        VolatileMemory::get_slice(mapping, self.start.checked_add(offset)?, len).ok()
    }

    /// Copies entries out; nothing past the area's end.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) {
        if let Some(slice) = self.entries(offset, bytes.len()) {
            slice.copy_to(bytes);
        }
    }

    /// Copies entries in; nothing past the area's end.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        if let Some(slice) = self.entries(offset, bytes.len()) {
            slice.copy_from(bytes);
        }
    }
}

/// An index or flags in memory that both sides use.
pub(crate) struct SharedU16<'a, B: Bitmap + 'static> {
    value: &'a AtomicU16,
    region: &'a GuestRegionMmap<B>,
    at: usize,
}

impl<'a, B: Bitmap + 'static> SharedU16<'a, B> {
    /// As it is in memory, little-endian.
    pub(crate) fn value(&self) -> &'a AtomicU16 {
        self.value
    }

    pub(crate) fn load(&self, order: Ordering) -> u16 {
        u16::from_le(self.value.load(order))
    }

    pub(crate) fn store(&self, value: u16, order: Ordering) {
        self.value.store(value.to_le(), order);
        let mapping: &MmapRegion<B> = self.region;
        mapping.bitmap().mark_dirty(self.at, size_of::<u16>());
    }
}

#[cfg(test)]
mod tests;
