//! The count as a guest reads it, and whether it ever decreased.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// The frequency of [`host_count`], Hz.
pub const HOST_FREQUENCY: u64 = 1_000_000_000;

/// The host counter of a backend with `--counter-source monotonic` and a VM at
/// [`HOST_FREQUENCY`]. A vCPU reads this less the offset.
pub fn host_count() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // CLOCK_MONOTONIC is never negative.
    now.tv_sec as u64 * HOST_FREQUENCY + now.tv_nsec as u64
}

/// The largest count that any vCPU of a VM has ever read.
#[derive(Debug, Default)]
pub struct Watch {
    largest: AtomicU64,
}

/// What a vCPU read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The virtual count.
    pub count: u64,
    /// Whether it is below a count that some vCPU had read before this vCPU began to read.
    pub went_back: bool,
}

impl Watch {
    /// Notes a count that a vCPU knows already, from the host that it was saved on.
    pub fn has_seen(&self, count: u64) {
        self.largest.fetch_max(count, Ordering::SeqCst);
    }

    /// Reads the virtual count as a guest does, with this offset.
    pub fn read(&self, cntvoff: u64) -> Reading {
        let seen = self.largest.load(Ordering::SeqCst);
        let count = host_count().wrapping_sub(cntvoff);
        self.has_seen(count);
        Reading {
            count,
            went_back: count < seen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_below_any_seen_before_went_back() {
        let watch = Watch::default();
        let offset = host_count().wrapping_sub(1_000_000_000);
        assert!(!watch.read(offset).went_back);
        assert!(!watch.read(offset).went_back);
        // An offset that is a second larger, as after a second restore of a saved count.
        assert!(watch.read(offset + HOST_FREQUENCY).went_back);
    }
}
