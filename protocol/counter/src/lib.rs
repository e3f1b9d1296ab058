//! Host counters: what a VM's counter is an offset of.
//!
//! The backend and the frontend read the same sources through this crate, so both derive the same
//! count to the tick. Frequencies are in Hz; counts are modulo 2^64. All the assembly of the
//! project is here.
//!
//! To add a source, write a file with a type that implements `HostSource` and add one line to
//! `sources!`. Its name on command lines, its code in state files and the frontend's reader follow.

mod boottime;
mod cntvct;
mod monotonic;
mod order;
mod tsc;

pub use order::{stores_before_reading, zero_after};

use rustix::time::{ClockId, Timespec, clock_gettime};
use vhost_user_timer_protocol::{CounterSource, counter};

/// Why a source of the host counter cannot be used on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// CPUs of this architecture have no such counter.
    #[error(
        "counter source {0} does not exist on {arch}",
        arch = std::env::consts::ARCH
    )]
    WrongArchitecture(Source),
    /// This CPU's time-stamp counter may change its rate or stop.
    #[error(
        "counter source tsc is not usable: this CPU's time-stamp counter is not invariant \
         (CPUID 80000007h EDX bit 8)"
    )]
    TscNotInvariant,
}

/// One source of the host counter.
trait HostSource {
    /// The name on command lines.
    const NAME: &'static str;
    /// The code in state files. Never reused.
    const CODE: u32;
    /// Whether the frequency may be measured at each start, and so differ from one to the next.
    const MEASURED: bool = false;
    /// The kernel clock that stops when this counter does. Alarms are set on it.
    const KERNEL_CLOCK: ClockId = ClockId::Monotonic;

    /// The counter's own frequency, Hz, at least 1.
    fn frequency() -> Result<u64, SourceError>;

    /// The counter in ticks of `to` Hz, where `from` is its own frequency, Hz. Both are at least 1.
    /// Reads after every load whose value was branched on.
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
            /// Every source, those of other architectures included.
            pub const ALL: &[Source] = &[$(Source::$name),*];

            /// The name on command lines.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Source::$name => <$source>::NAME,)*
                }
            }

            /// The code in state files ([`CounterId`]).
            pub const fn code(self) -> u32 {
                match self {
                    $(Source::$name => <$source>::CODE,)*
                }
            }

            /// The source of a code in state files; `None` for a code of a later version.
            pub fn from_code(code: u32) -> Option<Self> {
                let mut all = Source::ALL.iter().copied();
                all.find(|source| source.code() == code)
            }

            /// The kernel clock that stops when this counter does: the one to set an alarm on.
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

/// As GET_INFO gives it.
impl From<Source> for CounterSource {
    fn from(source: Source) -> Self {
        match source {
            Source::Monotonic => CounterSource::Monotonic,
            Source::Boottime => CounterSource::Boottime,
            Source::Tsc => CounterSource::Tsc,
            Source::Cntvct => CounterSource::Cntvct,
        }
    }
}

impl Source {
    /// The source to use where none is named. On AArch64 the guest's counter is an offset of
    /// CNTVCT_EL0 (Linux, arch/arm64/kvm/arch_timer.c), so only that source gives offsets that
    /// a hypervisor can take. Elsewhere no source does, and CLOCK_MONOTONIC serves.
    pub const DEFAULT: Source = if cfg!(target_arch = "aarch64") {
        Source::Cntvct
    } else {
        Source::Monotonic
    };
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Identifies a host counter in a state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterId {
    /// [`Source::code`].
    pub source: u32,
    /// The counter's own frequency, Hz. If it was measured, it is kept for the life of the VM.
    pub frequency: u64,
}

/// A source that exists on this host, ready to be read.
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

    /// Makes a source ready to be read. Takes 4 ms where its frequency has to be measured.
    ///
    /// # Errors
    ///
    /// [`SourceError`] if this host has no such counter, or an unreliable one.
    pub fn open(source: Source) -> Result<Self, SourceError> {
        Ok(HostCounter {
            source,
            frequency: source.frequency()?,
        })
    }

    /// The same source at `frequency` Hz, which was measured earlier: a new measurement would
    /// differ, and the count would jump. A source whose frequency is not measured keeps its own.
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

    /// Which source this is.
    pub fn source(&self) -> Source {
        self.source
    }

    /// This counter's identity in a state file.
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

    /// The counter in ticks of `frequency` Hz (at least 1). Reads after every load whose value was
    /// branched on; see [`zero_after`] and [`stores_before_reading`] for the other directions.
    #[inline]
    pub fn read(&self, frequency: u64) -> u64 {
        self.source.read(self.frequency, frequency)
    }
}

/// A kernel clock now, in ticks of `frequency` Hz (at least 1).
pub fn clock_ticks(clock: ClockId, frequency: u64) -> u64 {
    ticks_of(clock_gettime(clock), frequency)
}

/// `time`, read from a kernel clock, in ticks of `frequency` Hz (at least 1).
pub fn ticks_of(time: Timespec, frequency: u64) -> u64 {
    // Negative only if the wall clock is set before 1970, which counts as 1970.
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    counter::ticks(seconds, nanoseconds, frequency)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use vhost_user_timer_protocol::counter::NS_PER_SEC;

    /// The counters of this host; each of the others is reported.
    fn usable() -> impl Iterator<Item = HostCounter> {
        let open = |source| HostCounter::open(source).inspect_err(|e| eprintln!("skipped: {e}"));
        Source::ALL.iter().copied().flat_map(open)
    }

    #[test]
    fn a_counter_never_goes_back_at_any_frequency() {
        for counter in usable() {
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
    fn a_counter_never_goes_back_from_one_thread_to_another() {
        for counter in usable() {
            let (published, both) = (AtomicU64::new(0), Barrier::new(2));
            let reader = || {
                both.wait();
                for _ in 0..10_000 {
                    let before = published.load(Ordering::Acquire);
                    // The branch that the reading follows.
                    if before == u64::MAX {
                        return;
                    }
                    let count = counter.read(counter.native_frequency());
                    assert!(count >= before, "{counter:?}: {count} after {before}");
                    published.fetch_max(count, Ordering::Release);
                }
            };
            std::thread::scope(|scope| {
                scope.spawn(reader);
                scope.spawn(reader);
            });
        }
    }

    #[test]
    fn a_counter_advances_at_its_own_frequency() {
        /// Nanoseconds of CLOCK_MONOTONIC.
        const SPAN: u64 = 10_000_000;
        let monotonic = || HostCounter::MONOTONIC.read(NS_PER_SEC);
        for counter in usable() {
            let frequency = counter.native_frequency();
            let before = monotonic();
            let first = counter.read(frequency);
            let start = monotonic();
            while monotonic() - start < SPAN {
                std::hint::spin_loop();
            }
            let end = monotonic();
            let last = counter.read(frequency);
            let after = monotonic();
            let ticks = last - first;
            let least = counter::scale(end - start, NS_PER_SEC, frequency);
            let most = counter::scale(after - before, NS_PER_SEC, frequency);
            // A thousandth for a measured frequency, and a tick for rounding.
            let error = least / 1_000 + 1;
            assert!(
                (least - error..=most + error).contains(&ticks),
                "{counter:?}: {ticks} ticks, expected {least} to {most}"
            );
        }
    }

    #[test]
    fn a_measured_frequency_is_kept_and_any_other_is_the_counters_own() {
        for counter in usable() {
            let kept = counter.at_rate(12_345).native_frequency();
            let own = counter.native_frequency();
            let expected = if counter.source() == Source::Tsc {
                12_345
            } else {
                own
            };
            assert_eq!(kept, expected, "{counter:?}");
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
        for source in Source::ALL {
            assert_eq!(Source::from_code(source.code()), Some(*source));
        }
        assert_eq!(Source::from_code(0), None);
        assert_eq!(Source::from_code(5), None);
    }

    #[test]
    fn the_default_source_is_what_a_guests_counter_is_an_offset_of_and_can_be_opened() {
        let expected = if cfg!(target_arch = "aarch64") {
            Source::Cntvct
        } else {
            Source::Monotonic
        };
        assert_eq!(Source::DEFAULT, expected);
        assert_eq!(
            HostCounter::open(Source::DEFAULT).unwrap().source(),
            expected
        );
    }

    #[test]
    fn each_source_is_given_by_info_under_its_own_name() {
        for &source in Source::ALL {
            assert_eq!(CounterSource::from(source).to_string(), source.name());
        }
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
