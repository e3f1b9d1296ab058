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

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The memory that a frontend shares; `B` marks what is written to it, for a migration.
pub(crate) type Memory<B> = GuestMemoryAtomic<GuestMemoryMmap<B>>;
