//! What the clock device may ask of the timer device.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_user_timer_model::rtc::{BadRecord, Counter as ClockCounter, RtcRecord, Sample};
use vhost_user_timer_model::vm::{GuestCounter, Now, ns_of_ticks};

use crate::device::DeviceError;
use crate::device::clock::wall;
use crate::device::timer::{TimerDevice, TimerState};

/// For how long a restore without a time-out holds the clock device's frontend back.
const LONGEST_HOLD: Duration = Duration::from_secs(60);

impl TimerDevice {
    /// What the host's clocks read, and the guest's virtual counter at the same instant. A VM that
    /// nobody configured has the counter offset that it was `told` to have, or none.
    pub(in crate::device) fn sample_with_counter(&self, tai: bool, told: Option<u64>) -> Sample {
        let mut state = self.state();
        let (sample, host, _) = wall::sample_with(tai, || state.now().host);
        let counter = match state.vm.guest_counter(Now::at(host)) {
            GuestCounter::Running(count) => ClockCounter::At(count),
            GuestCounter::Stopped => ClockCounter::Withheld,
            GuestCounter::Unconfigured => told.map_or(ClockCounter::Unknown, |offset| {
                ClockCounter::At(host.wrapping_sub(offset))
            }),
        };
        Sample { counter, ..sample }
    }

    /// What `make` makes of the clock device that the state file has, where it has one.
    pub(in crate::device) fn former_clocks<T>(
        &self,
        make: impl FnOnce(&RtcRecord) -> Result<T, BadRecord>,
    ) -> Result<Option<T>, DeviceError> {
        let state = self.state();
        let Some((file, record)) = state.file.as_ref().and_then(|f| Some((f, f.clock()?))) else {
            return Ok(None);
        };
        let made = make(&record).map_err(|bad| file.damaged(&bad))?;
        Ok(Some(made))
    }

    /// Takes the clock device into the state file.
    pub(in crate::device) fn persist_clock(&self, record: &RtcRecord) {
        let mut state = self.state();
        let TimerState {
            vm, file, effects, ..
        } = &mut *state;
        if let Some(file) = file {
            file.commit_clock(vm, &mut effects.changed, record);
        }
    }

    /// Waits while a restore is open, so that no vCPU runs before it ends: until it ends, its time-out
    /// passes, or `canceled` is set and [`wake_held`](Self::wake_held) called. A restore without a
    /// time-out holds for [`LONGEST_HOLD`] at most.
    pub(in crate::device) fn hold_while_restoring(&self, canceled: &AtomicBool) {
        let mut state = self.state();
        let began = Instant::now();
        let mut logged = false;
        while !canceled.load(Ordering::Acquire) {
            let now = state.now();
            let Some(restore) = state.vm.open_restore(now) else {
                break;
            };
            if !std::mem::replace(&mut logged, true) {
                log::info!(
                    "Holding the clock device's frontend back: a restore is open, and {} vCPUs are \
                     missing",
                    restore.missing
                );
            }
            let left = match restore.ticks_left {
                None => LONGEST_HOLD.saturating_sub(began.elapsed()),
                Some(ticks) => Duration::from_nanos(ns_of_ticks(ticks, state.vm.frequency())),
            };
            if restore.overdue || left.is_zero() {
                log::error!(
                    "The clock device's frontend is let go on, though a restore is open after {} ms \
                     and {} vCPUs are missing: they may see another time than those that run",
                    began.elapsed().as_millis(),
                    restore.missing
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

    /// Wakes threads in [`hold_while_restoring`](Self::hold_while_restoring).
    pub(in crate::device) fn wake_held(&self) {
        // A thread that is about to wait has the lock.
        drop(self.state());
        self.phase_changed.notify_all();
    }
}
