//! The device after a crash of its process, and on another host.

use zerocopy::{FromBytes, IntoBytes};

use super::rig::{CLOCKS, MONOTONIC, Rig, S, START, TAI, UTC};
use crate::rtc::wire::{COUNTER_ARM_VCT, Status};
use crate::rtc::{
    AlarmState, ClockKind, Counter, Effects, LoadError, MAX_CLOCKS, Rtc, RtcRecord, Sample,
};

/// A device with one alarm in each state that an enabled one has.
fn lived() -> Rig {
    let mut rig = Rig::new();
    rig.set_alarm(MONOTONIC, 1, true);
    assert_eq!(rig.told(), [MONOTONIC]);
    rig.set_alarm(TAI, 1, true);
    rig.set_alarm(UTC, START.utc_ns + 10 * S, true);
    assert!(rig.cross(MONOTONIC).is_ok());
    rig
}

fn restarted(rig: &Rig) -> Rig {
    let mut next = Rig::new();
    next.rtc = Rtc::from_record(&CLOCKS, &rig.rtc.record()).unwrap();
    next.rtc.set_features(true);
    next.now = rig.now;
    next
}

fn another_host() -> Rig {
    let mut rig = Rig::new();
    rig.now.monotonic_ns = 3 * S;
    rig
}

fn load(from: &Rig, to: &mut Rig) -> Result<(), LoadError> {
    let saved = from.rtc.save(&from.now);
    to.rtc.load(&saved, &to.now, &mut to.effects)
}

#[test]
fn a_record_gives_the_same_device() {
    let mut rig = lived();
    assert_eq!(restarted(&rig).rtc, rig.rtc);
    rig.start_driver();
    assert_eq!(restarted(&rig).rtc, rig.rtc);
    assert!(size_of::<RtcRecord>() <= 232, "a slot of the state file");
}

#[test]
fn what_expired_while_there_was_no_process_is_told_once() {
    let mut next = restarted(&lived());
    next.pass(10 * S);
    assert_eq!(next.told(), [UTC, TAI]);
}

#[test]
fn a_restart_changes_no_clock_and_no_answer() {
    let mut rig = lived();
    let mut to = another_host();
    load(&rig, &mut to).unwrap();
    let reading = to.read(MONOTONIC);
    let mut next = restarted(&to);
    assert_eq!(next.read(MONOTONIC), reading);
    next.now.counter = Counter::Unknown;
    assert_eq!(
        next.cross_cap(UTC, COUNTER_ARM_VCT),
        rig.cross_cap(UTC, COUNTER_ARM_VCT)
    );
    next.now.counter = Counter::At(6_999);
    assert_eq!(
        next.cross(UTC),
        Err(Status::Io as u8),
        "a former process gave 7,000"
    );
}

#[test]
fn a_record_that_is_no_device_is_refused() {
    let good = lived().rtc.record();
    // Kinds, alarm states, number of clocks, flags.
    for (at, value) in [(88, 5), (96, 4), (104, 9), (104, 255), (105, 8), (88, 3)] {
        let mut bad = good;
        bad.as_mut_bytes()[at] = value;
        assert!(Rtc::from_record(&CLOCKS, &bad).is_err(), "{value} at {at}");
    }
    let zero = RtcRecord::read_from_bytes(&[0; size_of::<RtcRecord>()]).unwrap();
    assert_eq!(Rtc::from_record(&[], &zero), Ok(Rtc::new(&[])));
}

#[test]
fn a_load_brings_alarms_latches_and_clocks() {
    let from = lived();
    let mut to = another_host();
    load(&from, &mut to).unwrap();
    assert!(to.take_changed());
    assert_eq!(to.alarm(UTC), (START.utc_ns + 10 * S, true));
    assert_eq!(to.told(), [TAI]);
    to.now.counter = Counter::Unknown;
    assert_eq!(to.cross_cap(UTC, COUNTER_ARM_VCT), 1);
    to.pass(10 * S);
    assert_eq!(to.told(), [UTC]);
}

#[test]
fn what_expired_on_the_way_is_told_at_once() {
    let from = lived();
    let mut to = another_host();
    to.now.utc_ns += 60 * S;
    load(&from, &mut to).unwrap();
    assert_eq!(to.told(), [UTC, TAI]);
}

#[test]
fn the_monotonic_clock_goes_on_by_the_wall_clock_time_that_passed() {
    for (passed, expected) in [
        (0, 500 * S),
        (60 * S as i64, 560 * S),
        (-60 * S as i64, 500 * S),
    ] {
        for boottime in [0, 3 * S, 90_000 * S] {
            let mut to = Rig::new();
            to.now.monotonic_ns = boottime;
            to.step(passed);
            load(&lived(), &mut to).unwrap();
            assert_eq!(to.read(MONOTONIC), expected);
            to.pass(7);
            assert_eq!(to.read(MONOTONIC), expected + 7);
        }
    }
}

#[test]
fn a_saved_clock_past_all_time_stands_still_rather_than_go_back() {
    let mut saved = lived().rtc.save(&START);
    saved.monotonic_ns = u64::MAX - 1;
    saved.utc_ns = 0;
    let mut to = another_host();
    to.rtc.load(&saved, &to.now, &mut to.effects).unwrap();
    for _ in 0..3 {
        assert_eq!(to.read(MONOTONIC), u64::MAX);
        to.pass(S);
    }
}

#[test]
fn a_destination_where_the_wall_clock_is_behind_expires_an_alarm_again() {
    let mut from = Rig::new();
    from.set_alarm(UTC, START.utc_ns, true);
    assert_eq!(from.told(), [UTC]);
    let mut to = Rig::new();
    to.step(-100);
    load(&from, &mut to).unwrap();
    assert!(to.told().is_empty());
    to.pass(100);
    assert_eq!(to.told(), [UTC]);
}

#[test]
fn a_destination_without_tai_keeps_the_clock_and_its_alarm() {
    let from = lived();
    let mut to = Rig::with_clocks(&[ClockKind::Utc]);
    to.now.tai_ns = None;
    load(&from, &mut to).unwrap();
    assert_eq!(to.alarm(TAI), (1, true));
    assert_eq!(to.cross(TAI), Err(Status::Io as u8));
}

#[test]
fn a_utc_like_clock_that_the_destination_does_not_have_is_refused() {
    let from = Rig::with_clocks(&[ClockKind::Tai, ClockKind::UtcSmeared]);
    let mut to = another_host();
    let before = to.rtc.clone();
    let (id, kind) = (1, ClockKind::UtcSmeared);
    assert_eq!(load(&from, &mut to), Err(LoadError::Clock { id, kind }));
    assert_eq!(to.rtc, before);
    let message = LoadError::Clock { id, kind }.to_string();
    assert!(message.starts_with("clock 1 of the saved RTC is UtcSmeared"));
}

#[test]
fn what_was_loaded_does_not_decide_what_can_be_loaded_next() {
    let own = another_host();
    let mut to = another_host();
    load(&Rig::with_clocks(&[ClockKind::Tai]), &mut to).unwrap();
    assert_eq!(to.rtc.save(&to.now).clocks.len(), 1);
    load(&own, &mut to).unwrap();
    assert_eq!(to.rtc.save(&to.now).clocks, own.rtc.save(&own.now).clocks);
}

#[test]
fn more_clocks_than_a_device_has_are_refused() {
    let mut saved = lived().rtc.save(&START);
    saved.clocks = vec![saved.clocks[0]; MAX_CLOCKS + 1];
    let refused = Rtc::new(&CLOCKS).load(&saved, &START, &mut Effects::default());
    assert_eq!(refused, Err(LoadError::TooManyClocks(MAX_CLOCKS + 1)));
}

#[test]
fn saving_changes_nothing_and_is_what_the_driver_would_read() {
    let rig = lived();
    let saved = rig.rtc.save(&Sample {
        monotonic_ns: 0,
        ..START
    });
    assert_eq!(
        saved.monotonic_ns, START.monotonic_ns,
        "the driver read that already"
    );
    assert_eq!(saved.clocks[usize::from(TAI)].alarm_state, AlarmState::Due);
    assert_eq!(saved.counter_floor, Some(7_000));
}
