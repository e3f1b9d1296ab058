//! The architecture's virtual counter, as a program reads it.

#![cfg_attr(
    target_arch = "aarch64",
    expect(unsafe_code, reason = "registers are read by assembly")
)]

#[cfg(target_arch = "aarch64")]
use std::arch::asm;

/// CNTVCT_EL0. It is read after `seen` is known: the branch depends on that value, and ISB waits
/// for the branch. Without both, the CPU may read the counter before it loads the value.
#[cfg(target_arch = "aarch64")]
pub(crate) fn read_after(seen: u64) -> u64 {
    let count;
    // SAFETY: Linux lets programs read this register. Nothing else is changed.
    unsafe {
        asm!(
            "cbz {seen}, 2f",
            "2: isb",
            "mrs {count}, cntvct_el0",
            seen = in(reg) seen,
            count = lateout(reg) count,
            options(nostack, preserves_flags),
        );
    };
    count
}

/// CNTFRQ_EL0, in Hz.
#[cfg(target_arch = "aarch64")]
pub(crate) fn frequency() -> u64 {
    let frequency;
    // SAFETY: Linux lets programs read this register. Nothing else is changed.
    unsafe {
        asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nomem, nostack, preserves_flags));
    };
    frequency
}

/// CLOCK_MONOTONIC, in ns, so that the unit tests run on any machine.
#[cfg(not(target_arch = "aarch64"))]
pub(crate) fn read_after(_seen: u64) -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or_default()
}

/// In Hz.
#[cfg(not(target_arch = "aarch64"))]
pub(crate) fn frequency() -> u64 {
    1_000_000_000
}
