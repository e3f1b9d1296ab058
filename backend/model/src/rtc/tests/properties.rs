//! Random bytes, and random lives compared with a naive model.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::rig::{CLOCKS, MONOTONIC, Rig, START, TAI, UTC, every_message};
use crate::rtc::wire::{self, Status};
use crate::rtc::{Counter, Effects, HostClock, Needs, Request, Rtc, RtcRecord, Sample, Sampled};

/// Bytes that are mostly a request, or nearly one.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let request = (0usize..8).prop_map(|which| every_message()[which].0.clone());
    let spoilt = (request, vec((0usize..24, any::<u8>()), 0..3), 0usize..40);
    let spoilt = spoilt.prop_map(|(mut bytes, spoils, length)| {
        for (at, value) in spoils {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.resize(bytes.len().min(length.max(6)), 0);
        bytes
    });
    prop_oneof![4 => spoilt, 1 => vec(any::<u8>(), 0..64)]
}

/// What this clock of the host reads, and nothing else.
fn only(clock: HostClock, now: &Sample) -> Sampled {
    let reading = match clock {
        HostClock::Realtime => Some(now.utc_ns),
        HostClock::Tai => now.tai_ns,
        HostClock::Boottime => Some(now.monotonic_ns),
    };
    Sampled::Clock(clock, reading)
}

/// Which bytes of a message's response are reserved.
fn reserved(msg_type: u16, response: &[u8]) -> Vec<u8> {
    let body: std::ops::Range<usize> = match msg_type {
        wire::REQ_CFG => 10..16,
        wire::REQ_CLOCK_CAP => 11..16,
        wire::REQ_CROSS_CAP => 9..16,
        wire::REQ_READ_ALARM => 17..24,
        _ => 0..0,
    };
    let is_reserved = |at: usize| (1..8).contains(&at) || body.contains(&at);
    let bytes = response.iter().enumerate();
    bytes
        .filter(|(at, _)| is_reserved(*at))
        .map(|(_, byte)| *byte)
        .collect()
}

fn counter() -> impl Strategy<Value = Counter> {
    prop_oneof![
        Just(Counter::Unknown),
        Just(Counter::Withheld),
        any::<u64>().prop_map(Counter::At),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_bytes_do_any_harm(
        story in vec((bytes(), 0usize..40, counter(), any::<u64>()), 1..20),
        alarm in any::<bool>(),
    ) {
        let mut rig = Rig::new();
        rig.rtc.set_features(alarm);
        rig.effects.response.reserve(wire::MAX_RESPONSE);
        let capacity = rig.effects.response.capacity();
        for (request, room, counter, time) in story {
            rig.now.counter = counter;
            rig.now.utc_ns = time;
            let before = rig.rtc.clone();
            let parsed = Request::parse(&request);
            let needs = before.needs(&parsed);
            let response = rig.ask_with_room(&request, room);
            if let Needs::Clock(clock) = needs {
                let (mut rtc, mut effects) = (before.clone(), Effects::default());
                rtc.handle(&parsed, room, &only(clock, &rig.now), &mut effects);
                prop_assert_eq!(&effects.response, &response);
                prop_assert_eq!(&rtc, &rig.rtc);
            }
            prop_assert!(response.len() <= room);
            prop_assert_eq!(response.is_empty(), room == 0);
            prop_assert_eq!(rig.effects.response.capacity(), capacity);
            let msg_type = request.first_chunk().map_or(0, |bytes| u16::from_le_bytes(*bytes));
            prop_assert!(reserved(msg_type, &response).iter().all(|byte| *byte == 0));
            if response.first() != Some(&0) {
                prop_assert!(response.iter().skip(1).all(|byte| *byte == 0));
            }
            if needs == Needs::Nothing {
                prop_assert_eq!(&rig.rtc, &before);
            }
            prop_assert_eq!(Rtc::from_record(&CLOCKS, &rig.rtc.record()).unwrap().record(),
                rig.rtc.record());
        }
    }

    #[test]
    fn any_record_is_a_device_or_refused(bytes in vec(any::<u8>(), size_of::<RtcRecord>())) {
        let mut bytes = bytes;
        bytes[104] %= 10;
        bytes[105] %= 8;
        let record = RtcRecord::read_from_bytes(&bytes).unwrap();
        if let Ok(rtc) = Rtc::from_record(&CLOCKS, &record) {
            let mut rig = Rig::new();
            rig.rtc = rtc;
            rig.pass(1);
            rig.rtc.next_expiry_utc_ns(&rig.now);
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Pass(u64),
    /// The wall clock is stepped by this much.
    Set(i64),
    /// MONOTONIC is sampled too early by this much.
    Stale(u64),
    Tai(bool),
    SetAlarm(u16, i64, bool),
    Enable(u16, bool),
    Read(u16),
    Cross(u16),
    Buffer,
    Start,
    Reset,
    Crash,
    Move {
        passed: i64,
        boottime: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let clock = || 0u16..3;
    prop_oneof![
        4 => (0u64..50).prop_map(Step::Pass),
        2 => (-60i64..60).prop_map(Step::Set),
        1 => (0u64..20).prop_map(Step::Stale),
        1 => any::<bool>().prop_map(Step::Tai),
        4 => (clock(), -30i64..60, any::<bool>())
            .prop_map(|(clock, by, enabled)| Step::SetAlarm(clock, by, enabled)),
        2 => (clock(), any::<bool>()).prop_map(|(clock, enabled)| Step::Enable(clock, enabled)),
        3 => clock().prop_map(Step::Read),
        2 => clock().prop_map(Step::Cross),
        4 => Just(Step::Buffer),
        1 => Just(Step::Start),
        1 => Just(Step::Reset),
        1 => Just(Step::Crash),
        1 => (-40i64..40, 0u64..10_000)
            .prop_map(|(passed, boottime)| Step::Move { passed, boottime }),
    ]
}

/// One alarm, as the specification's text describes it.
#[derive(Clone, Debug, Default)]
struct Naive {
    time: u64,
    enabled: bool,
    /// The clock's last reading since the alarm was set.
    last: Option<u64>,
    /// Expiries that must still be reported.
    untold: u32,
}

impl Naive {
    fn see(&mut self, reading: Option<u64>) {
        let Some(reading) = reading else { return };
        let was_before = self.last.is_none_or(|last| last < self.time);
        if reading < self.time {
            self.untold = 0;
        } else if self.enabled && was_before {
            self.untold = 1;
        }
        self.last = Some(reading);
    }

    /// Set, enabled, disabled, or kept over a reset: an alarm in the past expires.
    fn arm(&mut self, reading: Option<u64>) {
        self.untold = 0;
        self.last = None;
        self.see(reading);
    }
}

struct Life {
    rig: Rig,
    naive: BTreeMap<u16, Naive>,
    /// TAI minus UTC, when it is known.
    tai: u64,
    /// The last readings and counts that the driver got.
    monotonic: u64,
    count: Option<u64>,
    /// The time of the alarm that was reported, until the clock steps.
    told: BTreeMap<u16, u64>,
}

impl Life {
    fn reading(&self, clock: u16) -> Option<u64> {
        match clock {
            UTC => Some(self.rig.now.utc_ns),
            TAI => self.rig.now.tai_ns,
            _ => Some(self.rig.rtc.save(&self.rig.now).monotonic_ns),
        }
    }

    fn see(&mut self) {
        for clock in [UTC, TAI, MONOTONIC] {
            let reading = self.reading(clock);
            self.naive.entry(clock).or_default().see(reading);
        }
    }

    fn arm(&mut self, clock: u16) {
        let reading = self.reading(clock);
        self.naive.entry(clock).or_default().arm(reading);
    }

    fn read(&mut self, clock: u16, reading: u64) -> Result<(), TestCaseError> {
        if let Some(time) = self.told.get(&clock) {
            prop_assert!(reading >= *time, "before an alarm that was told");
        }
        if clock == MONOTONIC {
            prop_assert!(reading >= self.monotonic, "MONOTONIC went back");
            self.monotonic = reading;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Pass(ns) => self.rig.pass(ns),
            Step::Set(ns) => {
                self.told.retain(|clock, _| *clock == MONOTONIC);
                self.rig.step(ns);
            }
            Step::Stale(ns) => {
                self.rig.now.monotonic_ns = self.rig.now.monotonic_ns.saturating_sub(ns);
                self.rig.advance();
            }
            Step::Tai(known) => {
                self.told.remove(&TAI);
                self.rig.now.tai_ns = known.then_some(self.rig.now.utc_ns + self.tai);
                self.rig.advance();
            }
            Step::SetAlarm(clock, by, enabled) => {
                let time = self
                    .reading(clock)
                    .unwrap_or(START.utc_ns)
                    .saturating_add_signed(by);
                self.rig.set_alarm(clock, time, enabled);
                let naive = self.naive.entry(clock).or_default();
                (naive.time, naive.enabled) = (time, enabled);
                self.arm(clock);
            }
            Step::Enable(clock, enabled) => {
                self.rig.enable(clock, enabled);
                self.naive.entry(clock).or_default().enabled = enabled;
                self.arm(clock);
            }
            Step::Read(clock) => match self.reading(clock) {
                Some(_) => {
                    let reading = self.rig.read(clock);
                    self.read(clock, reading)?;
                }
                None => prop_assert_eq!(self.rig.cross(clock), Err(Status::Io as u8)),
            },
            Step::Cross(clock) => {
                if let Ok((reading, count)) = self.rig.cross(clock) {
                    prop_assert!(self.count.is_none_or(|last| last <= count));
                    self.count = Some(count);
                    self.read(clock, reading)?;
                }
            }
            Step::Buffer => {
                let heard = self.rig.told();
                for (clock, naive) in &mut self.naive {
                    let times = heard.iter().filter(|heard| *heard == clock).count();
                    prop_assert_eq!(times as u32, naive.untold, "clock {}", clock);
                    if naive.untold > 0 {
                        self.told.insert(*clock, naive.time);
                    }
                    naive.untold = 0;
                }
            }
            Step::Start | Step::Reset => {
                match step {
                    Step::Start => self.rig.start_driver(),
                    _ => self.rig.rtc.reset(&self.rig.now, &mut self.rig.effects),
                }
                self.rig.rtc.set_features(true);
                self.count = None;
                for clock in [UTC, TAI, MONOTONIC] {
                    self.arm(clock);
                }
            }
            Step::Crash => {
                self.rig.rtc = Rtc::from_record(&CLOCKS, &self.rig.rtc.record()).unwrap();
                self.rig.rtc.set_features(true);
                self.rig.advance();
            }
            Step::Move { passed, boottime } => {
                let before = self.reading(MONOTONIC);
                let saved = self.rig.rtc.save(&self.rig.now);
                self.told.retain(|clock, _| *clock == MONOTONIC);
                self.rig.now.monotonic_ns = boottime;
                let now = &mut self.rig.now;
                now.utc_ns = now.utc_ns.saturating_add_signed(passed);
                now.tai_ns = now.tai_ns.map(|tai| tai.saturating_add_signed(passed));
                self.rig.rtc = Rtc::new(&CLOCKS);
                self.rig.rtc.set_features(true);
                self.rig
                    .rtc
                    .load(&saved, &self.rig.now, &mut self.rig.effects)
                    .unwrap();
                let expected = before.map(|reading| reading + passed.max(0) as u64);
                prop_assert_eq!(self.reading(MONOTONIC), expected);
            }
        }
        self.see();
        let is_untold = self.naive.values().any(|naive| naive.untold > 0);
        prop_assert_eq!(self.rig.rtc.has_notification(), is_untold);
        for (clock, naive) in self.naive.clone() {
            prop_assert_eq!(self.rig.alarm(clock), (naive.time, naive.enabled));
        }
        let is_enabled = self.naive.values().any(|naive| naive.enabled);
        let expiry = self.rig.rtc.next_expiry_utc_ns(&self.rig.now);
        prop_assert_eq!(expiry.is_some(), is_enabled);
        prop_assert!(
            expiry.is_none_or(|at| at > self.rig.now.utc_ns),
            "no spinning"
        );
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1_000,
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn every_expiry_is_told_once_and_monotonic_never_goes_back(steps in vec(step(), 1..60)) {
        let mut life = Life {
            rig: Rig::new(),
            naive: BTreeMap::new(),
            tai: 37_000_000_000,
            monotonic: 0,
            count: None,
            told: BTreeMap::new(),
        };
        for step in &steps {
            life.step(step)?;
        }
    }

    #[test]
    fn a_sleep_until_the_next_expiry_ends_at_it(
        alarms in vec((0u16..3, 0i64..1_000), 1..6),
    ) {
        let mut rig = Rig::new();
        for (clock, after) in alarms {
            let start = [START.utc_ns, START.tai_ns.unwrap(), START.monotonic_ns];
            rig.set_alarm(clock, start[usize::from(clock)].saturating_add_signed(after), true);
        }
        rig.told();
        while let Some(at) = rig.rtc.next_expiry_utc_ns(&rig.now)
            && at < i64::MAX as u64
        {
            rig.pass(at - rig.now.utc_ns - 1);
            prop_assert!(!rig.rtc.has_notification(), "early");
            rig.pass(1);
            prop_assert!(!rig.told().is_empty(), "late");
        }
    }
}
