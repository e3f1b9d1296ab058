//! The AArch64 virtual counter (Arm ARM D12.1.2).

use std::arch::asm;

/// CNTVCT_EL0, read after everything before it in program order.
pub(super) fn read() -> u64 {
    let count: u64;
    // SAFETY: Linux lets EL0 read the virtual counter (CNTKCTL_EL1.EL0VCTEN); reading it
    // touches no memory and no flags.
    unsafe {
        asm!("isb", "mrs {count}, cntvct_el0", count = out(reg) count,
             options(nomem, nostack, preserves_flags));
    }
    count
}

/// CNTFRQ_EL0, Hz.
pub(super) fn frequency() -> u64 {
    let frequency: u64;
    // SAFETY: as in `read`.
    unsafe {
        asm!("mrs {frequency}, cntfrq_el0", frequency = out(reg) frequency,
             options(nomem, nostack, preserves_flags));
    }
    // Firmware that left it 0 would have left the kernel without a clock.
    frequency.max(1)
}
