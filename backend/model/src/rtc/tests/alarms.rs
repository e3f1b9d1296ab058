//! Virtio 1.4 §5.23.6.6, "Alarm Operation".

use super::rig::{MONOTONIC, Rig, S, START, TAI, UTC, of_clock, set_alarm, set_alarm_enabled};
use crate::rtc::wire::{self, Status};

const NOBODY: [u16; 0] = [];

fn start_of(clock: u16) -> u64 {
    match clock {
        UTC => START.utc_ns,
        TAI => START.tai_ns.unwrap(),
        _ => START.monotonic_ns,
    }
}

#[test]
fn at_first_the_time_is_0_and_the_alarm_disabled() {
    for clock in [UTC, TAI, MONOTONIC] {
        assert_eq!(Rig::new().alarm(clock), (0, false));
    }
}

#[test]
fn without_the_feature_there_are_no_alarm_messages() {
    let mut rig = Rig::new();
    rig.set_alarm(UTC, 1, true);
    rig.rtc.set_features(false);
    for request in [
        of_clock(wire::REQ_READ_ALARM, UTC),
        set_alarm(UTC, 0, 0),
        set_alarm_enabled(UTC, 0),
        of_clock(wire::REQ_READ_ALARM, 9),
    ] {
        assert_eq!(rig.status(&request), Status::NoDevice as u8);
    }
    assert_eq!(rig.told(), NOBODY);
    rig.rtc.set_features(true);
    assert_eq!(rig.told(), [UTC], "it waited");
}

#[test]
fn any_alarm_time_is_accepted_and_read_back() {
    let mut rig = Rig::new();
    for time in [0, 1, START.utc_ns, u64::MAX >> 1, u64::MAX] {
        for enabled in [false, true] {
            rig.set_alarm(UTC, time, enabled);
            assert_eq!(rig.alarm(UTC), (time, enabled));
            assert!(rig.rtc.next_expiry_utc_ns(&rig.now).is_some() == enabled);
        }
    }
}

#[test]
fn set_alarm_enabled_keeps_the_time() {
    let mut rig = Rig::new();
    rig.set_alarm(TAI, 77, false);
    for enabled in [true, false, true] {
        rig.enable(TAI, enabled);
        assert_eq!(rig.alarm(TAI), (77, enabled));
    }
}

#[test]
fn each_clock_has_an_alarm_of_its_own() {
    let mut rig = Rig::new();
    for clock in [UTC, TAI, MONOTONIC] {
        rig.set_alarm(clock, start_of(clock) + 10 * S, true);
    }
    rig.enable(TAI, false);
    rig.pass(10 * S);
    assert_eq!(rig.told(), [UTC, MONOTONIC]);
}

#[test]
fn an_alarm_expires_when_its_clock_reaches_its_time() {
    for clock in [UTC, TAI, MONOTONIC] {
        let mut rig = Rig::new();
        rig.set_alarm(clock, start_of(clock) + 10, true);
        rig.pass(9);
        assert_eq!(rig.told(), NOBODY);
        rig.pass(1);
        assert_eq!(rig.told(), [clock]);
        rig.pass(1_000);
        assert_eq!(rig.told(), NOBODY, "once");
        assert_eq!(
            rig.alarm(clock),
            (start_of(clock) + 10, true),
            "and stays enabled"
        );
    }
}

#[test]
fn an_alarm_expires_when_its_clock_steps_past_its_time() {
    for clock in [UTC, TAI] {
        let mut rig = Rig::new();
        rig.set_alarm(clock, start_of(clock) + 10, true);
        rig.step(1_000);
        assert_eq!(rig.told(), [clock]);
    }
}

#[test]
fn an_alarm_that_is_set_or_enabled_past_its_time_expires_each_time() {
    let mut rig = Rig::new();
    for _ in 0..2 {
        rig.set_alarm(UTC, START.utc_ns, true);
        assert_eq!(rig.told(), [UTC]);
        rig.enable(UTC, true);
        assert_eq!(rig.told(), [UTC]);
        rig.set_alarm(UTC, START.utc_ns, false);
        assert_eq!(rig.told(), NOBODY);
    }
}

#[test]
fn an_alarm_that_is_kept_over_a_reset_and_past_expires_again() {
    for told_before in [false, true] {
        let mut rig = Rig::new();
        rig.set_alarm(UTC, START.utc_ns - 1, true);
        if told_before {
            assert_eq!(rig.told(), [UTC]);
        }
        rig.rtc.reset(&rig.now, &mut rig.effects);
        assert!(!rig.rtc.has_notification(), "features are gone");
        rig.rtc.set_features(true);
        assert_eq!(rig.alarm(UTC), (START.utc_ns - 1, true));
        rig.start_driver();
        assert_eq!(rig.told(), [UTC]);
    }
}

#[test]
fn an_alarm_that_is_kept_over_a_reset_and_to_come_expires_then() {
    let mut rig = Rig::new();
    rig.set_alarm(UTC, START.utc_ns + 10, true);
    rig.set_alarm(TAI, 0, false);
    rig.rtc.reset(&rig.now, &mut rig.effects);
    rig.rtc.set_features(true);
    assert_eq!(rig.told(), NOBODY);
    rig.pass(10);
    assert_eq!(rig.told(), [UTC]);
}

#[test]
fn an_expiry_waits_for_a_buffer_and_takes_one() {
    let mut rig = Rig::new();
    rig.set_alarm(UTC, START.utc_ns + 10, true);
    rig.pass(10);
    rig.pass(10 * S);
    assert!(rig.rtc.has_notification());
    assert_eq!(rig.told(), [UTC]);
}

#[test]
fn disabling_stops_what_was_not_told() {
    let stops: [fn(&mut Rig); 2] = [
        |rig| rig.enable(UTC, false),
        |rig| rig.set_alarm(UTC, 0, false),
    ];
    for stop in stops {
        let mut rig = Rig::new();
        rig.set_alarm(UTC, 0, true);
        assert!(rig.rtc.has_notification());
        stop(&mut rig);
        assert_eq!(rig.told(), NOBODY);
        rig.pass(S);
        assert_eq!(rig.told(), NOBODY);
    }
}

#[test]
fn setting_it_into_the_future_stops_what_was_not_told() {
    let mut rig = Rig::new();
    rig.set_alarm(UTC, 0, true);
    rig.set_alarm(UTC, START.utc_ns + 1, true);
    assert_eq!(rig.told(), NOBODY);
}

#[test]
fn a_refused_request_leaves_the_alarm_alone() {
    let mut rig = Rig::new();
    rig.set_alarm(UTC, 0, true);
    let before = rig.rtc.clone();
    rig.ask(&set_alarm(UTC, 5, 0x80));
    rig.ask_with_room(&set_alarm(UTC, 5, 0), 7);
    assert_eq!(rig.rtc, before);
}

#[test]
fn a_clock_that_steps_back_lets_its_alarm_expire_again() {
    for told_before in [false, true] {
        let mut rig = Rig::new();
        rig.set_alarm(UTC, START.utc_ns, true);
        if told_before {
            assert_eq!(rig.told(), [UTC]);
        }
        rig.step(-100);
        assert_eq!(rig.told(), NOBODY);
        rig.pass(100);
        assert_eq!(rig.told(), [UTC]);
    }
}

#[test]
fn after_a_notification_no_reading_is_before_the_alarm() {
    let mut rig = Rig::new();
    let time = START.monotonic_ns + 10;
    rig.set_alarm(MONOTONIC, time, true);
    rig.pass(10);
    assert_eq!(rig.told(), [MONOTONIC]);
    rig.now.monotonic_ns -= 5;
    assert_eq!(rig.read(MONOTONIC), time);
}

#[test]
fn a_reading_that_shows_an_alarm_past_has_expired_it() {
    let mut rig = Rig::new();
    rig.set_alarm(UTC, START.utc_ns + 1, true);
    rig.now.utc_ns += 1;
    assert_eq!(rig.read(UTC), START.utc_ns + 1);
    assert_eq!(rig.told(), [UTC]);
}

#[test]
fn an_alarm_of_a_clock_that_cannot_be_read_waits_until_it_can() {
    let mut rig = Rig::new();
    rig.now.tai_ns = None;
    rig.set_alarm(TAI, 10, true);
    assert_eq!(rig.told(), NOBODY);
    assert!(
        rig.rtc.next_expiry_utc_ns(&rig.now).is_some(),
        "steps are to be heard of"
    );
    rig.now.tai_ns = Some(10);
    rig.advance();
    assert_eq!(rig.told(), [TAI]);
}

#[test]
fn the_next_expiry_is_the_earliest_in_wall_clock_time() {
    let mut rig = Rig::new();
    assert_eq!(rig.rtc.next_expiry_utc_ns(&rig.now), None);
    for (clock, after) in [(UTC, 30), (MONOTONIC, 20), (TAI, 10)] {
        rig.set_alarm(clock, start_of(clock) + after, true);
        assert_eq!(
            rig.rtc.next_expiry_utc_ns(&rig.now),
            Some(START.utc_ns + after)
        );
    }
    rig.pass(4);
    assert_eq!(
        rig.rtc.next_expiry_utc_ns(&rig.now),
        Some(START.utc_ns + 10)
    );
    rig.pass(6);
    assert_eq!(
        rig.rtc.next_expiry_utc_ns(&rig.now),
        Some(START.utc_ns + 20)
    );
    rig.step(-1_000);
    assert_eq!(
        rig.rtc.next_expiry_utc_ns(&rig.now),
        Some(START.utc_ns + 20 - 1_000),
        "MONOTONIC did not step"
    );
}

#[test]
fn an_enabled_alarm_that_expired_still_wants_to_hear_of_steps() {
    let mut rig = Rig::new();
    rig.set_alarm(UTC, 0, true);
    assert_eq!(rig.told(), [UTC]);
    assert_eq!(rig.rtc.next_expiry_utc_ns(&rig.now), Some(i64::MAX as u64));
    rig.enable(UTC, false);
    assert_eq!(rig.rtc.next_expiry_utc_ns(&rig.now), None);
}

#[test]
fn every_change_of_an_alarm_must_be_known_after_a_crash() {
    let mut rig = Rig::new();
    rig.set_alarm(UTC, START.utc_ns + 1, true);
    assert!(rig.take_changed(), "set");
    rig.advance();
    assert!(!rig.take_changed(), "nothing");
    rig.pass(1);
    assert!(rig.take_changed(), "expired");
    rig.told();
    assert!(rig.take_changed(), "told");
    rig.enable(UTC, false);
    assert!(rig.take_changed(), "disabled");
    rig.alarm(UTC);
    assert!(!rig.take_changed(), "read");
}
