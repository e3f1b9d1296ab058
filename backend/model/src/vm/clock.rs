//! The VM's clocks, one for each timeline: how a guest count follows from the host counter.
//!
//! All arithmetic is modulo 2^64, as the architecture's counters are (Arm ARM D12.1.2).

use vhost_user_timer_protocol::Timeline;
use vhost_user_timer_protocol::counter::NS_PER_SEC;

/// One of each timeline, by [`Timeline::index`].
pub(super) type ByTimeline<T> = [T; Timeline::COUNT];

/// One instant, as the shell around the model read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// The host counter, in ticks of the VM's frequency.
    pub host: u64,
    /// CLOCK_REALTIME, ns; anything where [`Vm::wants_realtime`](super::Vm::wants_realtime) is
    /// false.
    pub realtime_ns: u64,
}

impl Now {
    /// An instant without a wall-clock time.
    pub const fn at(host: u64) -> Self {
        Now {
            host,
            realtime_ns: 0,
        }
    }
}

/// A guest clock: it counts with the host counter, or is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Clock {
    /// count = host − offset.
    Counting { offset: u64 },
    /// The count is constant.
    Frozen { count: u64 },
}

impl Clock {
    /// The host counter itself.
    pub(super) const PASSED_THROUGH: Clock = Clock::Counting { offset: 0 };

    pub(super) fn count(self, host: u64) -> u64 {
        match self {
            Clock::Counting { offset } => host.wrapping_sub(offset),
            Clock::Frozen { count } => count,
        }
    }

    pub(super) fn offset(self, host: u64) -> u64 {
        host.wrapping_sub(self.count(host))
    }

    pub(super) fn frozen(self, host: u64) -> Self {
        Clock::Frozen {
            count: self.count(host),
        }
    }

    pub(super) fn counting(self, host: u64) -> Self {
        Clock::Counting {
            offset: self.offset(host),
        }
    }
}

/// The whole ticks in `ns` nanoseconds; `u64::MAX` where they are more.
///
/// Exact: the product is taken in 128 bits, so nothing accumulates over years.
pub fn ticks_of_ns(ns: u64, frequency: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(frequency) / u128::from(NS_PER_SEC);
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The ticks after which `ns` nanoseconds have passed, rounded up so that no time-out is
/// early; `u64::MAX` where they are more.
pub(super) fn ticks_to_pass(ns: u64, frequency: u64) -> u64 {
    let ticks = (u128::from(ns) * u128::from(frequency)).div_ceil(u128::from(NS_PER_SEC));
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The nanoseconds after which `ticks` have passed, rounded up so that no sleep is too short;
/// `u64::MAX` where they are more.
///
/// `frequency` is in Hz, at least 1.
pub fn ns_of_ticks(ticks: u64, frequency: u64) -> u64 {
    let ns = (u128::from(ticks) * u128::from(NS_PER_SEC)).div_ceil(u128::from(frequency.max(1)));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_frozen_and_goes_on_keeps_its_count() {
        let clock = Clock::Counting { offset: 5 };
        let frozen = clock.frozen(100);
        assert_eq!((frozen.count(100), frozen.count(900)), (95, 95));
        assert_eq!(frozen.offset(900), 805);
        let on = frozen.counting(900);
        assert_eq!((on.count(900), on.count(910)), (95, 105));
    }

    #[test]
    fn counts_wrap_modulo_two_to_the_64() {
        let clock = Clock::Counting { offset: 10 };
        assert_eq!(clock.count(3), u64::MAX - 6);
        assert_eq!(clock.offset(3), 10);
    }

    #[test]
    fn ticks_and_nanoseconds_convert_exactly_over_centuries() {
        let century = 100 * 365 * 86_400u64;
        for frequency in [1, 24_000_000, 62_500_000, 999_999_937, 1_000_000_000] {
            assert_eq!(
                ticks_of_ns(century * NS_PER_SEC, frequency),
                century * frequency
            );
            assert_eq!(
                ns_of_ticks(century * frequency, frequency),
                century * NS_PER_SEC
            );
        }
        assert_eq!(ticks_of_ns(41, 24_000_000), 0);
        assert_eq!(ticks_of_ns(42, 24_000_000), 1);
        assert_eq!(ns_of_ticks(1, 24_000_000), 42);
        assert_eq!(ticks_of_ns(u64::MAX, 2_000_000_000), u64::MAX);
        assert_eq!(ns_of_ticks(u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn waking_after_the_rounded_nanoseconds_is_never_early() {
        for frequency in [7, 24_000_000, 62_500_000, 1_000_000_007] {
            for ticks in [1, 2, 3, 1_000, 1_000_003] {
                assert!(ticks_of_ns(ns_of_ticks(ticks, frequency), frequency) >= ticks);
            }
        }
    }
}
