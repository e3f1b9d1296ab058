//! The device at one instant, for another host (device state).

use alloc::vec::Vec;

use super::alarm::{Alarm, AlarmState};
use super::clock::{ClockKind, Monotonic, Sample};
use super::cross::Cross;
use super::{Clock, Effects, MAX_CLOCKS, Rtc};

/// What a device is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The source host's CLOCK_REALTIME then, ns.
    pub utc_ns: u64,
    /// What the MONOTONIC clock read then, ns.
    pub monotonic_ns: u64,
    /// The clocks, in the order of their ids.
    pub clocks: Vec<SavedClock>,
    /// Whether the driver has learned that READ_CROSS works.
    pub cross_capable: Option<bool>,
    /// The last count that the driver got.
    pub counter_floor: Option<u64>,
}

/// A clock and its alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedClock {
    /// The clock.
    pub kind: ClockKind,
    /// The alarm's time, in the clock's own, ns.
    pub alarm_time: u64,
    /// Where the alarm is.
    pub alarm_state: AlarmState,
}

/// Why a saved device cannot be loaded here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// More than any device has.
    #[error("the saved RTC has {0} clocks, and this backend takes up to {MAX_CLOCKS}")]
    TooManyClocks(usize),
    /// A UTC-like clock that treats leap seconds differently from this host's.
    #[error(
        "clock {id} of the saved RTC is {kind:?}, which this backend does not have; start it with \
         the clocks that the source has"
    )]
    Clock {
        /// The clock's id.
        id: usize,
        /// What it is.
        kind: ClockKind,
    },
}

impl Rtc {
    /// The device at one instant. Saving changes nothing.
    pub fn save(&self, now: &Sample) -> Saved {
        let saved = |clock: &Clock| SavedClock {
            kind: clock.kind,
            alarm_time: clock.alarm.time,
            alarm_state: clock.alarm.state,
        };
        Saved {
            utc_ns: now.utc_ns,
            monotonic_ns: self.monotonic.read(now.monotonic_ns),
            clocks: self.clocks.iter().map(saved).collect(),
            cross_capable: self.cross.capable,
            counter_floor: self.cross.floor,
        }
    }

    /// Becomes the saved device, with its clocks, which the driver knows. Its MONOTONIC clock
    /// advances by as much as the wall clock did since the save, and never decreases. Alarms that
    /// expired on the way are found. Negotiated features stay as they are here.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; then the device is unchanged.
    pub fn load(
        &mut self,
        saved: &Saved,
        now: &Sample,
        effects: &mut Effects,
    ) -> Result<(), LoadError> {
        if saved.clocks.len() > MAX_CLOCKS {
            return Err(LoadError::TooManyClocks(saved.clocks.len()));
        }
        let own = || self.own.iter().copied();
        let foreign = |clock: &SavedClock| !clock.kind.is_served_by(own());
        if let Some(id) = saved.clocks.iter().position(foreign)
            && let Some(clock) = saved.clocks.get(id)
        {
            let kind = clock.kind;
            return Err(LoadError::Clock { id, kind });
        }
        let passed = now.utc_ns.saturating_sub(saved.utc_ns);
        self.monotonic =
            Monotonic::reading(saved.monotonic_ns.saturating_add(passed), now.monotonic_ns);
        let clock = |saved: &SavedClock| Clock {
            kind: saved.kind,
            alarm: Alarm {
                time: saved.alarm_time,
                state: saved.alarm_state,
            },
        };
        self.clocks = saved.clocks.iter().map(clock).collect();
        self.cross = Cross {
            capable: saved.cross_capable,
            floor: saved.counter_floor,
        };
        effects.changed = true;
        self.advance(now, effects);
        Ok(())
    }
}
