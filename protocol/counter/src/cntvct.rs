//! The AArch64 virtual counter, CNTVCT_EL0 (Arm ARM D12.1.2).

use vhost_user_timer_protocol::counter::scale;

use crate::{HostSource, Source, SourceError};

pub(crate) struct Cntvct;

impl HostSource for Cntvct {
    const NAME: &'static str = "cntvct";
    const CODE: u32 = 4;

    fn frequency() -> Result<u64, SourceError> {
        registers::cntfrq().ok_or(SourceError::WrongArchitecture(Source::Cntvct))
    }

    #[inline]
    fn read(from: u64, to: u64) -> u64 {
        scale(registers::cntvct(), from, to)
    }
}

#[cfg(target_arch = "aarch64")]
#[expect(unsafe_code, reason = "the counter is read by instructions")]
mod registers {
    use core::arch::asm;

    /// CNTVCT_EL0, ticks.
    ///
    /// A CPU may read the counter early, before the instructions in front of it. ISB prevents that:
    /// the reading follows every load whose value was branched on (Arm ARM D12.1.2), such as a
    /// lock, a ring index or a sequence number. FEAT_ECV's CNTVCTSS_EL0 would do without the ISB;
    /// most CPUs do not have it.
    #[inline]
    pub(super) fn cntvct() -> u64 {
        let count: u64;
        // SAFETY: Linux lets user space read the virtual counter (CNTKCTL_EL1.EL0VCTEN). It changes
        // one register. `nomem` is left out, so that the compiler moves no load or store across.
        unsafe {
            asm!("isb", "mrs {count}, cntvct_el0", count = out(reg) count,
                 options(nostack, preserves_flags));
        }
        count
    }

    /// CNTFRQ_EL0, Hz; 1 where firmware left it 0, which would have left Linux without a clock.
    pub(super) fn cntfrq() -> Option<u64> {
        let frequency: u64;
        // SAFETY: Linux lets user space read CNTFRQ_EL0 where it lets it read the counter. It
        // changes one register.
        unsafe {
            asm!("mrs {frequency}, cntfrq_el0", frequency = out(reg) frequency,
                 options(nomem, nostack, preserves_flags));
        }
        Some(frequency.max(1))
    }
}

#[cfg(not(target_arch = "aarch64"))]
mod registers {
    /// Never called: there is no frequency, so the source cannot be opened.
    pub(super) fn cntvct() -> u64 {
        0
    }

    pub(super) fn cntfrq() -> Option<u64> {
        None
    }
}

#[cfg(all(test, target_arch = "aarch64"))]
mod tests {
    use super::registers::{cntfrq, cntvct};
    use crate::{HostCounter, Source};

    #[test]
    fn the_source_is_cntvct_at_the_frequency_that_cntfrq_tells() {
        let counter = HostCounter::open(Source::Cntvct).unwrap();
        let frequency = cntfrq().unwrap();
        assert_eq!(counter.native_frequency(), frequency);
        let before = cntvct();
        let read = counter.read(frequency);
        let after = cntvct();
        assert!((before..=after).contains(&read));
    }
}
