//! A split ring (virtio 1.2 §2.7) for as long as it is being served: chains out of it, used entries into
//! it, and one notification at the end.
//!
//! One look at the available index finds a batch of chains; what is given back of it is published
//! together, with one store of the used index. While it is served the driver is not to kick, and when
//! nothing is left it is asked to.
//!
//! A ring stays memory that the driver owns, so nothing in it is believed: one whose indices make no
//! sense is stopped, and the frontend can start it anew.

use std::fmt::Display;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use vhost_user_backend::VringState;
use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::QueueT;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::vhost_user::link::BATCH;
use crate::vhost_user::vring::{Memory, Vring};
use crate::virtio::chain::{Chain, ChainBuffer, Segment, scatter};
use crate::virtio::region_cache::{RegionCache, RingArea, SharedU16};

/// The driver does not want to be called (virtq_avail.flags).
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
/// The device does not want to be kicked (virtq_used.flags).
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// Where entries begin in the available and the used ring, and the size of each.
const ENTRIES: usize = 4;
const AVAIL_ENTRY: usize = size_of::<u16>();
const USED_ENTRY: usize = 8;

/// What happens when a ring has nothing more to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenIdle {
    /// The driver is asked to kick.
    AskForKick,
    /// Somebody looks again soon: the driver is left as it is, which is not to kick.
    KeepPolling,
}

/// What is under way on the ring that is being served. Reused from one to the next.
#[derive(Debug, Default)]
pub(crate) struct RingScratch {
    /// Heads that were found and are yet to be taken, from `taken` on.
    found: Vec<[u8; AVAIL_ENTRY]>,
    taken: usize,
    /// Used entries that are yet to be published.
    used: Vec<[u8; USED_ENTRY]>,
}

/// A ring's parts in the shared memory.
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
    fn find(queue: &impl QueueT, reach: &mut RegionCache<'a, B>) -> Option<Self> {
        let size = usize::from(queue.size());
        let (avail_event, used_event) = (ENTRIES + USED_ENTRY * size, ENTRIES + AVAIL_ENTRY * size);
        // Nobody has set it: that is how `virtio-queue` has it.
        (queue.avail_ring() != 0).then_some(())?;
        let used = reach.part(queue.used_ring(), avail_event + size_of::<u16>())?;
        let avail = reach.part(queue.avail_ring(), used_event + size_of::<u16>())?;
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

/// A ring's available index as it is in memory, to be looked at without serving the ring.
pub(crate) fn available_index<'a, B: Bitmap + 'static>(
    queue: &impl QueueT,
    reach: &mut RegionCache<'a, B>,
) -> Option<&'a AtomicU16> {
    let index = reach.part(queue.avail_ring(), ENTRIES)?.field(2)?;
    Some(index.value())
}

/// A ring that is being served. Dropping it tells the driver of what it was given back.
pub(crate) struct DeviceRing<'a, B: Bitmap + 'static> {
    state: MutexGuard<'a, VringState<Memory<B>>>,
    reach: RegionCache<'a, B>,
    parts: Option<RingAreas<'a, B>>,
    work: &'a mut RingScratch,
    queue: u16,
    idle: WhenIdle,
    table: GuestAddress,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    /// The used index that the driver sees.
    next_used: u16,
    /// The used index of which the driver was told.
    told: u16,
}

impl<'a, B: Bitmap + 'static> DeviceRing<'a, B> {
    /// The ring, where it is started and enabled.
    pub(crate) fn usable(
        vring: &'a Vring<B>,
        queue: u16,
        mem: &'a GuestMemoryMmap<B>,
        work: &'a mut RingScratch,
    ) -> Option<Self> {
        let state = vring.get_mut();
        if !state.get_queue().ready() || !state.is_enabled() {
            return None;
        }
        vring.mark_served();
        let mut ring = Self::of(state, queue, mem, work);
        if ring.parts.is_none() {
            ring.stop(&"it is not in the shared memory");
            return None;
        }
        Some(ring)
    }

    /// The ring, though it is being stopped or is disabled: what was taken from it may be given back.
    /// `None` where nothing ever was, since it was stopped last.
    pub(crate) fn stopping(
        vring: &'a Vring<B>,
        queue: u16,
        mem: &'a GuestMemoryMmap<B>,
        work: &'a mut RingScratch,
    ) -> Option<Self> {
        let state = vring.get_mut();
        vring
            .was_served()
            .then(|| Self::of(state, queue, mem, work))
    }

    fn of(
        state: MutexGuard<'a, VringState<Memory<B>>>,
        queue: u16,
        mem: &'a GuestMemoryMmap<B>,
        work: &'a mut RingScratch,
    ) -> Self {
        work.found.clear();
        work.taken = 0;
        work.used.clear();
        let mut reach = RegionCache::new(mem);
        let vq = state.get_queue();
        DeviceRing {
            parts: RingAreas::find(vq, &mut reach),
            reach,
            work,
            queue,
            idle: WhenIdle::AskForKick,
            table: GuestAddress(vq.desc_table()),
            size: vq.size(),
            event_idx: vq.event_idx_enabled(),
            next_avail: vq.next_avail(),
            next_used: vq.next_used(),
            told: vq.next_used(),
            state,
        }
    }

    /// What is to happen when nothing is left to serve; [`WhenIdle::AskForKick`] unless this says otherwise.
    pub(crate) fn when_idle(&mut self, idle: WhenIdle) {
        self.idle = idle;
    }

    /// Whether a chain was found that is yet to be taken.
    pub(crate) fn has_found(&self) -> bool {
        self.work.taken < self.work.found.len()
    }

    /// Gathers the next available chain and returns its head. Without one, the driver is told of all
    /// that it was given back, and asked to kick when there is one; a ring that makes no sense is
    /// stopped.
    pub(crate) fn next_chain(&mut self, gathered: &mut ChainBuffer) -> Option<u16> {
        if !self.has_found() && !self.find() {
            return None;
        }
        let head = u16::from_le_bytes(*self.work.found.get(self.work.taken)?);
        self.work.taken += 1;
        if head >= self.size {
            self.stop(&format_args!("chain {head} is not in its table"));
            return None;
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        let chain = Chain::new(self.table, self.size, head);
        gathered.gather(&mut self.reach, chain);
        Some(head)
    }

    /// Looks for available chains. Where there are none, whatever is to happen then happens.
    fn find(&mut self) -> bool {
        // A chain that comes between the look and the request for a kick takes a second look.
        for _ in 0..2 {
            self.publish();
            match self.look() {
                None => return false,
                Some(true) => return true,
                Some(false) => {}
            }
            self.tell();
            if self.idle == WhenIdle::KeepPolling || !self.ask_for_kick() {
                return false;
            }
        }
        self.stop(&"its index says that chains are available, and there are none");
        false
    }

    /// Looks once at the available index, and takes note of what it says is there. `None` where that
    /// cannot be.
    fn look(&mut self) -> Option<bool> {
        let parts = self.parts.as_ref()?;
        // Acquire: the entries, the descriptors and the buffers were written before the index.
        let available = parts.avail_idx.load(Ordering::Acquire);
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
            parts.used_flags.store(NO_NOTIFY, Ordering::Relaxed);
        }
        let RingScratch { found, taken, .. } = &mut *self.work;
        *taken = 0;
        found.clear();
        found.resize(usize::from(count).min(BATCH), [0; AVAIL_ENTRY]);
        let first = usize::from(self.next_avail % self.size);
        let to_end = (usize::from(self.size) - first).min(found.len());
        let (now, wrapped) = found.split_at_mut(to_end);
        let at = ENTRIES + AVAIL_ENTRY * first;
        parts.avail.read(at, now.as_flattened_mut());
        parts.avail.read(ENTRIES, wrapped.as_flattened_mut());
        Some(true)
    }

    /// Has the driver kick when there is something to serve. Returns whether there is already.
    fn ask_for_kick(&mut self) -> bool {
        let Some(parts) = &self.parts else {
            return false;
        };
        if self.event_idx {
            parts.avail_event.store(self.next_avail, Ordering::Relaxed);
        } else {
            parts.used_flags.store(0, Ordering::Relaxed);
        }
        // The store above, then the load below; the driver stores avail.idx and then loads what was
        // stored above (virtio 1.2 §2.7.13.3.1). One of the two sees the other's.
        fence(Ordering::SeqCst);
        parts.avail_idx.load(Ordering::Relaxed) != self.next_avail
    }

    /// Leaves the ring to whoever serves it next, who expects to be kicked.
    pub(crate) fn leave(&mut self) {
        self.ask_for_kick();
    }

    /// Leaves the chain that was gathered last for the next look.
    pub(crate) fn put_back(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
        self.work.taken = self.work.taken.saturating_sub(1);
    }

    /// Writes an answer without giving the chain back; returns how much of it counts.
    pub(crate) fn write(&mut self, segments: &[Segment], bytes: &[u8]) -> u32 {
        scatter(&mut self.reach, segments, bytes)
    }

    /// Gives a chain back of whose writable part `len` bytes were written. The driver sees it when it
    /// is [published](Self::publish).
    pub(crate) fn give_back(&mut self, head: u16, len: u32) {
        let [h0, h1] = head.to_le_bytes();
        let [l0, l1, l2, l3] = len.to_le_bytes();
        self.work.used.push([h0, h1, 0, 0, l0, l1, l2, l3]);
    }

    /// Lets the driver see what was given back. Returns whether there was anything.
    pub(crate) fn publish(&mut self) -> bool {
        let Some(parts) = &self.parts else {
            self.work.used.clear();
            return false;
        };
        let given = &self.work.used;
        // No more chains are in the driver's rings than a `u16` counts, nor than a ring has room for.
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
            parts.used.write(offset, now.as_flattened());
            (rest, at) = (later, 0);
        }
        self.next_used = self.next_used.wrapping_add(count);
        // Release: the buffers and the entries are there before the index.
        parts.used_idx.store(self.next_used, Ordering::Release);
        self.work.used.clear();
        true
    }

    /// Tells the driver of what was published, where it wants to be told.
    fn tell(&mut self) {
        let Some(parts) = &self.parts else {
            return;
        };
        let (old, new) = (self.told, self.next_used);
        if old == new {
            return;
        }
        self.told = new;
        // The used index, then the driver's wish; the driver stores its wish and then loads the
        // index (virtio 1.2 §2.7.10). One of the two sees the other's.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = parts.used_event.load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            parts.avail_flags.load(Ordering::Relaxed) & NO_INTERRUPT == 0
        };
        if wanted && let Err(error) = self.state.signal_used_queue() {
            // A full pipe: the driver has been told often enough.
            log::debug!("The call descriptor takes no notification: {error}");
        }
    }

    /// Stops serving a ring whose driver breaks the rules.
    pub(crate) fn stop(&mut self, why: &dyn Display) {
        let queue = self.queue;
        log::error!("Queue {queue} is stopped until the frontend starts it again: {why}");
        self.state.get_queue_mut().set_ready(false);
    }
}

impl<B: Bitmap + 'static> Drop for DeviceRing<'_, B> {
    fn drop(&mut self) {
        self.publish();
        self.tell();
        let queue = self.state.get_queue_mut();
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
    }
}

#[cfg(test)]
mod tests;
