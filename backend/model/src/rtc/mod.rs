//! The virtio-rtc device (virtio 1.4 §5.23), the guest's own view of the time.
//!
//! [`Rtc`] is a plain value. It is fed requests as bytes, with a [`Sample`] of the clocks as an
//! argument, and gives back answers and alarm notifications; it reads no clock, holds no
//! descriptor and maps no memory. What must always hold:
//!
//! - a request is executed and answered with OK, or changes nothing and says why not;
//! - the MONOTONIC clock never goes back, wherever the device lives;
//! - every counter value given is one the guest could have read at that instant, and they never
//!   decrease;
//! - capability requests get the same answers for as long as a driver lives;
//! - each expiry of an alarm is reported once, unless the driver makes it obsolete first;
//! - no byte that a driver sends makes it panic, hang or grow.
//!
//! The shell handles requests in the order in which they became available, with a sample taken
//! after that, and writes the state file when [`Effects::changed`] says so. It writes a change by a
//! request before the answer can be seen. It writes a change by
//! [`next_notification`](Rtc::next_notification) after the notification can be seen: a crash
//! between the two then repeats the notification, which a driver must expect, rather than lose it.
//!
//! Where the specification leaves a choice:
//!
//! - Errors come in this order: a head that is cut short EINVAL, an unknown message EOPNOTSUPP,
//!   a request or response that does not fit EINVAL, alarms without VIRTIO_RTC_F_ALARM ENODEV,
//!   an unknown counter EOPNOTSUPP, a bad clock id ENODEV, reserved bytes or flags EINVAL.
//! - The response to a refused request has its full size and is zero except for the status. If
//!   that does not fit, or the message has no response, it is a head alone. If not even a head
//!   fits, it is the status alone, one byte.
//! - Alarms are kept over a reset, on every clock.

use alloc::vec::Vec;

mod alarm;
mod clock;
mod cross;
mod record;
mod request;
mod saved;
pub mod wire;

#[cfg(test)]
mod tests;

pub use alarm::AlarmState;
pub use clock::{ClockKind, Counter, HostClock, Needs, Sample, Sampled};
pub use record::{BadRecord, RtcRecord};
pub use request::Request;
pub use saved::{LoadError, Saved, SavedClock};

use alarm::Alarm;
use clock::Monotonic;
use cross::Cross;
use request::{Operation, Parsed};
use wire::Status;
use zerocopy::{Immutable, IntoBytes};

/// The most clocks that a device has.
pub const MAX_CLOCKS: usize = 8;

/// The farthest expiry, ns: the end of the kernel's time.
const FAR: u64 = i64::MAX as u64;

/// What came of calls into the model, for the shell to carry out. It is reused from call to
/// call, so that nothing is allocated for a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// The answer to the request handled last. Its length is the used length, never more than the
    /// room there was.
    pub response: Vec<u8>,
    /// The state file must take the device in; the shell clears it.
    pub changed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Clock {
    kind: ClockKind,
    alarm: Alarm,
}

/// A virtio-rtc device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rtc {
    /// By clock id.
    clocks: Vec<Clock>,
    /// What this host has, whatever was loaded: the kinds that can be loaded next.
    own: Vec<ClockKind>,
    /// VIRTIO_RTC_F_ALARM was negotiated.
    has_alarms: bool,
    monotonic: Monotonic,
    cross: Cross,
}

impl Rtc {
    /// A device with these clocks, whose ids are their places here; [`MAX_CLOCKS`] are taken.
    pub fn new(clocks: &[ClockKind]) -> Self {
        let clock = |&kind| Clock {
            kind,
            alarm: Alarm::default(),
        };
        Rtc {
            clocks: clocks.iter().take(MAX_CLOCKS).map(clock).collect(),
            own: clocks.to_vec(),
            has_alarms: false,
            monotonic: Monotonic::default(),
            cross: Cross::default(),
        }
    }

    /// Whether the driver took VIRTIO_RTC_F_ALARM. Without it there are no alarm messages; alarms
    /// that were set before are kept, and reported once the feature is taken again.
    pub fn set_features(&mut self, alarm: bool) {
        self.has_alarms = alarm;
    }

    /// What [`handle`](Self::handle) is to be given for this request.
    pub fn needs(&self, request: &Request) -> Needs {
        // This request's time may expire an enabled alarm, which needs its own clock.
        if let Some(id) = request.0.clock_that_is_read()
            && let Some(clock) = self.clocks.get(id)
            && !self.has_alarms_enabled()
        {
            return Needs::Clock(clock.kind.follows());
        }
        request.0.needs()
    }

    fn has_alarms_enabled(&self) -> bool {
        self.clocks.iter().any(|clock| clock.alarm.enabled())
    }

    /// Handles one request at one instant. `room` is how many device-writable bytes there are;
    /// `now` is what [`needs`](Self::needs) asked for.
    pub fn handle(&mut self, request: &Request, room: usize, now: &Sampled, effects: &mut Effects) {
        let Request(request) = request;
        if request.needs() != Needs::Nothing && self.has_alarms_enabled() {
            self.find_expired(now, effects);
        }
        let mut out = core::mem::take(&mut effects.response);
        out.clear();
        let status = match self.perform(request, room, now, &mut out, effects) {
            Ok(()) => Status::Ok,
            Err(status) => {
                let head = size_of::<wire::RespHead>();
                let size = [request.response_size(), head, size_of::<u8>()]
                    .into_iter()
                    .find(|size| *size <= room);
                out.clear();
                out.resize(size.unwrap_or(0), 0);
                status
            }
        };
        if let Some(field) = out.first_mut() {
            *field = status as u8;
        }
        effects.response = out;
    }

    fn perform(
        &mut self,
        request: &Parsed,
        room: usize,
        now: &Sampled,
        out: &mut Vec<u8>,
        effects: &mut Effects,
    ) -> Result<(), Status> {
        let (operation, reserved_is_zero) = match *request {
            Parsed::Unknown => return Err(Status::Unsupported),
            Parsed::Headless | Parsed::Cut { .. } => return Err(Status::Invalid),
            Parsed::Whole { response_size, .. } if response_size > room => {
                return Err(Status::Invalid);
            }
            Parsed::Whole {
                operation,
                reserved_is_zero,
                ..
            } => (operation, reserved_is_zero),
        };
        if operation.alarm_clock().is_some() && !self.has_alarms {
            return Err(Status::NoDevice);
        }
        if !operation.counter().is_none_or(cross::is_known) {
            return Err(Status::Unsupported);
        }
        let id = operation.clock().map_or(0, usize::from);
        if operation.clock().is_some() && id >= self.clocks.len() {
            return Err(Status::NoDevice);
        }
        if !reserved_is_zero {
            return Err(Status::Invalid);
        }
        match operation {
            Operation::Cfg => put(out, &self.cfg()),
            Operation::ClockCap { .. } => put(out, &self.clock_cap(id)?),
            Operation::CrossCap { counter, .. } => {
                let capable = self.settle_cross(counter, now, effects);
                let flags = if_set(capable, wire::FLAG_CROSS_CAP);
                put(
                    out,
                    &wire::RespCrossCap {
                        flags,
                        ..Default::default()
                    },
                );
            }
            Operation::Read { .. } => {
                let clock_reading = self.give(id, now)?.into();
                put(
                    out,
                    &wire::RespRead {
                        clock_reading,
                        ..Default::default()
                    },
                );
            }
            Operation::ReadCross { counter, .. } => {
                put(out, &self.read_cross(id, counter, now, effects)?);
            }
            Operation::ReadAlarm { .. } => put(out, &self.read_alarm(id)?),
            Operation::SetAlarm { time, enabled, .. } => {
                self.set_alarm(id, Some(time), enabled, now, effects);
                put(out, &wire::RespHead::default());
            }
            Operation::SetAlarmEnabled { enabled, .. } => {
                self.set_alarm(id, None, enabled, now, effects);
                put(out, &wire::RespHead::default());
            }
        }
        Ok(())
    }

    fn cfg(&self) -> wire::RespCfg {
        wire::RespCfg {
            num_clocks: (self.clocks.len() as u16).into(),
            ..Default::default()
        }
    }

    fn clock_cap(&self, id: usize) -> Result<wire::RespClockCap, Status> {
        Ok(wire::RespClockCap {
            clock_type: self.clock(id)?.kind as u8,
            leap_second_smearing: wire::SMEAR_UNSPECIFIED,
            flags: if_set(self.has_alarms, wire::FLAG_ALARM_CAP),
            ..Default::default()
        })
    }

    fn read_alarm(&self, id: usize) -> Result<wire::RespReadAlarm, Status> {
        let alarm = self.clock(id)?.alarm;
        Ok(wire::RespReadAlarm {
            alarm_time: alarm.time.into(),
            flags: if_set(alarm.enabled(), wire::FLAG_ALARM_ENABLED),
            ..Default::default()
        })
    }

    fn read_cross(
        &mut self,
        id: usize,
        counter: u8,
        now: &Sampled,
        effects: &mut Effects,
    ) -> Result<wire::RespReadCross, Status> {
        if !self.settle_cross(counter, now, effects) {
            return Err(Status::Unsupported);
        }
        // A count that the driver does not get must not be recorded as given.
        let kind = self.clock(id)?.kind;
        self.reading(kind, now).ok_or(Status::Io)?;
        let count = self.with_cross(effects, |cross| cross.take(now.counter()))?;
        Ok(wire::RespReadCross {
            clock_reading: self.give(id, now)?.into(),
            counter_cycles: count.into(),
            ..Default::default()
        })
    }

    /// Whether READ_CROSS works with this counter, now and for as long as the driver lives.
    fn settle_cross(&mut self, counter: u8, now: &Sampled, effects: &mut Effects) -> bool {
        counter == wire::COUNTER_ARM_VCT
            && self.with_cross(effects, |cross| cross.settle(now.counter()))
    }

    fn clock(&self, id: usize) -> Result<&Clock, Status> {
        self.clocks.get(id).ok_or(Status::NoDevice)
    }

    /// What a clock reads, ns; `None` if that is not known.
    fn reading(&self, kind: ClockKind, now: &Sampled) -> Option<u64> {
        let reading = now.of(kind.follows())?;
        Some(match kind {
            ClockKind::Monotonic => self.monotonic.read(reading),
            _ => reading,
        })
    }

    /// A reading for the driver.
    fn give(&mut self, id: usize, now: &Sampled) -> Result<u64, Status> {
        let kind = self.clock(id)?.kind;
        let reading = self.reading(kind, now).ok_or(Status::Io)?;
        self.has_seen(kind, reading);
        Ok(reading)
    }

    /// The driver has seen a clock of this kind read `reading`.
    fn has_seen(&mut self, kind: ClockKind, reading: u64) {
        if kind == ClockKind::Monotonic {
            self.monotonic.raise(reading);
        }
    }

    fn with_cross<T>(&mut self, effects: &mut Effects, f: impl FnOnce(&mut Cross) -> T) -> T {
        let before = self.cross;
        let done = f(&mut self.cross);
        effects.changed |= self.cross != before;
        done
    }

    /// Changes a clock's alarm, given what the clock reads.
    fn with_alarm(
        &mut self,
        id: usize,
        now: &Sampled,
        effects: &mut Effects,
        f: impl FnOnce(&mut Alarm, Option<u64>),
    ) {
        let Some(&Clock {
            kind,
            alarm: before,
        }) = self.clocks.get(id)
        else {
            return;
        };
        let reading = self.reading(kind, now);
        let mut alarm = before;
        f(&mut alarm, reading);
        if let Some(clock) = self.clocks.get_mut(id) {
            clock.alarm = alarm;
        }
        effects.changed |= alarm != before;
        if let (AlarmState::Due, Some(reading)) = (alarm.state, reading) {
            self.has_seen(kind, reading);
        }
    }

    fn set_alarm(
        &mut self,
        id: usize,
        time: Option<u64>,
        enabled: bool,
        now: &Sampled,
        effects: &mut Effects,
    ) {
        self.with_alarm(id, now, effects, |alarm, reading| {
            alarm.time = time.unwrap_or(alarm.time);
            alarm.arm(enabled, reading);
        });
    }

    /// Finds what the passing of time, or a step of a clock, has brought: expired alarms.
    pub fn advance(&mut self, now: &Sample, effects: &mut Effects) {
        self.find_expired(&Sampled::All(*now), effects);
    }

    fn find_expired(&mut self, now: &Sampled, effects: &mut Effects) {
        for id in 0..self.clocks.len() {
            self.with_alarm(id, now, effects, |alarm, reading| {
                if let Some(reading) = reading {
                    alarm.see(reading);
                }
            });
        }
    }

    /// When to call [`advance`](Self::advance) at the latest if no clock is set meanwhile:
    /// CLOCK_REALTIME, ns. It is `Some` for as long as an alarm is enabled, since the shell must
    /// notice every step of the clocks (TFD_TIMER_CANCEL_ON_SET), and advance then.
    pub fn next_expiry_utc_ns(&self, now: &Sample) -> Option<u64> {
        let sampled = Sampled::All(*now);
        let expiry = |clock: &Clock| {
            let to_come = match clock.alarm.state {
                AlarmState::Disabled => return None,
                AlarmState::Waiting => self
                    .reading(clock.kind, &sampled)
                    .map(|reading| clock.alarm.time.saturating_sub(reading)),
                AlarmState::Due | AlarmState::Told => None,
            };
            Some(to_come.map_or(FAR, |ns| now.utc_ns.saturating_add(ns).min(FAR)))
        };
        self.clocks.iter().filter_map(expiry).min()
    }

    /// Whether [`next_notification`](Self::next_notification) has something.
    pub fn has_notification(&self) -> bool {
        self.has_alarms && self.clocks.iter().any(Clock::is_due)
    }

    /// The next notification, for a buffer of the alarmq. It counts as reported from here on, so
    /// the shell must have a buffer in which it fits, and must have [`advance`](Self::advance)d
    /// just before.
    pub fn next_notification(&mut self, effects: &mut Effects) -> Option<wire::NotifAlarm> {
        let mut clocks = (0u16..).zip(&mut self.clocks);
        let (id, clock) = clocks.find(|(_, clock)| self.has_alarms && clock.is_due())?;
        clock.alarm.state = AlarmState::Told;
        effects.changed = true;
        Some(wire::NotifAlarm {
            head: wire::NotifHead {
                msg_type: wire::NOTIF_ALARM.into(),
                ..Default::default()
            },
            clock_id: id.into(),
            ..Default::default()
        })
    }

    /// A driver starts over, with both rings at index 0. It has read no capability and no counter,
    /// and because a device reset came before, kept alarms that are past expire.
    pub fn driver_started(&mut self, now: &Sample, effects: &mut Effects) {
        self.with_cross(effects, |cross| *cross = Cross::default());
        for id in 0..self.clocks.len() {
            self.with_alarm(id, &Sampled::All(*now), effects, |alarm, reading| {
                alarm.arm(alarm.enabled(), reading);
            });
        }
    }

    /// The device is reset (RESET_DEVICE): features are forgotten, clocks and alarms kept.
    pub fn reset(&mut self, now: &Sample, effects: &mut Effects) {
        self.has_alarms = false;
        self.driver_started(now, effects);
    }
}

impl Clock {
    fn is_due(&self) -> bool {
        self.alarm.state == AlarmState::Due
    }
}

fn if_set(set: bool, flag: u8) -> u8 {
    if set { flag } else { 0 }
}

fn put(out: &mut Vec<u8>, response: &(impl IntoBytes + Immutable)) {
    out.extend_from_slice(response.as_bytes());
}
