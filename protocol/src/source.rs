//! What the host counter counts by (SPEC.md, "Counters").

/// The source of the backend's host counter, as `info` gives it: bits 5 to 7 of
/// [`Info::flags`](crate::wire::Info::flags).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CounterSource {
    /// The backend does not say.
    NotTold,
    /// CLOCK_MONOTONIC, or an anchor to it.
    Monotonic,
    /// CLOCK_BOOTTIME.
    Boottime,
    /// The time-stamp counter of x86-64.
    Tsc,
    /// CNTVCT_EL0 of AArch64, as the backend reads it.
    Cntvct,
    /// Another value: not one that a backend of this version gives.
    Unknown(u8),
}

/// Where the value is in `info`'s flags.
const SHIFT: u32 = 5;

impl CounterSource {
    /// The value on the wire, 0 to 7.
    pub const fn code(self) -> u8 {
        match self {
            CounterSource::NotTold => 0,
            CounterSource::Monotonic => 1,
            CounterSource::Boottime => 2,
            CounterSource::Tsc => 3,
            CounterSource::Cntvct => 4,
            CounterSource::Unknown(code) => code & 7,
        }
    }

    /// The source of a value on the wire.
    pub const fn from_code(code: u8) -> Self {
        match code {
            0 => CounterSource::NotTold,
            1 => CounterSource::Monotonic,
            2 => CounterSource::Boottime,
            3 => CounterSource::Tsc,
            4 => CounterSource::Cntvct,
            _ => CounterSource::Unknown(code),
        }
    }

    /// The source in `info`'s flags.
    pub const fn from_info_flags(flags: u8) -> Self {
        Self::from_code(flags >> SHIFT)
    }

    /// The source as bits of `info`'s flags.
    pub const fn info_flags(self) -> u8 {
        self.code() << SHIFT
    }
}

impl core::fmt::Display for CounterSource {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            CounterSource::NotTold => f.write_str("not told"),
            CounterSource::Monotonic => f.write_str("monotonic"),
            CounterSource::Boottime => f.write_str("boottime"),
            CounterSource::Tsc => f.write_str("tsc"),
            CounterSource::Cntvct => f.write_str("cntvct"),
            CounterSource::Unknown(code) => write!(f, "unknown source {code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_three_bits_of_infos_flags_beside_the_others() {
        for flags in 0..=u8::MAX {
            let source = CounterSource::from_info_flags(flags);
            assert_eq!(source.info_flags(), flags & 0xe0);
        }
        let told = [
            CounterSource::NotTold,
            CounterSource::Monotonic,
            CounterSource::Boottime,
            CounterSource::Tsc,
            CounterSource::Cntvct,
            CounterSource::Unknown(5),
        ];
        for (code, source) in (0..).zip(told) {
            assert_eq!(
                (source.code(), CounterSource::from_code(code)),
                (code, source)
            );
        }
    }
}
