//! The order of memory accesses and readings of a counter.
//!
//! A fence orders memory accesses among themselves. The reading of a counter is not a memory
//! access, so a CPU may move it across a fence; these functions tie the two together. A load that
//! comes *before* a reading needs no function: [`HostCounter::read`](crate::HostCounter::read)
//! follows every load whose value was branched on.

use core::sync::atomic::{Ordering, fence};

/// Returns 0, computed from `reading`, the reading of a clock or counter. A load from an address
/// to which this 0 was added happens after the reading, because the CPU cannot know the address
/// earlier.
///
/// ```
/// use core::sync::atomic::{AtomicU64, Ordering};
/// use vhost_user_timer_counter::{HostCounter, zero_after};
///
/// let sequence = [AtomicU64::new(2)];
/// let before = sequence[0].load(Ordering::Acquire);
/// let count = HostCounter::MONOTONIC.read(1_000_000_000);
/// // Equal only if the sequence number was still the same when the counter was read.
/// assert_eq!(sequence[zero_after(count)].load(Ordering::Relaxed), before);
/// ```
#[inline]
pub fn zero_after(reading: u64) -> usize {
    let zero: u64;
    // In assembly, or the compiler would see that the result is always 0. AND, because CPUs take
    // `xor r, r` for a constant and do not wait for `r`.
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "assembly")]
    // SAFETY: AND with 0 changes one register and the flags.
    unsafe {
        core::arch::asm!("and {0}, 0", inout(reg) reading => zero, options(pure, nomem, nostack));
    }
    // EOR of a register with itself still depends on that register: the architecture orders a load
    // from an address computed from it (Arm ARM B2.3, address dependency).
    #[cfg(target_arch = "aarch64")]
    #[expect(unsafe_code, reason = "assembly")]
    // SAFETY: EOR changes one register, not the flags.
    unsafe {
        core::arch::asm!(
            "eor {0}, {1}, {1}",
            out(reg) zero,
            in(reg) reading,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    // Elsewhere all sources are kernel clocks, which end their reading with a barrier.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        _ = reading;
        zero = 0;
        fence(Ordering::SeqCst);
    }
    zero as usize
}

/// Makes every store before this visible to all CPUs before a counter is read after it.
#[inline]
pub fn stores_before_reading() {
    fence(Ordering::SeqCst);
    // The fence is a DMB here, which orders stores with later loads but not with later readings of
    // a counter. DSB completes only when the stores are visible (Arm ARM B2.3.10).
    #[cfg(target_arch = "aarch64")]
    #[expect(unsafe_code, reason = "assembly")]
    // SAFETY: a barrier changes no register and no memory.
    unsafe {
        core::arch::asm!("dsb ish", options(nostack, preserves_flags));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_after_any_reading_is_zero() {
        for reading in [0, 1, 1 << 63, u64::MAX] {
            assert_eq!(zero_after(reading), 0);
        }
    }
}
