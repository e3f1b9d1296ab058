//! The clock device, virtio-rtc: the guest's way to the host's clocks.
//!
//! Its frontend is a VMM that gives the device to its guest; the guest is the driver, and the memory
//! is the guest's. Nothing of the timer device can be reached from here but what the guest reads of
//! its counter anyway, and that a restore is open: for as long as it is, the acknowledgement of
//! SET_VRING_ENABLE is held back. QEMU waits for it before it starts its vCPUs, so a QEMU that knows
//! nothing of the timer device runs none before the gate opens.

mod device;
pub(super) mod wall;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::device::DeviceError;
use crate::device::timer::TimerDevice;
use crate::sys::lock;
use vhost_user_timer_model::rtc::{ClockKind, Effects, Rtc, Sample, Wants};
use wall::WallAlarm;

/// Two samples of clocks that nobody set in between agree on an expiry to this, ns.
const SAME: u64 = 1_000_000;

/// What the operator says of the guest's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockConfig {
    /// What the host's wall clock does at a leap second; found out where it is not said.
    pub utc: Option<UtcKind>,
    /// The counter offset of a VM that nobody configures over the timer device, ticks.
    pub counter_offset: Option<u64>,
}

/// What a wall clock does at a leap second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UtcKind {
    /// It steps, as UTC does
    Utc,
    /// It runs slower or faster for a while, and never steps
    Smeared,
    /// Nobody knows
    MaybeSmeared,
}

impl UtcKind {
    /// What this host's clock does. A kernel that was told how far TAI is from UTC is kept by somebody
    /// who knows of leap seconds, and steps; of any other nobody knows.
    fn of_this_host() -> Self {
        if wall::tai_is_known() {
            UtcKind::Utc
        } else {
            UtcKind::MaybeSmeared
        }
    }
}

/// The clocks, their alarms, and what tells of the alarms: what outlives every connection.
#[derive(Debug)]
pub struct ClockDevice {
    timer: Arc<TimerDevice>,
    counter_offset: Option<u64>,
    tai: bool,
    alarm_fd: RawFd,
    state: Mutex<ClockState>,
}

#[derive(Debug)]
struct ClockState {
    rtc: Rtc,
    effects: Effects,
    alarm: WallAlarm,
    /// The timerfd may be set for another instant than the next alarm's.
    rearm: bool,
}

impl ClockDevice {
    /// A device whose guest counts as the timer device's VM does. With a state file it goes on
    /// with the alarms that a former process left there.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] where the system refuses, or the state file has no valid clocks.
    pub fn new(timer: Arc<TimerDevice>, config: ClockConfig) -> Result<Self, DeviceError> {
        let tai = wall::tai_is_known();
        let utc = match config.utc.unwrap_or_else(UtcKind::of_this_host) {
            UtcKind::Utc => ClockKind::Utc,
            UtcKind::Smeared => ClockKind::UtcSmeared,
            UtcKind::MaybeSmeared => ClockKind::UtcMaybeSmeared,
        };
        // TAI last: the others have the same ids with it and without.
        let mut clocks = vec![utc, ClockKind::Monotonic];
        if tai {
            clocks.push(ClockKind::Tai);
        }
        let former = timer.former_clocks(|record| Rtc::from_record(&clocks, record))?;
        let rtc = former.unwrap_or_else(|| Rtc::new(&clocks));
        let alarm = WallAlarm::new().map_err(DeviceError::Alarm)?;
        let device = ClockDevice {
            timer,
            counter_offset: config.counter_offset,
            tai,
            alarm_fd: alarm.as_raw_fd(),
            state: Mutex::new(ClockState {
                rtc,
                effects: Effects::default(),
                alarm,
                rearm: true,
            }),
        };
        device.follow_time(&mut device.state());
        log::info!("The guest's clocks: {clocks:?}");
        Ok(device)
    }

    fn state(&self) -> MutexGuard<'_, ClockState> {
        lock(&self.state)
    }

    fn sample(&self) -> Sample {
        wall::sample(self.tai)
    }

    fn sample_for(&self, wants: Wants) -> Sample {
        match wants {
            Wants::Nothing => Sample::default(),
            Wants::Clock(kind) => wall::sample_of(kind, self.tai),
            Wants::Time => self.sample(),
            Wants::Cross => self
                .timer
                .sample_with_counter(self.tai, self.counter_offset),
        }
    }

    /// Takes what changed into the state file. It may be seen after that, not before.
    fn persist(&self, state: &mut ClockState) {
        if std::mem::take(&mut state.effects.changed) {
            state.rearm = true;
            self.timer.persist_clock(&state.rtc.record());
        }
    }

    /// Finds alarms that have expired, and sets the timerfd for the next one.
    fn follow_time(&self, state: &mut ClockState) {
        self.persist(state);
        while std::mem::take(&mut state.rearm) {
            let now = self.sample();
            state.rtc.advance(&now, &mut state.effects);
            self.persist(state);
            let due = state.rtc.next_expiry_utc_ns(&now);
            match state.alarm.set(due) {
                Ok(clock_was_set) => state.rearm |= clock_was_set,
                Err(error) => {
                    log::error!("Setting the timerfd for the next alarm failed: {error}");
                    return;
                }
            }
            // The clock may have been set between the look at it and the timerfd's.
            if let Some(due) = due {
                let after = state.rtc.next_expiry_utc_ns(&self.sample());
                state.rearm |= after.is_none_or(|after| due.abs_diff(after) > SAME);
            }
        }
    }
}
