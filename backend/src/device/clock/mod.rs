//! The clock device, virtio-rtc: the guest's way to the host's clocks.
//!
//! The device's frontend is a VMM that gives it to its guest; the guest is the driver, and the
//! memory is the guest's. Of the guest's counter the device learns through [`GuestTime`] what the
//! guest reads anyway, and that its vCPUs must not run: meanwhile the acknowledgement of
//! SET_VRING_ENABLE is held back. QEMU waits for it before it starts its vCPUs, so a QEMU that
//! knows nothing of the timer device runs none before the gate opens.

mod device;
mod guest_time;
mod told;
mod wall;

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::device::DeviceError;
use crate::sys::lock;
use clap::ValueEnum;
use vhost_user_timer_model::rtc::{
    BadRecord, ClockKind, Counter, Effects, Needs, Rtc, RtcRecord, Sample, Sampled, wire,
};
use vhost_user_timer_model::vm::GuestCounter;
use zerocopy::{FromBytes, IntoBytes};

use crate::state::Store;
use crate::state::file::{CLOCK_RECORD, Record};
pub use guest_time::{GuestTime, GuestTimeGuard};
use wall::WallAlarm;

const _: () = assert!(size_of::<RtcRecord>() == CLOCK_RECORD);

/// How far two samples may differ about an expiry if the clock was not set in between, ns.
const SAME: u64 = 1_000_000;

/// The options of the guest's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockConfig {
    /// What the host's wall clock does at a leap second; `None` asks the kernel.
    pub utc: Option<UtcKind>,
    /// The counter offset, ticks, of a VM that is not configured over the timer device.
    pub counter_offset: Option<u64>,
}

/// What a wall clock does at a leap second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UtcKind {
    /// Steps, as UTC does
    Utc,
    /// Runs slower or faster for a while, and never steps
    Smeared,
    /// Steps or smears: not known
    MaybeSmeared,
}

impl UtcKind {
    fn of_clock(clock: ClockKind) -> Option<Self> {
        let mut kinds = UtcKind::value_variants().iter().copied();
        kinds.find(|kind| ClockKind::from(*kind) == clock)
    }

    /// What this host's clock does. A kernel that knows how far TAI is from UTC is kept by a time
    /// service that knows of leap seconds, and steps; for any other it is not known.
    fn of_this_host() -> Self {
        if wall::tai_is_known() {
            UtcKind::Utc
        } else {
            UtcKind::MaybeSmeared
        }
    }
}

impl fmt::Display for UtcKind {
    /// As the option has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

impl From<UtcKind> for ClockKind {
    fn from(utc: UtcKind) -> Self {
        match utc {
            UtcKind::Utc => ClockKind::Utc,
            UtcKind::Smeared => ClockKind::UtcSmeared,
            UtcKind::MaybeSmeared => ClockKind::UtcMaybeSmeared,
        }
    }
}

/// A clock, as the log says it.
fn name_of(clock: ClockKind) -> String {
    match UtcKind::of_clock(clock) {
        Some(kind) => kind.to_string(),
        None => format!("{clock:?}").to_lowercase(),
    }
}

fn read_record(bytes: &[u8]) -> Result<RtcRecord, &'static str> {
    RtcRecord::read_from_bytes(bytes).map_err(|_| "the clock device's record has the wrong length")
}

/// The device of a record in a state file, on a host that has these clocks.
fn from_record(clocks: &[ClockKind], bytes: &[u8]) -> Result<Rtc, String> {
    let record = read_record(bytes)?;
    Rtc::from_record(clocks, &record).map_err(|bad: BadRecord| bad.to_string())
}

/// What the guest's wall clock does at a leap second. A guest keeps the clock that it has: what
/// this host's kernel knows may have changed since.
fn utc_kind(asked: Option<UtcKind>, store: Option<&Store>) -> Result<UtcKind, DeviceError> {
    let record = store.map(|store| store.clock(read_record)).transpose()?;
    let kept = record
        .flatten()
        .and_then(|record| UtcKind::of_clock(record.utc_kind()?));
    match (asked, kept, store) {
        (Some(given), Some(wrote), Some(store)) if given != wrote => Err(store
            .other_clock(wrote.to_string(), given.to_string())
            .into()),
        (asked, kept, _) => Ok(asked.or(kept).unwrap_or_else(UtcKind::of_this_host)),
    }
}

/// The clocks and their alarms, which outlive every connection. `G` keeps the guest's counter.
#[derive(Debug)]
pub struct ClockDevice<G> {
    guest: Arc<G>,
    store: Option<Arc<Store>>,
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
    /// The timerfd may not be set for the next alarm.
    rearm: bool,
}

impl<G: GuestTime> ClockDevice<G> {
    /// A device for the guest whose counter `guest` keeps. With a store, the device goes on with
    /// the alarms that a previous process left there, and keeps its own there.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] where the system refuses, or the state file has no valid clocks.
    pub fn new(
        guest: Arc<G>,
        store: Option<Arc<Store>>,
        config: ClockConfig,
    ) -> Result<Self, DeviceError> {
        let tai = wall::tai_is_known();
        let utc = utc_kind(config.utc, store.as_deref())?.into();
        // TAI last: the other clocks have the same ids with it and without it.
        let mut clocks = vec![utc, ClockKind::Monotonic];
        if tai {
            clocks.push(ClockKind::Tai);
        }
        let kept = match &store {
            Some(store) => store.clock(|record| from_record(&clocks, record))?,
            None => None,
        };
        let rtc = kept.unwrap_or_else(|| Rtc::new(&clocks));
        let alarm = WallAlarm::new().map_err(DeviceError::Alarm)?;
        let device = ClockDevice {
            guest,
            store,
            counter_offset: config.counter_offset,
            tai,
            alarm_fd: alarm.as_raw_fd(),
            state: Mutex::new(ClockState {
                rtc,
                effects: Effects {
                    response: Vec::with_capacity(wire::MAX_RESPONSE),
                    ..Effects::default()
                },
                alarm,
                rearm: true,
            }),
        };
        device.follow_time(&mut device.state());
        let names: Vec<_> = clocks.iter().map(|clock| name_of(*clock)).collect();
        log::info!("The guest's clocks: {}", names.join(", "));
        Ok(device)
    }

    fn state(&self) -> MutexGuard<'_, ClockState> {
        lock(&self.state)
    }

    fn sample(&self) -> Sample {
        wall::sample(self.tai)
    }

    fn sample_for(&self, needs: Needs) -> Sampled {
        match needs {
            Needs::Nothing => Sampled::Nothing,
            Needs::Clock(clock) => Sampled::Clock(clock, wall::read(clock, self.tai)),
            Needs::Time => Sampled::All(self.sample()),
            Needs::Cross => Sampled::All(self.sample_with_counter()),
        }
    }

    /// What the host's clocks read, and the guest's virtual counter at the same instant.
    fn sample_with_counter(&self) -> Sample {
        let mut guest = self.guest.lock();
        let (sample, host, _) = wall::sample_with(self.tai, || guest.host_count());
        let counter = match guest.guest_counter(host) {
            GuestCounter::Running(count) => Counter::At(count),
            GuestCounter::Stopped => Counter::Withheld,
            GuestCounter::Unconfigured => match self.counter_offset {
                Some(offset) => Counter::At(host.wrapping_sub(offset)),
                None => Counter::Unknown,
            },
        };
        Sample { counter, ..sample }
    }

    /// Puts what changed into the state file. It may be visible after that, not before.
    fn persist(&self, state: &mut ClockState) {
        if std::mem::take(&mut state.effects.changed) {
            state.rearm = true;
            if let Some(store) = &self.store {
                let record = state.rtc.record();
                store.commit(|change| change.put(Record::Clock, record.as_bytes()));
            }
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
            // The clock may have been set between the reading and setting the timerfd.
            if let Some(due) = due {
                let after = state.rtc.next_expiry_utc_ns(&self.sample());
                state.rearm |= after.is_none_or(|after| due.abs_diff(after) > SAME);
            }
        }
    }
}
