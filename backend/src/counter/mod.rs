//! The host counter, and the alarm that goes off when it reaches a value.
//!
//! The model in [`vm`](crate::vm) reads no clock. Here are the clocks: what a guest's counter
//! is derived from, in ticks of the VM's frequency.

mod alarm;
#[cfg(target_arch = "aarch64")]
mod cntvct;
#[cfg(target_arch = "x86_64")]
mod tsc;
pub mod wall;

pub use alarm::Alarm;

use rustix::time::{ClockId, Timespec, clock_gettime};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use vhost_user_timer_protocol::counter::scale;
use vhost_user_timer_protocol::counter::{self, NS_PER_SEC};

use crate::state::file::CounterId;
use crate::vm::{Now, Vm};

/// What the host counter is derived from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Source {
    /// CLOCK_MONOTONIC: stands still while the host is suspended.
    Monotonic,
    /// CLOCK_BOOTTIME: counts while the host is suspended.
    Boottime,
    /// The time-stamp counter (x86-64).
    Tsc,
    /// CNTVCT_EL0 (AArch64).
    Cntvct,
}

/// Why a counter source can't be used here.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The CPU has no such counter.
    #[error(
        "Counter source {source_name} is not for {}; use --counter-source monotonic",
        std::env::consts::ARCH
    )]
    WrongArchitecture {
        /// The source asked for.
        source_name: &'static str,
    },
    /// The time-stamp counter changes its rate or stops.
    #[error(
        "This CPU's time-stamp counter is not invariant (CPUID 80000007h EDX bit 8); \
         use --counter-source monotonic"
    )]
    TscNotInvariant,
}

#[derive(Clone, Copy, Debug)]
enum Reader {
    Monotonic,
    Boottime,
    #[cfg(target_arch = "x86_64")]
    Tsc {
        frequency: u64,
    },
    #[cfg(target_arch = "aarch64")]
    Cntvct {
        frequency: u64,
    },
}

/// A host counter that can be read.
#[derive(Clone, Copy, Debug)]
pub struct Counter(Reader);

impl Counter {
    /// Makes the source ready for reading.
    ///
    /// # Errors
    ///
    /// [`SourceError`] where this host has no such counter, or none to rely on.
    pub fn open(source: Source) -> Result<Self, SourceError> {
        match source {
            Source::Monotonic => Ok(Counter(Reader::Monotonic)),
            Source::Boottime => Ok(Counter(Reader::Boottime)),
            #[cfg(target_arch = "x86_64")]
            Source::Tsc => Ok(Counter(Reader::Tsc {
                frequency: tsc::frequency().ok_or(SourceError::TscNotInvariant)?,
            })),
            #[cfg(not(target_arch = "x86_64"))]
            Source::Tsc => Err(SourceError::WrongArchitecture { source_name: "tsc" }),
            #[cfg(target_arch = "aarch64")]
            Source::Cntvct => Ok(Counter(Reader::Cntvct {
                frequency: cntvct::frequency(),
            })),
            #[cfg(not(target_arch = "aarch64"))]
            Source::Cntvct => Err(SourceError::WrongArchitecture {
                source_name: "cntvct",
            }),
        }
    }

    /// The same source at the rate that was found for it before, Hz. Where the rate is measured, a
    /// second measurement would differ, and the count jump.
    pub fn at_rate(self, frequency: u64) -> Self {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Reader::Tsc { .. } => Counter(Reader::Tsc {
                frequency: frequency.max(1),
            }),
            _ => self,
        }
    }

    /// What tells this source from others in a state file.
    pub fn id(&self) -> CounterId {
        CounterId {
            source: match self.0 {
                Reader::Monotonic => 1,
                Reader::Boottime => 2,
                #[cfg(target_arch = "x86_64")]
                Reader::Tsc { .. } => 3,
                #[cfg(target_arch = "aarch64")]
                Reader::Cntvct { .. } => 4,
            },
            frequency: self.native_frequency(),
        }
    }

    /// The rate at which the source itself counts, Hz: 10⁹ for the kernel's clocks.
    pub fn native_frequency(&self) -> u64 {
        match self.0 {
            Reader::Monotonic | Reader::Boottime => NS_PER_SEC,
            #[cfg(target_arch = "x86_64")]
            Reader::Tsc { frequency } => frequency,
            #[cfg(target_arch = "aarch64")]
            Reader::Cntvct { frequency } => frequency,
        }
    }

    /// The source in ticks of `frequency` Hz.
    fn ticks(&self, frequency: u64) -> u64 {
        match self.0 {
            Reader::Monotonic => clock_ticks(ClockId::Monotonic, frequency),
            Reader::Boottime => clock_ticks(ClockId::Boottime, frequency),
            #[cfg(target_arch = "x86_64")]
            Reader::Tsc { frequency: from } => scale(counter::tsc(), from, frequency),
            #[cfg(target_arch = "aarch64")]
            Reader::Cntvct { frequency: from } => scale(cntvct::read(), from, frequency),
        }
    }

    /// The VM's instant: its host counter, by the anchor where the VMM gave one, and the wall
    /// clock where the VM wants it.
    pub fn now(&self, vm: &Vm) -> Now {
        let frequency = vm.frequency();
        let host = match vm.anchor() {
            Some(anchor) => anchor.host(clock_ticks(ClockId::Monotonic, NS_PER_SEC), frequency),
            None => self.ticks(frequency),
        };
        let realtime_ns = if vm.wants_realtime() {
            clock_ticks(ClockId::Realtime, NS_PER_SEC)
        } else {
            0
        };
        Now { host, realtime_ns }
    }
}

/// A kernel clock in ticks of `frequency` Hz.
pub(crate) fn clock_ticks(clock: ClockId, frequency: u64) -> u64 {
    ticks_of(clock_gettime(clock), frequency)
}

fn ticks_of(time: Timespec, frequency: u64) -> u64 {
    // Only a wall clock set before 1970 is negative; it is the epoch, then.
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    counter::ticks(seconds, nanoseconds, frequency)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Profile;

    #[test]
    fn a_counter_never_goes_back_and_runs_at_the_vms_frequency() {
        let sources = [Source::Monotonic, Source::Boottime, Source::Tsc];
        for counter in sources.map(Counter::open).into_iter().flatten() {
            for frequency in [1_000, 62_500_000, 1_000_000_000] {
                let vm = Vm::new(Profile {
                    max_vcpus: 1,
                    request_queues: 1,
                    frequency,
                    frequency_fixed: false,
                });
                let mut last = 0;
                for _ in 0..1_000 {
                    let host = counter.now(&vm).host;
                    assert!(host >= last, "{counter:?}");
                    last = host;
                }
            }
        }
    }

    #[test]
    fn the_monotonic_source_is_clock_monotonic_at_any_frequency() {
        let counter = Counter::open(Source::Monotonic).unwrap();
        for frequency in [62_500_000, NS_PER_SEC] {
            let before = clock_ticks(ClockId::Monotonic, frequency);
            let read = counter.ticks(frequency);
            let after = clock_ticks(ClockId::Monotonic, frequency);
            assert!((before..=after).contains(&read));
        }
    }
}
