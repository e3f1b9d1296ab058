//! A reading of a guest's clock between two readings of the host's.

use rustix::time::{ClockId, DynamicClockId, clock_gettime, clock_gettime_dynamic};

/// A host clock to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostClock {
    /// UTC.
    Realtime,
    /// TAI if the kernel knows the offset; otherwise the same as UTC.
    Tai,
    /// Time since boot, without suspend.
    Monotonic,
    /// Time since boot, with suspend.
    Boottime,
}

impl HostClock {
    /// A reading, in ns.
    ///
    /// # Panics
    ///
    /// On Linux before 3.10, which had no TAI.
    pub fn now(self) -> i128 {
        let time = match self {
            HostClock::Realtime => clock_gettime(ClockId::Realtime),
            HostClock::Tai => clock_gettime_dynamic(DynamicClockId::Tai).expect("CLOCK_TAI"),
            HostClock::Monotonic => clock_gettime(ClockId::Monotonic),
            HostClock::Boottime => clock_gettime(ClockId::Boottime),
        };
        i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
    }
}

/// The guest read its clock after `before` and before `after`. All in ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bracket {
    /// The host's clock before.
    pub before: i128,
    /// The guest's reading.
    pub reading: i128,
    /// The host's clock after.
    pub after: i128,
}

impl Bracket {
    /// Whether the guest's reading lies between the host's.
    pub fn holds(&self) -> bool {
        (self.before..=self.after).contains(&self.reading)
    }
}
