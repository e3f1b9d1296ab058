//! The driver's side of one split virtqueue (virtio 1.2 §2.7).
//!
//! Guarantees: a chain's memory is visible to the device before the chain is available; a requested
//! notification is never omitted and an unwanted one never sent; and whatever the device writes,
//! every head that [`DriverRing::pop`] returns was posted and not used yet, with a length that
//! fits. The buffers that the descriptors point to are the caller's.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use crate::error::RingFault;
use crate::memory::{Layout, SharedMemory};

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR: usize = 16;

/// The device may write to this descriptor's buffer.
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// Another descriptor follows.
pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

// Keeps the two sides' writes in different cache lines.
const CACHE_LINE: usize = 64;

/// Where a ring's three areas are.
#[derive(Clone, Copy)]
pub(crate) struct RingLayout {
    /// Number of descriptors; a power of two.
    pub(crate) size: u16,
    pub(crate) descriptors: usize,
    pub(crate) avail: usize,
    pub(crate) used: usize,
}

impl RingLayout {
    pub(crate) fn reserve(layout: &mut Layout, size: u16) -> Self {
        let n = usize::from(size);
        RingLayout {
            size,
            descriptors: layout.reserve(DESCRIPTOR * n, CACHE_LINE),
            avail: layout.reserve(6 + 2 * n, CACHE_LINE),
            used: layout.reserve(6 + 8 * n, CACHE_LINE),
        }
    }

    fn avail_idx(&self) -> usize {
        self.avail + 2
    }

    fn avail_entry(&self, index: u16) -> usize {
        self.avail + 4 + 2 * usize::from(index % self.size)
    }

    fn used_event(&self) -> usize {
        self.avail + 4 + 2 * usize::from(self.size)
    }

    pub(crate) fn used_idx(&self) -> usize {
        self.used + 2
    }

    fn used_entry(&self, index: u16) -> usize {
        self.used + 4 + 8 * usize::from(index % self.size)
    }

    fn avail_event(&self) -> usize {
        self.used + 4 + 8 * usize::from(self.size)
    }
}

/// A chain that the device is done with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Used {
    /// The chain's first descriptor.
    pub(crate) head: u16,
    /// Bytes that the device reports as written; at most the chain's room.
    pub(crate) len: u32,
}

/// The driver's side of a ring.
pub(crate) struct DriverRing {
    memory: Arc<SharedMemory>,
    layout: RingLayout,
    event_idx: bool,
    /// avail.idx when everything pushed is published.
    next_avail: u16,
    /// avail.idx as the device sees it.
    published: u16,
    next_used: u16,
    /// Chains that the device has and has not used yet.
    in_flight: u16,
    /// By head: the bytes that the device may write to the chain posted there.
    posted: Box<[Option<u32>]>,
}

impl DriverRing {
    /// A ring whose first entry goes to index `start`.
    pub(crate) fn new(
        memory: Arc<SharedMemory>,
        layout: RingLayout,
        event_idx: bool,
        start: u16,
    ) -> Self {
        let mut ring = DriverRing {
            memory,
            layout,
            event_idx,
            next_avail: start,
            published: start,
            next_used: start,
            in_flight: 0,
            posted: vec![None; usize::from(layout.size)].into(),
        };
        ring.restart(start);
        ring
    }

    /// Forgets everything posted, for a device that does not have the ring yet. It begins at index
    /// `start`. The descriptors stay.
    pub(crate) fn restart(&mut self, start: u16) {
        self.next_avail = start;
        self.published = start;
        self.next_used = start;
        self.in_flight = 0;
        self.posted.fill(None);
        self.store(self.layout.avail_idx(), start, Ordering::Relaxed);
        self.store(self.layout.used_idx(), start, Ordering::Relaxed);
        // What the previous device asked for about notifications.
        self.store(self.layout.used, 0, Ordering::Relaxed);
        self.store(self.layout.avail_event(), start, Ordering::Relaxed);
        // With EVENT_IDX the flag has no meaning.
        self.store(self.layout.avail, 0, Ordering::Relaxed);
        self.disarm();
    }

    fn load(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.memory.atomic(offset).load(order))
    }

    fn store(&self, offset: usize, value: u16, order: Ordering) {
        self.memory.atomic(offset).store(value.to_le(), order);
    }

    /// The offset of descriptor `index` of the ring's own table.
    pub(crate) fn descriptor(&self, index: u16) -> usize {
        self.layout.descriptors + DESCRIPTOR * usize::from(index)
    }

    /// Adds the chain at `head` to the next [`publish`](Self::publish). The device may write
    /// `writable` bytes of it. The head must not be posted already.
    pub(crate) fn push(&mut self, head: u16, writable: u32) {
        let free = self.posted[usize::from(head)].replace(writable).is_none();
        debug_assert!(free, "descriptor {head} is posted already");
        let entry = self.layout.avail_entry(self.next_avail);
        self.store(entry, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// How many chains are pushed and not published yet.
    pub(crate) fn unpublished(&self) -> u16 {
        self.next_avail.wrapping_sub(self.published)
    }

    /// Makes everything pushed available to the device. Returns whether to notify it.
    pub(crate) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_avail);
        if old == new {
            return false;
        }
        self.store(self.layout.avail_idx(), new, Ordering::Release);
        self.in_flight = self.in_flight.saturating_add(new.wrapping_sub(old));
        self.published = new;
        // Store avail.idx, then load avail_event or flags; the device stores those and then
        // loads avail.idx (§2.7.13.3.1). One of the two sees the other's.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(self.layout.avail_event(), Ordering::Relaxed);
            // §2.7.10: whether `event` lies in old..new, modulo 2^16.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = self.load(self.layout.used, Ordering::Relaxed);
            u32::from(flags) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// The next chain that the device is done with.
    ///
    /// # Errors
    ///
    /// The device broke the rules; the ring is unusable from then on.
    pub(crate) fn pop(&mut self) -> Result<Option<Used>, RingFault> {
        // Acquire: the entry and the buffers were written before the index.
        let used_idx = self.load(self.layout.used_idx(), Ordering::Acquire);
        let waiting = used_idx.wrapping_sub(self.next_used);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.in_flight {
            return Err(RingFault::UsedIndex {
                used: waiting,
                in_flight: self.in_flight,
            });
        }
        let mut entry = [0; 8];
        self.memory
            .read(self.layout.used_entry(self.next_used), &mut entry);
        let [i0, i1, i2, i3, l0, l1, l2, l3] = entry;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let posted = u16::try_from(id).ok().and_then(|head| {
            let writable = self.posted.get_mut(usize::from(head))?.take()?;
            Some((head, writable))
        });
        let Some((head, writable)) = posted else {
            return Err(RingFault::UsedId { id });
        };
        if len > writable {
            return Err(RingFault::UsedLen { id, len, writable });
        }
        self.next_used = self.next_used.wrapping_add(1);
        self.in_flight -= 1;
        Ok(Some(Used { head, len }))
    }

    /// Asks for a call at the next used chain. Returns whether there is one already: then the call
    /// may never come, and [`pop`](Self::pop) is next.
    #[must_use]
    pub(crate) fn arm(&mut self) -> bool {
        if self.event_idx {
            self.store(self.layout.used_event(), self.next_used, Ordering::Relaxed);
        } else {
            self.store(self.layout.avail, 0, Ordering::Relaxed);
        }
        // Pairs with the device's fence, as in `publish`.
        fence(Ordering::SeqCst);
        self.load(self.layout.used_idx(), Ordering::Relaxed) != self.next_used
    }

    /// Asks for no call. One may come even so.
    pub(crate) fn disarm(&mut self) {
        if self.event_idx {
            let far = self.next_used.wrapping_sub(1);
            self.store(self.layout.used_event(), far, Ordering::Relaxed);
        } else {
            let flag = VRING_AVAIL_F_NO_INTERRUPT as u16;
            self.store(self.layout.avail, flag, Ordering::Relaxed);
        }
    }
}

/// The bytes of a descriptor.
pub(crate) fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; DESCRIPTOR] {
    let mut bytes = [0; DESCRIPTOR];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests;
