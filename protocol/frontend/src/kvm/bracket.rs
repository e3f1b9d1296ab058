//! How far a guest's count is from what an offset makes it, as far as that can be observed.

use std::fmt;

use vhost_user_timer_counter::HostCounter;

/// By how many ticks a guest's count is ahead of what an offset makes it: at least
/// [`least`](Self::least), at most [`most`](Self::most).
///
/// The count is read between two readings of the host counter, and nothing shows where between them
/// KVM read it, so the difference is known to within that time. Further readings narrow it: the
/// difference is constant, so it lies in the bracket of each reading.
///
/// It prints as `-3..=41 ticks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bracket {
    /// The least that the count can be ahead, ticks; negative: behind.
    pub least: i64,
    /// The most that the count can be ahead, ticks.
    pub most: i64,
}

/// The host counter, in its own ticks.
pub(super) trait Host {
    /// Now.
    fn count(&self) -> u64;

    /// Hz, at least 1.
    fn frequency(&self) -> u64;
}

impl Host for HostCounter {
    fn count(&self) -> u64 {
        self.read(self.native_frequency())
    }

    fn frequency(&self) -> u64 {
        self.native_frequency()
    }
}

/// Readings of one count at most.
const READINGS: u32 = 8;

/// A bracket is narrow enough at this fraction of a second. A reading takes about 5 µs natively.
const ENOUGH: u64 = 50_000;

impl Bracket {
    /// Of a `count` that was read between two readings of the host counter, for this offset.
    pub(super) fn of_reading(before: u64, count: u64, after: u64, offset: u64) -> Self {
        let ahead_of = |host: u64| count.wrapping_add(offset).wrapping_sub(host).cast_signed();
        Bracket {
            least: ahead_of(after),
            most: ahead_of(before),
        }
    }

    pub(super) fn between(least: i64, most: i64) -> Self {
        Bracket { least, most }
    }

    /// The same count, of an offset that makes the count larger by `ticks`.
    pub(super) fn shifted(self, ticks: i64) -> Self {
        Bracket {
            least: self.least.wrapping_sub(ticks),
            most: self.most.wrapping_sub(ticks),
        }
    }

    /// Reads a count until the bracket is narrow. Where two readings contradict each other, because
    /// the count was moved between them, the bracket is the last one's.
    pub(super) fn observe<E>(
        host: &impl Host,
        offset: u64,
        read: impl Fn() -> Result<u64, E>,
    ) -> Result<Self, E> {
        let mut known: Option<Bracket> = None;
        for _ in 0..READINGS {
            let before = host.count();
            let count = read()?;
            let after = host.count();
            let seen = Bracket::of_reading(before, count, after, offset);
            let both = known.map_or(seen, |known| known.and(seen).unwrap_or(seen));
            if both.width() <= host.frequency() / ENOUGH {
                return Ok(both);
            }
            known = Some(both);
        }
        Ok(known.expect("at least one reading"))
    }

    /// What both allow.
    pub(super) fn and(self, other: Self) -> Option<Self> {
        let both = Bracket {
            least: self.least.max(other.least),
            most: self.most.min(other.most),
        };
        (both.least <= both.most).then_some(both)
    }

    /// Whether the offset may be exactly right: the count is neither certainly ahead nor certainly
    /// behind.
    pub fn contains_zero(&self) -> bool {
        self.least <= 0 && self.most >= 0
    }

    /// Its width in ticks: how much of a difference it cannot show.
    pub fn width(&self) -> u64 {
        self.least.abs_diff(self.most)
    }

    /// The middle, ticks: at most half the width from the truth.
    pub(super) fn middle(&self) -> i64 {
        self.least.midpoint(self.most)
    }
}

impl fmt::Display for Bracket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={} ticks", self.least, self.most)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A host counter that advances by `step` at each reading.
    struct Steps {
        now: Cell<u64>,
        step: u64,
    }

    impl Steps {
        fn of(step: u64) -> Self {
            Steps {
                now: Cell::new(0),
                step,
            }
        }
    }

    impl Host for Steps {
        fn count(&self) -> u64 {
            self.now.set(self.now.get().wrapping_add(self.step));
            self.now.get()
        }

        fn frequency(&self) -> u64 {
            1_000_000_000
        }
    }

    #[test]
    fn a_bracket_says_by_how_much_the_count_may_be_ahead() {
        let right = Bracket::of_reading(1_000, 940, 1_050, 100);
        assert_eq!(
            right,
            Bracket {
                least: -10,
                most: 40
            }
        );
        assert!(right.contains_zero());
        assert_eq!(right.width(), 50);
        assert_eq!(right.to_string(), "-10..=40 ticks");

        let ahead = Bracket::of_reading(1_000, 951, 1_050, 100);
        assert_eq!(ahead, Bracket { least: 1, most: 51 });
        let behind = Bracket::of_reading(1_000, 899, 1_050, 100);
        assert_eq!(
            behind,
            Bracket {
                least: -51,
                most: -1
            }
        );
        assert!(!ahead.contains_zero() && !behind.contains_zero());
    }

    #[test]
    fn a_bracket_is_the_same_where_the_counter_or_the_offset_wraps() {
        for (host, offset) in [(u64::MAX - 20, 100), (5, u64::MAX), (1 << 63, 1 << 62)] {
            let count = host.wrapping_add(7).wrapping_sub(offset);
            let bracket = Bracket::of_reading(host, count, host.wrapping_add(30), offset);
            assert_eq!(
                bracket,
                Bracket {
                    least: -23,
                    most: 7
                }
            );
        }
    }

    #[test]
    fn further_readings_narrow_the_bracket_to_what_all_of_them_allow() {
        // 100 µs a reading: KVM reads early, then late.
        let host = Steps::of(100_000);
        let readings = Cell::new(0);
        let read = || -> Result<u64, ()> {
            let delay = [10_000, 95_000, 50_000][readings.get() % 3];
            readings.set(readings.get() + 1);
            Ok(host.now.get() + delay)
        };
        let bracket = Bracket::observe(&host, 0, read).unwrap();
        assert_eq!(
            bracket,
            Bracket {
                least: -5_000,
                most: 10_000
            }
        );
    }

    #[test]
    fn one_narrow_reading_is_enough_and_a_wide_one_is_repeated_eight_times() {
        for (step, readings) in [(20_000, 1), (1_000_000, 8)] {
            let host = Steps::of(step);
            let read = Cell::new(0);
            let count = || -> Result<u64, ()> {
                read.set(read.get() + 1);
                Ok(host.now.get())
            };
            Bracket::observe(&host, 0, count).unwrap();
            assert_eq!(read.get(), readings, "{step}");
        }
    }

    #[test]
    fn readings_that_contradict_each_other_leave_the_last_one() {
        let host = Steps::of(1_000_000);
        let moved = Cell::new(0u64);
        let read = || -> Result<u64, ()> {
            moved.set(moved.get() + 5_000_000);
            Ok(host.now.get() + moved.get())
        };
        let bracket = Bracket::observe(&host, 0, read).unwrap();
        assert_eq!(bracket.least, 8 * 5_000_000 - 1_000_000);
        assert!(!bracket.contains_zero());
    }
}
