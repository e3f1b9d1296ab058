//! How the host counter H follows from a clock (SPEC.md, "Counters"), exactly and the same way at
//! both ends: a frontend that reads the guest's count by the time page must have the backend's H to
//! the tick.
//!
//! Frequencies are in Hz and at least 1; counts are modulo 2^64.

/// Nanoseconds of a second, and the frequency of the kernel's clocks, Hz.
pub const NS_PER_SEC: u64 = 1_000_000_000;

/// A clock's reading of whole seconds and nanoseconds (below 10⁹) in whole ticks of `frequency`.
/// The two are scaled apart, so no error accumulates, whatever the clock's age.
pub fn ticks(seconds: u64, nanoseconds: u64, frequency: u64) -> u64 {
    seconds
        .wrapping_mul(frequency)
        .wrapping_add(scale(nanoseconds, NS_PER_SEC, frequency))
}

/// `value` ticks of `from` in whole ticks of `to`.
pub fn scale(value: u64, from: u64, to: u64) -> u64 {
    if from == to {
        return value;
    }
    let rest = u128::from(value % from) * u128::from(to) / u128::from(from);
    (value / from).wrapping_mul(to).wrapping_add(rest as u64)
}

/// What the VMM said of its host counter (SET_COUNTER_ANCHOR).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Anchor {
    /// CLOCK_MONOTONIC, ns, when the host counter read `count`.
    pub monotonic_ns: u64,
    /// The host counter then.
    pub count: u64,
}

impl Anchor {
    /// The host counter at `monotonic_ns` of CLOCK_MONOTONIC, before the anchor or after.
    pub fn host(self, monotonic_ns: u64, frequency: u64) -> u64 {
        let ns = i128::from(monotonic_ns) - i128::from(self.monotonic_ns);
        let ticks = (ns * i128::from(frequency)).div_euclid(i128::from(NS_PER_SEC));
        // Modulo 2^64, like all counter arithmetic.
        self.count.wrapping_add(ticks as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaling_is_exact_at_every_frequency_and_age() {
        for to in [1, 24_000_000, 62_500_000, 1_000_000_007, 10_000_000_000] {
            for value in [0, 1, 999_999_999, NS_PER_SEC, 3_155_760_000_123_456_789] {
                let exact = u128::from(value) * u128::from(to) / u128::from(NS_PER_SEC);
                assert_eq!(
                    scale(value, NS_PER_SEC, to),
                    exact as u64,
                    "{value} at {to}"
                );
                let (seconds, rest) = (value / NS_PER_SEC, value % NS_PER_SEC);
                assert_eq!(ticks(seconds, rest, to), exact as u64, "{value} at {to}");
            }
        }
    }

    #[test]
    fn an_anchor_reads_the_host_counter_on_both_sides_of_it() {
        let anchor = Anchor {
            monotonic_ns: 1_000,
            count: 50,
        };
        assert_eq!(anchor.host(1_000, NS_PER_SEC), 50);
        assert_eq!(anchor.host(1_010, NS_PER_SEC), 60);
        assert_eq!(anchor.host(990, NS_PER_SEC), 40);
        assert_eq!(anchor.host(0, NS_PER_SEC), 50u64.wrapping_sub(1_000));
        // Half a tick before is in the tick before.
        assert_eq!(anchor.host(999, 500_000_000), 49);
    }
}
