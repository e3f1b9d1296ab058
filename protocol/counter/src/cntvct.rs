//! The AArch64 virtual counter (Arm ARM D12.1.2).

use crate::{HostSource, SourceError};

pub(crate) struct Cntvct;

impl HostSource for Cntvct {
    const NAME: &'static str = "cntvct";
    const CODE: u32 = 4;

    #[cfg(target_arch = "aarch64")]
    fn frequency() -> Result<u64, SourceError> {
        Ok(cntfrq())
    }

    #[cfg(not(target_arch = "aarch64"))]
    fn frequency() -> Result<u64, SourceError> {
        Err(SourceError::WrongArchitecture(crate::Source::Cntvct))
    }

    #[cfg(target_arch = "aarch64")]
    #[inline]
    fn read(from: u64, to: u64) -> u64 {
        vhost_user_timer_protocol::counter::scale(cntvct(), from, to)
    }

    /// Never called: the source cannot be opened here.
    #[cfg(not(target_arch = "aarch64"))]
    fn read(_from: u64, _to: u64) -> u64 {
        0
    }
}

/// CNTVCT_EL0, read after everything before it in program order.
#[cfg(target_arch = "aarch64")]
fn cntvct() -> u64 {
    let count: u64;
    // SAFETY: Linux lets EL0 read the virtual counter (CNTKCTL_EL1.EL0VCTEN); the read touches no
    // memory and no flags. Without `nomem` the compiler keeps loads and stores on their side of it.
    unsafe {
        std::arch::asm!("isb", "mrs {count}, cntvct_el0", count = out(reg) count,
             options(nostack, preserves_flags));
    }
    count
}

/// CNTFRQ_EL0, Hz.
#[cfg(target_arch = "aarch64")]
fn cntfrq() -> u64 {
    let frequency: u64;
    // SAFETY: as in `cntvct`.
    unsafe {
        std::arch::asm!("mrs {frequency}, cntfrq_el0", frequency = out(reg) frequency,
             options(nomem, nostack, preserves_flags));
    }
    // Firmware that left it 0 would have left the kernel without a clock.
    frequency.max(1)
}
