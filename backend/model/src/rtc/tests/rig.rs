//! One device, clocks turned by hand, typed requests.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::rtc::wire::{self, Status};
use crate::rtc::{ClockKind, Counter, Effects, Request, Rtc, Sample, Sampled};

pub(super) const S: u64 = 1_000_000_000;

/// The ids of a rig's clocks.
pub(super) const UTC: u16 = 0;
pub(super) const TAI: u16 = 1;
pub(super) const MONOTONIC: u16 = 2;
pub(super) const CLOCKS: [ClockKind; 3] = [ClockKind::Utc, ClockKind::Tai, ClockKind::Monotonic];

pub(super) const START: Sample = Sample {
    utc_ns: 1_800_000_000 * S,
    tai_ns: Some(1_800_000_037 * S),
    monotonic_ns: 500 * S,
    counter: Counter::At(7_000),
};

/// A request of this type without a body.
pub(super) fn head(msg_type: u16) -> wire::ReqHead {
    wire::ReqHead {
        msg_type: msg_type.into(),
        ..Default::default()
    }
}

pub(super) fn of_clock(msg_type: u16, clock: u16) -> Vec<u8> {
    let request = wire::ReqClock {
        head: head(msg_type),
        clock_id: clock.into(),
        ..Default::default()
    };
    request.as_bytes().to_vec()
}

pub(super) fn of_pair(msg_type: u16, clock: u16, hw_counter: u8) -> Vec<u8> {
    let request = wire::ReqCross {
        head: head(msg_type),
        clock_id: clock.into(),
        hw_counter,
        ..Default::default()
    };
    request.as_bytes().to_vec()
}

pub(super) fn set_alarm(clock: u16, time: u64, flags: u8) -> Vec<u8> {
    let request = wire::ReqSetAlarm {
        head: head(wire::REQ_SET_ALARM),
        alarm_time: time.into(),
        clock_id: clock.into(),
        flags,
        ..Default::default()
    };
    request.as_bytes().to_vec()
}

pub(super) fn set_alarm_enabled(clock: u16, flags: u8) -> Vec<u8> {
    let request = wire::ReqSetAlarmEnabled {
        head: head(wire::REQ_SET_ALARM_ENABLED),
        clock_id: clock.into(),
        flags,
        ..Default::default()
    };
    request.as_bytes().to_vec()
}

/// Every message once, well-formed, with the size of its response.
pub(super) fn every_message() -> [(Vec<u8>, usize); 8] {
    [
        (of_clock(wire::REQ_READ, UTC), 16),
        (
            of_pair(wire::REQ_READ_CROSS, UTC, wire::COUNTER_ARM_VCT),
            24,
        ),
        (head(wire::REQ_CFG).as_bytes().to_vec(), 16),
        (of_clock(wire::REQ_CLOCK_CAP, UTC), 16),
        (of_pair(wire::REQ_CROSS_CAP, UTC, wire::COUNTER_ARM_VCT), 16),
        (of_clock(wire::REQ_READ_ALARM, UTC), 24),
        (set_alarm(UTC, 1, wire::FLAG_ALARM_ENABLED), 8),
        (set_alarm_enabled(UTC, wire::FLAG_ALARM_ENABLED), 8),
    ]
}

pub(super) struct Rig {
    pub(super) rtc: Rtc,
    pub(super) now: Sample,
    pub(super) effects: Effects,
}

impl Rig {
    /// A device that a driver just started to use, with alarms.
    pub(super) fn new() -> Self {
        Rig::with_clocks(&CLOCKS)
    }

    pub(super) fn with_clocks(clocks: &[ClockKind]) -> Self {
        let mut rtc = Rtc::new(clocks);
        rtc.set_features(true);
        Rig {
            rtc,
            now: START,
            effects: Effects::default(),
        }
    }

    pub(super) fn ask(&mut self, request: &[u8]) -> Vec<u8> {
        self.ask_with_room(request, wire::MAX_RESPONSE)
    }

    pub(super) fn ask_with_room(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        self.ask_unseen(request, room);
        self.effects.response.clone()
    }

    /// Leaves the response in [`Effects::response`].
    pub(super) fn ask_unseen(&mut self, request: &[u8], room: usize) {
        let now = Sampled::All(self.now);
        self.rtc
            .handle(&Request::parse(request), room, &now, &mut self.effects);
    }

    pub(super) fn status(&mut self, request: &[u8]) -> u8 {
        self.ask(request)[0]
    }

    /// The whole response, of a request that was done.
    pub(super) fn done<T>(&mut self, request: &[u8]) -> T
    where
        T: FromBytes + KnownLayout + Immutable,
    {
        let response = self.ask(request);
        assert_eq!(response[0], Status::Ok as u8, "{request:?}");
        T::read_from_bytes(&response).expect("the response's length")
    }

    pub(super) fn read(&mut self, clock: u16) -> u64 {
        let response: wire::RespRead = self.done(&of_clock(wire::REQ_READ, clock));
        response.clock_reading.get()
    }

    /// READ_CROSS of ARM_VCT: reading and count.
    pub(super) fn cross(&mut self, clock: u16) -> Result<(u64, u64), u8> {
        let response = self.ask(&of_pair(wire::REQ_READ_CROSS, clock, wire::COUNTER_ARM_VCT));
        let cross = wire::RespReadCross::read_from_bytes(&response).unwrap();
        match cross.head.status {
            0 => Ok((cross.clock_reading.get(), cross.counter_cycles.get())),
            status => Err(status),
        }
    }

    pub(super) fn cross_cap(&mut self, clock: u16, counter: u8) -> u8 {
        let response: wire::RespCrossCap = self.done(&of_pair(wire::REQ_CROSS_CAP, clock, counter));
        response.flags
    }

    /// READ_ALARM: time, and whether enabled.
    pub(super) fn alarm(&mut self, clock: u16) -> (u64, bool) {
        let response: wire::RespReadAlarm = self.done(&of_clock(wire::REQ_READ_ALARM, clock));
        (
            response.alarm_time.get(),
            response.flags == wire::FLAG_ALARM_ENABLED,
        )
    }

    pub(super) fn set_alarm(&mut self, clock: u16, time: u64, enabled: bool) {
        let _: wire::RespHead = self.done(&set_alarm(clock, time, enabled.into()));
    }

    pub(super) fn enable(&mut self, clock: u16, enabled: bool) {
        let _: wire::RespHead = self.done(&set_alarm_enabled(clock, enabled.into()));
    }

    /// Time passes equally for all clocks.
    pub(super) fn pass(&mut self, ns: u64) {
        self.now.utc_ns += ns;
        self.now.tai_ns = self.now.tai_ns.map(|tai| tai + ns);
        self.now.monotonic_ns += ns;
        if let Counter::At(count) = self.now.counter {
            self.now.counter = Counter::At(count.wrapping_add(ns));
        }
        self.advance();
    }

    /// The wall clock is set.
    pub(super) fn step(&mut self, ns: i64) {
        self.now.utc_ns = self.now.utc_ns.saturating_add_signed(ns);
        self.now.tai_ns = self.now.tai_ns.map(|tai| tai.saturating_add_signed(ns));
        self.advance();
    }

    pub(super) fn advance(&mut self) {
        self.rtc.advance(&self.now, &mut self.effects);
    }

    /// The clocks of all notifications, while buffers are there.
    pub(super) fn told(&mut self) -> Vec<u16> {
        let mut told = Vec::new();
        while self.rtc.has_notification() {
            let notification = self.rtc.next_notification(&mut self.effects).unwrap();
            assert_eq!(notification.head.msg_type.get(), wire::NOTIF_ALARM);
            assert_eq!(
                (notification.head.reserved, notification.reserved),
                ([0; 6], [0; 6])
            );
            told.push(notification.clock_id.get());
        }
        assert!(self.rtc.next_notification(&mut self.effects).is_none());
        told
    }

    pub(super) fn start_driver(&mut self) {
        self.rtc.driver_started(&self.now, &mut self.effects);
    }

    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.effects.changed)
    }
}
