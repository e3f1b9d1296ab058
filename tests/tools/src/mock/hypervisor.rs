//! The mock's hypervisor: where its guests' counts are made.
//!
//! A guest reads the host counter less the offset that the VMM has put in here, and knows of no
//! other. So the count of a vCPU that runs before the offset is in, or while another one is, is
//! wrong, and the demo's verdict shows it.

use std::sync::atomic::{AtomicU64, Ordering};

use vhost_user_timer_frontend::{Info, Timer};
use vhost_user_timer_kit::watch::host_count;

/// Of one VM on one host. Before an offset is put in, its counts are the host counter, as KVM's
/// are for a VM to which nobody gave any.
#[derive(Debug, Default)]
pub(super) struct Hypervisor {
    cntvoff: AtomicU64,
    cntpoff: AtomicU64,
    /// How often offsets were put in.
    times: AtomicU64,
}

impl Hypervisor {
    /// Puts in the offsets of an armed VM: what KVM_ARM_SET_COUNTER_OFFSET is for a real one.
    pub(super) fn put_in(&self, info: &Info) {
        self.cntvoff.store(info.cntvoff, Ordering::SeqCst);
        self.cntpoff.store(info.cntpoff, Ordering::SeqCst);
        self.times.fetch_add(1, Ordering::SeqCst);
    }

    /// The offset of a timer's count, ticks.
    pub(super) fn offset(&self, timer: Timer) -> u64 {
        let offset = match timer {
            Timer::Virtual => &self.cntvoff,
            Timer::Physical => &self.cntpoff,
        };
        offset.load(Ordering::SeqCst)
    }

    /// A timer's count, as a guest reads it now.
    pub(super) fn count(&self, timer: Timer) -> u64 {
        host_count().wrapping_sub(self.offset(timer))
    }

    /// How often offsets were put in.
    pub(super) fn times(&self) -> u64 {
        self.times.load(Ordering::SeqCst)
    }
}
