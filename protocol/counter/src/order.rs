//! Ordering of loads after the reading of a counter.

/// 0, which no CPU knows before it knows the `reading` of a clock or counter: what is loaded from an
/// address to which it was added is loaded after that. A fence orders loads among each other, and the
/// reading of a counter is none.
pub fn zero_after(reading: u64) -> usize {
    let zero: u64;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it changes a register and flags, and nothing else.
    unsafe {
        core::arch::asm!("and {0}, 0", inout(reg) reading => zero, options(pure, nomem, nostack));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: it changes a register, and nothing else.
    unsafe {
        core::arch::asm!(
            "eor {0}, {1}, {1}",
            out(reg) zero,
            in(reg) reading,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        zero = 0;
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }
    zero as usize
}
