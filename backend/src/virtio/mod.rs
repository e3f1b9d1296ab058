//! A virtio device's side of split rings (virtio 1.2 §2.7), whichever transport set them up.
//!
//! - [`ring`]: a ring while it is served: chains out of it, used entries into it.
//! - [`chain`]: a descriptor chain as bytes.
//! - [`region_cache`]: the shared memory that all of it lies in.
//! - [`budget`]: how much is served before others get their turn.
//! - [`polling`]: polling rings, and for how long before sleeping.

pub(crate) mod budget;
pub(crate) mod chain;
pub(crate) mod polling;
pub(crate) mod region_cache;
pub(crate) mod ring;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering, fence};

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The memory that a frontend shares; `B` marks what is written to it, for a migration.
pub(crate) type Memory<B> = GuestMemoryAtomic<GuestMemoryMmap<B>>;

/// Whether some of the memory that a frontend shares was lost when it was touched. What was read
/// since is not what the driver wrote.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryLost(&'static AtomicBool);

impl MemoryLost {
    /// Lost once this is set.
    pub(crate) fn of(mark: &'static AtomicBool) -> Self {
        MemoryLost(mark)
    }

    /// Asked after reading: true where any of the reads before may be of lost memory.
    pub(crate) fn is_set(self) -> bool {
        fence(Ordering::Acquire);
        self.0.load(Ordering::Relaxed)
    }
}
