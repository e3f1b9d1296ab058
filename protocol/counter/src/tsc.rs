//! The x86-64 time-stamp counter (Intel SDM vol. 3, 20.17).

use crate::{HostSource, SourceError};

pub(crate) struct Tsc;

impl HostSource for Tsc {
    const NAME: &'static str = "tsc";
    const CODE: u32 = 3;
    const MEASURED: bool = true;

    #[cfg(target_arch = "x86_64")]
    fn frequency() -> Result<u64, SourceError> {
        cpu::frequency().ok_or(SourceError::TscNotInvariant)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn frequency() -> Result<u64, SourceError> {
        Err(SourceError::WrongArchitecture(crate::Source::Tsc))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn read(from: u64, to: u64) -> u64 {
        vhost_user_timer_protocol::counter::scale(cpu::tsc(), from, to)
    }

    /// Never called: the source cannot be opened here.
    #[cfg(not(target_arch = "x86_64"))]
    fn read(_from: u64, _to: u64) -> u64 {
        0
    }
}

#[cfg(target_arch = "x86_64")]
mod cpu {
    use std::time::Duration;

    use raw_cpuid::CpuId;
    use rustix::time::{ClockId, clock_gettime};

    /// The x86-64 time-stamp counter (Intel SDM vol. 3, 20.17), read after everything before it in
    /// program order.
    pub(super) fn tsc() -> u64 {
        use core::arch::x86_64::{_mm_lfence, _rdtsc};
        // SAFETY: SSE2, and with it LFENCE, is part of every x86-64 CPU.
        unsafe { _mm_lfence() };
        // SAFETY: RDTSC is part of every x86-64 CPU, and no kernel that Rust's std runs on turns
        // it off (CR4.TSD).
        unsafe { _rdtsc() }
    }

    /// How long the counter is compared with CLOCK_MONOTONIC where the CPU does not tell its
    /// frequency: long enough for some 10 ppm, short enough not to be felt at start-up.
    const CALIBRATION: Duration = Duration::from_millis(4);

    /// Ticks per second; `None` where the counter is not invariant.
    pub(super) fn frequency() -> Option<u64> {
        let cpuid = CpuId::new();
        cpuid
            .get_advanced_power_mgmt_info()
            .filter(|info| info.has_invariant_tsc())?;
        // The CPU's own word (leaf 15h), then a hypervisor's (leaf 40000010h, kHz), then a
        // measurement.
        let told = cpuid.get_tsc_info().and_then(|info| info.tsc_frequency());
        let hypervisor = || {
            let khz = cpuid.get_hypervisor_info()?.tsc_frequency()?;
            Some(u64::from(khz) * 1_000)
        };
        told.or_else(hypervisor)
            .filter(|hz| *hz != 0)
            .or_else(|| Some(measured()))
    }

    fn measured() -> u64 {
        let monotonic =
            || Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default();
        // The pair whose two clock readings lie closest together, out of a few.
        let sample = || {
            (0..8)
                .map(|_| {
                    let before = monotonic();
                    let ticks = tsc();
                    let after = monotonic();
                    (
                        after.saturating_sub(before),
                        before + (after.saturating_sub(before)) / 2,
                        ticks,
                    )
                })
                .min_by_key(|(width, ..)| *width)
                .map_or((Duration::ZERO, 0), |(_, time, ticks)| (time, ticks))
        };
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

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_measured_frequency_agrees_with_the_monotonic_clock() {
            // Two measurements, whatever else the machine does, agree within a thousandth.
            let (a, b) = (measured(), measured());
            assert!(a.abs_diff(b) < a / 1_000, "{a} Hz, {b} Hz");
        }
    }
}
