//! The device as a record of fixed size, for a state file.
//!
//! A record that is read is not trusted: [`Rtc::from_record`] makes a device of it or says what is
//! wrong. A record is valid for one boot of the host, as CLOCK_BOOTTIME is. It has no negotiated
//! features; the frontend negotiates them again.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::alarm::{Alarm, AlarmState};
use super::clock::{ClockKind, HostClock, Monotonic};
use super::cross::Cross;
use super::{Clock, MAX_CLOCKS, Rtc};

/// A value that no device's record has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record of the RTC has no valid {0}")]
pub struct BadRecord(&'static str);

/// The whole device.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RtcRecord {
    alarm_times: [u64; MAX_CLOCKS],
    monotonic_offset: i64,
    monotonic_floor: u64,
    counter_floor: u64,
    /// [`ClockKind`] codes.
    kinds: [u8; MAX_CLOCKS],
    /// [`AlarmState`] codes.
    alarm_states: [u8; MAX_CLOCKS],
    clocks: u8,
    /// [`flag`] bits.
    flags: u8,
    reserved: [u8; 6],
}

const _: () = assert!(size_of::<RtcRecord>() == 112);

mod flag {
    pub(super) const CROSS_SETTLED: u8 = 1 << 0;
    pub(super) const CROSS_CAPABLE: u8 = 1 << 1;
    pub(super) const COUNTER_FLOOR: u8 = 1 << 2;
    pub(super) const ALL: u8 = CROSS_SETTLED | CROSS_CAPABLE | COUNTER_FLOOR;
}

impl RtcRecord {
    /// The kind of its clock that follows UTC; `None` if it has none.
    pub fn utc_kind(&self) -> Option<ClockKind> {
        let kinds = self.kinds.iter().take(self.clocks.into());
        kinds
            .filter_map(|kind| ClockKind::from_code(*kind))
            .find(|kind| kind.follows() == HostClock::Realtime)
    }
}

impl Rtc {
    /// The device's record.
    pub fn record(&self) -> RtcRecord {
        let mut record = RtcRecord {
            monotonic_offset: self.monotonic.offset,
            monotonic_floor: self.monotonic.floor,
            counter_floor: self.cross.floor.unwrap_or(0),
            clocks: self.clocks.len() as u8,
            ..Default::default()
        };
        let slots = record.kinds.iter_mut().zip(&mut record.alarm_states);
        for ((clock, time), (kind, state)) in
            self.clocks.iter().zip(&mut record.alarm_times).zip(slots)
        {
            *time = clock.alarm.time;
            *kind = clock.kind as u8;
            *state = clock.alarm.state as u8;
        }
        for (set, bit) in [
            (self.cross.capable.is_some(), flag::CROSS_SETTLED),
            (self.cross.capable == Some(true), flag::CROSS_CAPABLE),
            (self.cross.floor.is_some(), flag::COUNTER_FLOOR),
        ] {
            record.flags |= if set { bit } else { 0 };
        }
        record
    }

    /// The device of this record, with its clocks, on a host that has `own`. The next
    /// [`advance`](Self::advance) finds alarms that expired meanwhile.
    ///
    /// # Errors
    ///
    /// [`BadRecord`] if this host cannot be that device.
    pub fn from_record(own: &[ClockKind], record: &RtcRecord) -> Result<Self, BadRecord> {
        if record.flags & !flag::ALL != 0 {
            return Err(BadRecord("flags"));
        }
        if usize::from(record.clocks) > MAX_CLOCKS {
            return Err(BadRecord("number of clocks"));
        }
        let has = |bit| record.flags & bit != 0;
        let slots = record.kinds.iter().zip(&record.alarm_states);
        let clocks = slots
            .zip(&record.alarm_times)
            .take(record.clocks.into())
            .map(|((kind, state), time)| {
                let kind = ClockKind::from_code(*kind)
                    .filter(|kind| kind.is_served_by(own.iter().copied()))
                    .ok_or(BadRecord("clock, or not one that this backend has"))?;
                let state = AlarmState::from_code(*state).ok_or(BadRecord("alarm"))?;
                let alarm = Alarm { time: *time, state };
                Ok(Clock { kind, alarm })
            })
            .collect::<Result<_, _>>()?;
        Ok(Rtc {
            clocks,
            own: own.to_vec(),
            has_alarms: false,
            monotonic: Monotonic {
                offset: record.monotonic_offset,
                floor: record.monotonic_floor,
            },
            cross: Cross {
                capable: has(flag::CROSS_SETTLED).then_some(has(flag::CROSS_CAPABLE)),
                floor: has(flag::COUNTER_FLOOR).then_some(record.counter_floor),
            },
        })
    }
}
