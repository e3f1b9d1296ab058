//! The host counters: what a VM's counter is an offset of.
//!
//! The backend and the frontend read the same sources through this crate, so that a count which
//! one end derives is the other end's to the tick. All the assembly of the project is here.
//!
//! A source is one file, with a type that implements [`HostSource`], and one line of `sources!`.
//! Command-line names, state-file codes and the frontend's readers follow from that line.

mod boottime;
mod cntvct;
mod monotonic;
mod order;
mod tsc;

pub use order::zero_after;

use rustix::time::{ClockId, Timespec, clock_gettime};
use vhost_user_timer_protocol::counter;

/// Why a counter source cannot be used on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The CPU has no such counter.
    #[error(
        "counter source {0} does not exist on {arch}",
        arch = std::env::consts::ARCH
    )]
    WrongArchitecture(Source),
    /// The time-stamp counter changes its rate or stops.
    #[error(
        "counter source tsc is not usable: this CPU's time-stamp counter is not invariant \
         (CPUID 80000007h EDX bit 8)"
    )]
    TscNotInvariant,
}

/// One source: everything that tells it from the others.
trait HostSource {
    /// The source's name on command lines.
    const NAME: &'static str;
    /// The source's code in state files, never reused.
    const CODE: u32;
    /// Whether the frequency is measured, so that a second measurement would differ.
    const MEASURED: bool = false;
    /// The kernel clock that advances as this counter does.
    const KERNEL_CLOCK: ClockId = ClockId::Monotonic;

    /// The counter's own frequency, Hz, at least 1.
    fn frequency() -> Result<u64, SourceError>;

    /// The counter in ticks of `to` Hz. `from` is its own frequency, Hz.
    fn read(from: u64, to: u64) -> u64;
}

macro_rules! sources {
    ($($(#[$doc:meta])* $name:ident = $source:ty;)*) => {
        /// A source of the host counter.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Source {
            $($(#[$doc])* $name,)*
        }

        impl Source {
            /// Every source, on whichever architecture.
            pub const ALL: &[Source] = &[$(Source::$name),*];

            /// The name on command lines.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Source::$name => <$source>::NAME,)*
                }
            }

            /// The code in state files.
            pub const fn code(self) -> u32 {
                match self {
                    $(Source::$name => <$source>::CODE,)*
                }
            }

            /// The kernel clock that advances as this counter does.
            pub const fn kernel_clock(self) -> ClockId {
                match self {
                    $(Source::$name => <$source>::KERNEL_CLOCK,)*
                }
            }

            const fn is_measured(self) -> bool {
                match self {
                    $(Source::$name => <$source>::MEASURED,)*
                }
            }

            fn frequency(self) -> Result<u64, SourceError> {
                match self {
                    $(Source::$name => <$source>::frequency(),)*
                }
            }

            #[inline]
            fn read(self, from: u64, to: u64) -> u64 {
                match self {
                    $(Source::$name => <$source>::read(from, to),)*
                }
            }
        }
    };
}

sources! {
    /// CLOCK_MONOTONIC: stops while the host is suspended.
    Monotonic = monotonic::Monotonic;
    /// CLOCK_BOOTTIME: continues while the host is suspended.
    Boottime = boottime::Boottime;
    /// The time-stamp counter (x86-64).
    Tsc = tsc::Tsc;
    /// CNTVCT_EL0 (AArch64).
    Cntvct = cntvct::Cntvct;
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What identifies a host counter in a state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterId {
    /// [`Source::code`].
    pub source: u32,
    /// The counter's own frequency, Hz. A measured one holds for the life of the VM.
    pub frequency: u64,
}

/// A host counter that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostCounter {
    source: Source,
    frequency: u64,
}

impl HostCounter {
    /// CLOCK_MONOTONIC, which every host has.
    pub const MONOTONIC: HostCounter = HostCounter {
        source: Source::Monotonic,
        frequency: counter::NS_PER_SEC,
    };

    /// Makes the source ready for reading.
    ///
    /// # Errors
    ///
    /// [`SourceError`] where this host has no such counter, or no reliable one.
    pub fn open(source: Source) -> Result<Self, SourceError> {
        Ok(HostCounter {
            source,
            frequency: source.frequency()?,
        })
    }

    /// The same source at the frequency, Hz, that was found for it before. Where the frequency is
    /// measured a second measurement would differ, and the count would jump; elsewhere this changes
    /// nothing.
    #[must_use]
    pub fn at_rate(self, frequency: u64) -> Self {
        if self.source.is_measured() {
            HostCounter {
                frequency: frequency.max(1),
                ..self
            }
        } else {
            self
        }
    }

    /// The source.
    pub fn source(&self) -> Source {
        self.source
    }

    /// What identifies this counter in a state file.
    pub fn id(&self) -> CounterId {
        CounterId {
            source: self.source.code(),
            frequency: self.frequency,
        }
    }

    /// The counter's own frequency, Hz: 10⁹ for the kernel's clocks.
    pub fn native_frequency(&self) -> u64 {
        self.frequency
    }

    /// The counter in ticks of `frequency` Hz, read after everything before it in program order.
    #[inline]
    pub fn read(&self, frequency: u64) -> u64 {
        self.source.read(self.frequency, frequency)
    }
}

/// A kernel clock in ticks of `frequency` Hz.
pub fn clock_ticks(clock: ClockId, frequency: u64) -> u64 {
    ticks_of(clock_gettime(clock), frequency)
}

/// A reading of a kernel clock in ticks of `frequency` Hz.
pub fn ticks_of(time: Timespec, frequency: u64) -> u64 {
    // Only a wall clock set before 1970 is negative; that counts as the epoch.
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    counter::ticks(seconds, nanoseconds, frequency)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost_user_timer_protocol::counter::NS_PER_SEC;

    #[test]
    fn a_counter_never_goes_back_at_any_frequency() {
        for counter in Source::ALL.iter().copied().flat_map(HostCounter::open) {
            for frequency in [1_000, 62_500_000, 1_000_000_000] {
                let mut last = 0;
                for _ in 0..1_000 {
                    let host = counter.read(frequency);
                    assert!(host >= last, "{counter:?}");
                    last = host;
                }
            }
        }
    }

    #[test]
    fn the_monotonic_source_is_clock_monotonic_at_any_frequency() {
        let counter = HostCounter::open(Source::Monotonic).unwrap();
        assert_eq!(counter, HostCounter::MONOTONIC);
        for frequency in [62_500_000, NS_PER_SEC] {
            let before = clock_ticks(ClockId::Monotonic, frequency);
            let read = counter.read(frequency);
            let after = clock_ticks(ClockId::Monotonic, frequency);
            assert!((before..=after).contains(&read));
        }
    }

    #[test]
    fn each_source_has_a_name_and_a_code_of_its_own_and_state_files_keep_theirs() {
        let codes: Vec<_> = Source::ALL.iter().map(|s| (s.name(), s.code())).collect();
        assert_eq!(
            codes,
            [("monotonic", 1), ("boottime", 2), ("tsc", 3), ("cntvct", 4)]
        );
    }

    #[test]
    fn a_source_of_another_architecture_is_refused() {
        let foreign = if cfg!(target_arch = "aarch64") {
            Source::Tsc
        } else {
            Source::Cntvct
        };
        let error = HostCounter::open(foreign).unwrap_err();
        assert_eq!(error, SourceError::WrongArchitecture(foreign));
    }
}
