//! Where a request queue's ring, descriptor tables and buffers are in the shared memory.

use super::{CHAIN, SMALL};
use crate::memory::Layout;
use crate::ring::{DESCRIPTOR, RingLayout};
use vhost_user_timer_protocol::MAX_MESSAGE;

/// Where a request queue's parts are.
pub(crate) struct QueueLayout {
    pub(crate) ring: RingLayout,
    /// By slot, an indirect table; `None` if the ring's own descriptors are chained.
    pub(super) tables: Option<usize>,
    /// By slot, a request buffer and a response buffer.
    small: usize,
    large: usize,
}

impl QueueLayout {
    pub(crate) fn reserve(layout: &mut Layout, size: u16, indirect: bool) -> Self {
        let ring = RingLayout::reserve(layout, size);
        let slots = usize::from(if indirect { size } else { size / CHAIN });
        let table = DESCRIPTOR * usize::from(CHAIN);
        QueueLayout {
            ring,
            tables: indirect.then(|| layout.reserve(slots * table, 64)),
            small: layout.reserve(slots * 2 * SMALL, 64),
            large: layout.reserve(2 * MAX_MESSAGE, 64),
        }
    }

    pub(super) fn slots(&self) -> u16 {
        match self.tables {
            Some(_) => self.ring.size,
            None => self.ring.size / CHAIN,
        }
    }

    /// Ring descriptors per slot.
    pub(super) fn descriptors_per_slot(&self) -> u16 {
        match self.tables {
            Some(_) => 1,
            None => CHAIN,
        }
    }

    /// The request and the response buffer of a slot.
    pub(super) fn buffers(&self, slot: u16, large: bool) -> (usize, usize) {
        if large {
            (self.large, self.large + MAX_MESSAGE)
        } else {
            let small = self.small + usize::from(slot) * 2 * SMALL;
            (small, small + SMALL)
        }
    }
}
