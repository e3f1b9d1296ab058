//! What the timer device lets the clock device know.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost_user_timer_model::vm::{GuestCounter, Now, OpenRestore, ns_of_ticks};

use crate::device::clock::{GuestTime, GuestTimeGuard};
use crate::device::timer::{TimerDevice, TimerState};

/// For how long a restore without a time-out holds the clock device's frontend back.
const LONGEST_HOLD: Duration = Duration::from_secs(60);

/// What an open restore waits for, as the log names it.
fn awaited(restore: &OpenRestore) -> String {
    match restore.missing {
        0 => "every vCPU is restored, and CONFIRM_RUN is missing".to_owned(),
        missing => format!("{missing} vCPUs are missing"),
    }
}

impl GuestTimeGuard for MutexGuard<'_, TimerState> {
    fn host_count(&mut self) -> u64 {
        self.now().host
    }

    fn guest_counter(&self, host: u64) -> GuestCounter {
        self.vm.guest_counter(Now::at(host))
    }
}

impl GuestTime for TimerDevice {
    fn lock(&self) -> impl GuestTimeGuard {
        let _first = self.turnstile.enter();
        self.state()
    }

    /// Waits while a restore is open, in ARMED too: until the VM runs or is paused, the restore's
    /// time-out passes, or the wait is canceled. A restore without a time-out holds for 60 s at
    /// most.
    fn hold(&self, canceled: &AtomicBool) {
        let first = self.turnstile.enter();
        let mut state = self.state();
        drop(first);
        let began = Instant::now();
        let mut logged = false;
        while !canceled.load(Ordering::Acquire) {
            let now = state.now();
            let Some(restore) = state.vm.open_restore(now) else {
                break;
            };
            if !std::mem::replace(&mut logged, true) {
                log::info!(
                    "Holding the clock device's frontend back: a restore is open, and {}",
                    awaited(&restore)
                );
            }
            let left = match restore.ticks_left {
                None => LONGEST_HOLD.saturating_sub(began.elapsed()),
                Some(ticks) => Duration::from_nanos(ns_of_ticks(ticks, state.vm.frequency())),
            };
            if restore.overdue || left.is_zero() {
                log::error!(
                    "The clock device's frontend is released, though a restore is open after {} ms \
                     and {}: its vCPUs may see another time than those that run later",
                    began.elapsed().as_millis(),
                    awaited(&restore)
                );
                return;
            }
            let waited = self.phase_changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if logged {
            log::info!(
                "The clock device's frontend was held back for {} ms",
                began.elapsed().as_millis()
            );
        }
    }

    fn wake_held(&self) {
        // A thread that is about to wait has the lock.
        let _first = self.turnstile.enter();
        drop(self.state());
        self.phase_changed.notify_all();
    }
}
