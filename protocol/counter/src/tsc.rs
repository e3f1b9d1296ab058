//! The x86-64 time-stamp counter (Intel SDM vol. 3, 20.17).

use vhost_user_timer_protocol::counter::scale;

use crate::{HostSource, SourceError};

pub(crate) struct Tsc;

impl HostSource for Tsc {
    const NAME: &'static str = "tsc";
    const CODE: u32 = 3;
    const MEASURED: bool = true;

    fn frequency() -> Result<u64, SourceError> {
        cpu::frequency()
    }

    #[inline]
    fn read(from: u64, to: u64) -> u64 {
        scale(cpu::tsc(), from, to)
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the counter is read by instructions")]
mod cpu {
    use core::arch::x86_64::{_mm_lfence, _rdtsc};
    use std::time::Duration;

    use raw_cpuid::CpuId;
    use rustix::time::{ClockId, clock_gettime};

    use crate::SourceError;

    /// The time-stamp counter, ticks. RDTSC alone may be executed early; LFENCE makes it follow
    /// every load before it (Intel SDM vol. 2, RDTSC).
    #[inline]
    pub(super) fn tsc() -> u64 {
        // SAFETY: every x86-64 CPU has SSE2, and with it LFENCE.
        unsafe { _mm_lfence() };
        // SAFETY: every x86-64 CPU has RDTSC, and Linux leaves it to user space (CR4.TSD is 0).
        unsafe { _rdtsc() }
    }

    /// How long the counter is compared with CLOCK_MONOTONIC where neither the CPU nor a hypervisor
    /// states its frequency: long enough for an error of about 10 ppm, short enough not to delay
    /// the start.
    const CALIBRATION: Duration = Duration::from_millis(4);

    /// Ticks per second.
    pub(super) fn frequency() -> Result<u64, SourceError> {
        let cpuid = CpuId::new();
        cpuid
            .get_advanced_power_mgmt_info()
            .filter(|info| info.has_invariant_tsc())
            .ok_or(SourceError::TscNotInvariant)?;
        let stated_by_cpu = || cpuid.get_tsc_info()?.tsc_frequency();
        let stated_by_hypervisor = || {
            let khz = cpuid.get_hypervisor_info()?.tsc_frequency()?;
            Some(u64::from(khz) * 1_000)
        };
        Ok(stated_by_cpu()
            .or_else(stated_by_hypervisor)
            .filter(|hz| *hz != 0)
            .unwrap_or_else(measured))
    }

    /// Ticks per second by CLOCK_MONOTONIC, at least 1.
    fn measured() -> u64 {
        let (start, first) = sample();
        while monotonic().saturating_sub(start) < CALIBRATION {
            std::hint::spin_loop();
        }
        let (end, last) = sample();
        let ticks = u128::from(last.wrapping_sub(first));
        let ns = end.saturating_sub(start).as_nanos().max(1);
        u64::try_from(ticks * 1_000_000_000 / ns)
            .unwrap_or(1)
            .max(1)
    }

    /// CLOCK_MONOTONIC and the counter at the same instant: of a few tries, the one whose two clock
    /// readings around the counter's lie closest together.
    fn sample() -> (Duration, u64) {
        (0..8)
            .map(|_| {
                let before = monotonic();
                let ticks = tsc();
                let width = monotonic().saturating_sub(before);
                (width, before + width / 2, ticks)
            })
            .min_by_key(|(width, ..)| *width)
            .map_or((Duration::ZERO, 0), |(_, time, ticks)| (time, ticks))
    }

    fn monotonic() -> Duration {
        Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn two_measured_frequencies_agree_within_a_thousandth() {
            let (a, b) = (measured(), measured());
            assert!(a.abs_diff(b) < a / 1_000, "{a} Hz, {b} Hz");
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod cpu {
    use crate::{Source, SourceError};

    /// Never called: there is no frequency, so the source cannot be opened.
    pub(super) fn tsc() -> u64 {
        0
    }

    pub(super) fn frequency() -> Result<u64, SourceError> {
        Err(SourceError::WrongArchitecture(Source::Tsc))
    }
}
