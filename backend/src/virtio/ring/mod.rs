//! A split ring (virtio 1.2 §2.7) while it is served: chains out of it, used entries into it, and
//! whether the driver wants to be notified of that.
//!
//! One read of the available index finds a batch of chains; what is given back of it is published
//! together, with one store of the used index. While the ring is served the driver is asked not to
//! kick; when nothing is left it is asked to. Notifying the driver is left to the caller, who does
//! so without any lock: writing to a descriptor of the driver's may block.
//!
//! A ring is memory that the driver owns, so nothing in it is trusted: a ring with impossible
//! indices is stopped, not retried, and the frontend can start it again.

use std::fmt::Display;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::virtio::budget::{self, Budget};
use crate::virtio::chain::{Chain, ChainBuffer, Segment, scatter};
use crate::virtio::region_cache::{RegionCache, RingArea, SharedU16};

/// How many chains one read of the available index finds at most.
const BATCH: usize = budget::CHAINS;

/// The driver does not want notifications (virtq_avail.flags).
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
/// The device does not want kicks (virtq_used.flags).
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// Where entries begin in the available and the used ring, and the size of each.
const ENTRIES: usize = 4;
const AVAIL_ENTRY: usize = size_of::<u16>();
const USED_ENTRY: usize = 8;

/// A ring's state as the transport keeps it, while it is locked.
pub(crate) trait LockedQueue {
    /// Addresses, size, indices and whether it is started.
    fn queue(&self) -> &Queue;

    /// The same, to be changed.
    fn queue_mut(&mut self) -> &mut Queue;
}

/// What happens when a ring has nothing more to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenIdle {
    /// The driver is asked to kick.
    AskForKick,
    /// The ring is polled: the driver still need not kick.
    KeepPolling,
}

/// Why serving a ring stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Nothing is left to serve, or nothing that may be.
    Drained,
    /// A request had effects that must be carried out before the next.
    EffectsPending,
    /// The [`budget`] is spent; there may be more.
    BatchFull,
}

/// What is under way on the ring that is being served. Reused from one ring to the next.
#[derive(Debug)]
pub(crate) struct RingScratch {
    /// Heads that were found and are yet to be taken, from `taken` on.
    found: Vec<[u8; AVAIL_ENTRY]>,
    taken: usize,
    /// Used entries that are yet to be published.
    used: Vec<[u8; USED_ENTRY]>,
    /// What is left of the batch, of whichever rings.
    budget: Budget,
    /// Queues whose drivers want to be notified, as bits.
    to_notify: u32,
}

impl RingScratch {
    /// For rings of up to this many descriptors: nothing is allocated for any of them after this.
    pub(crate) fn new(max_queue_size: u16) -> Self {
        RingScratch {
            found: Vec::with_capacity(BATCH),
            taken: 0,
            // A ring's every chain at once, of which some were answered late, and a batch more.
            used: Vec::with_capacity(BATCH + usize::from(max_queue_size)),
            budget: Budget::whole(),
            to_notify: 0,
        }
    }

    /// Begins a batch.
    pub(crate) fn begin_batch(&mut self) {
        self.budget = Budget::whole();
    }

    /// Takes over which queues' drivers want to be notified, as bits.
    pub(crate) fn take_notifications(&mut self) -> u32 {
        std::mem::take(&mut self.to_notify)
    }
}

/// A ring's areas in the shared memory.
struct RingAreas<'a, B: Bitmap + 'static> {
    avail: RingArea<'a, B>,
    avail_flags: SharedU16<'a, B>,
    avail_idx: SharedU16<'a, B>,
    used_event: SharedU16<'a, B>,
    used: RingArea<'a, B>,
    used_flags: SharedU16<'a, B>,
    used_idx: SharedU16<'a, B>,
    avail_event: SharedU16<'a, B>,
}

impl<'a, B: Bitmap + 'static> RingAreas<'a, B> {
    /// `None` where one of them is not in the memory.
    fn find(queue: &impl QueueT, regions: &mut RegionCache<'a, B>) -> Option<Self> {
        let size = usize::from(queue.size());
        let (avail_event, used_event) = (ENTRIES + USED_ENTRY * size, ENTRIES + AVAIL_ENTRY * size);
        // `virtio-queue` has address 0 for one that was not set.
        (queue.avail_ring() != 0).then_some(())?;
        let used = regions.ring_area(queue.used_ring(), avail_event + size_of::<u16>())?;
        let avail = regions.ring_area(queue.avail_ring(), used_event + size_of::<u16>())?;
        Some(RingAreas {
            avail_flags: avail.field(0)?,
            avail_idx: avail.field(2)?,
            used_event: avail.field(used_event)?,
            avail,
            used_flags: used.field(0)?,
            used_idx: used.field(2)?,
            avail_event: used.field(avail_event)?,
            used,
        })
    }
}

/// A ring's available index as it is in memory, to be polled without serving the ring.
pub(crate) fn available_index<'a, B: Bitmap + 'static>(
    queue: &impl QueueT,
    regions: &mut RegionCache<'a, B>,
) -> Option<&'a AtomicU16> {
    let index = regions.ring_area(queue.avail_ring(), ENTRIES)?.field(2)?;
    Some(index.value())
}

/// A ring that is being served, by the device's side. Dropping it publishes what was given back.
/// Whether the driver wants to be notified is then in the [`RingScratch`].
pub(crate) struct DeviceRing<'a, B: Bitmap + 'static, Q: LockedQueue> {
    state: Q,
    regions: RegionCache<'a, B>,
    areas: Option<RingAreas<'a, B>>,
    scratch: &'a mut RingScratch,
    queue: u16,
    when_idle: WhenIdle,
    table: GuestAddress,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    /// The used index that the driver sees.
    next_used: u16,
    /// The used index up to which the driver was asked whether it wants to be notified.
    notified: u16,
}

impl<'a, B: Bitmap + 'static, Q: LockedQueue> DeviceRing<'a, B, Q> {
    /// The ring of a locked queue. Asks the driver for a kick when idle, unless
    /// [`when_idle`](Self::when_idle) says otherwise.
    pub(crate) fn new(
        state: Q,
        queue: u16,
        mem: &'a GuestMemoryMmap<B>,
        scratch: &'a mut RingScratch,
    ) -> Self {
        scratch.found.clear();
        scratch.taken = 0;
        scratch.used.clear();
        let mut regions = RegionCache::new(mem);
        let vq = state.queue();
        DeviceRing {
            areas: RingAreas::find(vq, &mut regions),
            regions,
            scratch,
            queue,
            when_idle: WhenIdle::AskForKick,
            table: GuestAddress(vq.desc_table()),
            size: vq.size(),
            event_idx: vq.event_idx_enabled(),
            next_avail: vq.next_avail(),
            next_used: vq.next_used(),
            notified: vq.next_used(),
            state,
        }
    }

    /// The ring where all of it is in the shared memory; otherwise it is stopped.
    pub(crate) fn within_memory(mut self) -> Option<Self> {
        if self.areas.is_none() {
            self.stop(&"it is not in the shared memory");
            return None;
        }
        Some(self)
    }

    /// What happens when nothing is left to serve.
    pub(crate) fn when_idle(&mut self, when_idle: WhenIdle) {
        self.when_idle = when_idle;
    }

    /// Whether a chain was found that is yet to be taken.
    pub(crate) fn has_found(&self) -> bool {
        self.scratch.taken < self.scratch.found.len()
    }

    /// Gathers the next available chain and returns its head. Without one, what was given back is
    /// published, and the driver asked for a kick; a ring with impossible indices is stopped.
    pub(crate) fn next_chain(&mut self, chain: &mut ChainBuffer) -> Option<u16> {
        if !self.has_found() && !self.find() {
            return None;
        }
        let head = u16::from_le_bytes(*self.scratch.found.get(self.scratch.taken)?);
        self.scratch.taken += 1;
        if head >= self.size {
            let size = self.size;
            self.stop(&format_args!(
                "available chain {head} is outside its table of {size} descriptors"
            ));
            return None;
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        chain.gather(&mut self.regions, Chain::new(self.table, self.size, head));
        if chain.is_lost() {
            // Not a request of the driver's. The connection is about to end.
            self.put_back();
            self.state.queue_mut().set_ready(false);
            return None;
        }
        let budget = &mut self.scratch.budget;
        budget.take_chain(chain.descriptors(), chain.request().len());
        Some(head)
    }

    /// The next available chain with `needed` bytes of room for an answer. Those that have less are
    /// given back as they are.
    ///
    /// # Errors
    ///
    /// Why there is none: [`Stop::Drained`], or [`Stop::BatchFull`] when the batch is spent.
    pub(crate) fn next_with_room(
        &mut self,
        chain: &mut ChainBuffer,
        needed: usize,
    ) -> Result<u16, Stop> {
        while !self.batch_is_spent() {
            let head = self.next_chain(chain).ok_or(Stop::Drained)?;
            if chain.has_room(self.queue, needed) {
                return Ok(head);
            }
            self.give_back(head, 0);
        }
        Err(Stop::BatchFull)
    }

    /// Whether others are due before the next chain.
    pub(crate) fn batch_is_spent(&self) -> bool {
        self.scratch.budget.is_spent()
    }

    /// Reads available chains. Where there are none, what `when_idle` says happens.
    fn find(&mut self) -> bool {
        // A chain that comes between the read and the request for a kick takes a second read.
        for _ in 0..2 {
            self.publish();
            match self.read_available() {
                None => return false,
                Some(true) => return true,
                Some(false) => {}
            }
            self.ask_whether_to_notify();
            if self.when_idle == WhenIdle::KeepPolling || !self.ask_for_kick() {
                return false;
            }
        }
        self.stop(&"its available index changes, but no chain is available");
        false
    }

    /// Reads the available index once, and the heads that it says are there. `None` where that
    /// index is impossible.
    fn read_available(&mut self) -> Option<bool> {
        let areas = self.areas.as_ref()?;
        // Acquire: the entries, the descriptors and the buffers were written before the index.
        let available = areas.avail_idx.load(Ordering::Acquire);
        let count = available.wrapping_sub(self.next_avail);
        if count > self.size {
            let (next, size) = (self.next_avail, self.size);
            self.stop(&format_args!(
                "its available index went from {next} to {available}, and it has {size} descriptors"
            ));
            return None;
        }
        if count == 0 {
            return Some(false);
        }
        if !self.event_idx {
            areas.used_flags.store(NO_NOTIFY, Ordering::Relaxed);
        }
        let RingScratch { found, taken, .. } = &mut *self.scratch;
        *taken = 0;
        found.clear();
        found.resize(usize::from(count).min(BATCH), [0; AVAIL_ENTRY]);
        let first = usize::from(self.next_avail % self.size);
        let to_end = (usize::from(self.size) - first).min(found.len());
        let (now, wrapped) = found.split_at_mut(to_end);
        let at = ENTRIES + AVAIL_ENTRY * first;
        areas.avail.read(at, now.as_flattened_mut());
        areas.avail.read(ENTRIES, wrapped.as_flattened_mut());
        Some(true)
    }

    /// Has the driver kick when there is something to serve. Returns whether there is already.
    fn ask_for_kick(&mut self) -> bool {
        let Some(areas) = &self.areas else {
            return false;
        };
        if self.event_idx {
            areas.avail_event.store(self.next_avail, Ordering::Relaxed);
        } else {
            areas.used_flags.store(0, Ordering::Relaxed);
        }
        // The store above, then the load below; the driver stores avail.idx and then loads what was
        // stored above (virtio 1.2 §2.7.13.3.1). One of the two sees the other's store.
        fence(Ordering::SeqCst);
        areas.avail_idx.load(Ordering::Relaxed) != self.next_avail
    }

    /// Leaves the ring to whatever serves it next and expects kicks.
    pub(crate) fn leave(&mut self) {
        self.ask_for_kick();
    }

    /// Leaves the chain that was gathered last for the next read.
    pub(crate) fn put_back(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
        self.scratch.taken = self.scratch.taken.saturating_sub(1);
    }

    /// Writes an answer without giving the chain back; returns how much of it counts.
    pub(crate) fn write(&mut self, segments: &[Segment], bytes: &[u8]) -> u32 {
        self.scratch.budget.take_bytes(bytes.len());
        scatter(&mut self.regions, segments, bytes)
    }

    /// Gives back a chain into whose writable part `len` bytes were written. The driver sees it
    /// when it is [published](Self::publish).
    pub(crate) fn give_back(&mut self, head: u16, len: u32) {
        let [h0, h1] = head.to_le_bytes();
        let [l0, l1, l2, l3] = len.to_le_bytes();
        self.scratch.used.push([h0, h1, 0, 0, l0, l1, l2, l3]);
    }

    /// Makes what was given back visible to the driver. Returns whether there was anything.
    pub(crate) fn publish(&mut self) -> bool {
        let Some(areas) = &self.areas else {
            self.scratch.used.clear();
            return false;
        };
        let given = &self.scratch.used;
        // No more chains are in the driver's rings than a `u16` counts, nor than a ring has room
        // for.
        let Ok(count) = u16::try_from(given.len()) else {
            return false;
        };
        if count == 0 {
            return false;
        }
        let size = usize::from(self.size);
        let mut at = usize::from(self.next_used % self.size);
        let mut rest = given.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at((size - at).min(rest.len()));
            let offset = ENTRIES + USED_ENTRY * at;
            areas.used.write(offset, now.as_flattened());
            (rest, at) = (later, 0);
        }
        self.next_used = self.next_used.wrapping_add(count);
        // Release: the buffers and the entries are there before the index.
        areas.used_idx.store(self.next_used, Ordering::Release);
        self.scratch.used.clear();
        true
    }

    /// Notes whether the driver wants to be notified of what was published.
    fn ask_whether_to_notify(&mut self) {
        let Some(areas) = &self.areas else {
            return;
        };
        let (old, new) = (self.notified, self.next_used);
        if old == new {
            return;
        }
        self.notified = new;
        // The used index, then the driver's wish; the driver stores its wish and then loads the
        // index (virtio 1.2 §2.7.10). One of the two sees the other's store.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = areas.used_event.load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            areas.avail_flags.load(Ordering::Relaxed) & NO_INTERRUPT == 0
        };
        self.scratch.to_notify |= u32::from(wanted) << self.queue;
    }

    /// Stops a ring whose driver breaks the rules.
    pub(crate) fn stop(&mut self, why: &dyn Display) {
        let queue = self.queue;
        log::error!("Queue {queue} is stopped until the frontend starts it again: {why}");
        self.state.queue_mut().set_ready(false);
    }
}

impl<B: Bitmap + 'static, Q: LockedQueue> Drop for DeviceRing<'_, B, Q> {
    fn drop(&mut self) {
        self.publish();
        self.ask_whether_to_notify();
        let queue = self.state.queue_mut();
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
    }
}

#[cfg(test)]
mod tests;
