//! What the clock device may ask about the guest's counter, and nothing else.

use std::sync::atomic::AtomicBool;

use vhost_user_timer_model::vm::GuestCounter;

/// Whatever keeps the guest's counter.
pub trait GuestTime: Send + Sync + 'static {
    /// Locks the guest's counter: as long as this lives, the counter's offset does not change.
    fn lock(&self) -> impl GuestTimeGuard;

    /// Waits while the guest's vCPUs must not run, and logs it. Returns soon after `canceled` is
    /// set and [`wake_held`](Self::wake_held) was called.
    fn hold(&self, canceled: &AtomicBool);

    /// Wakes threads in [`hold`](Self::hold), to look at `canceled`.
    fn wake_held(&self);
}

/// The guest's counter, locked.
pub trait GuestTimeGuard {
    /// What the host counter reads, ticks.
    fn host_count(&mut self) -> u64;

    /// What the guest's virtual counter is at this host count.
    fn guest_counter(&self, host: u64) -> GuestCounter;
}
