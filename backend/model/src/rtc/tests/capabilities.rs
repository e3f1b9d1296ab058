//! Virtio 1.4 §5.23.6.2 and §5.23.6.4, "Control Requests".

use zerocopy::IntoBytes;

use super::rig::{CLOCKS, MONOTONIC, Rig, TAI, UTC, head, of_clock, of_pair};
use crate::rtc::wire::{self, FLAG_CROSS_CAP, Status};
use crate::rtc::{ClockKind, Counter, MAX_CLOCKS};

const ALL: [ClockKind; 5] = [
    ClockKind::Utc,
    ClockKind::Tai,
    ClockKind::Monotonic,
    ClockKind::UtcSmeared,
    ClockKind::UtcMaybeSmeared,
];

#[test]
fn cfg_tells_how_many_clocks_there_are() {
    for clocks in 0..=ALL.len() {
        let mut rig = Rig::with_clocks(&ALL[..clocks]);
        let cfg: wire::RespCfg = rig.done(head(wire::REQ_CFG).as_bytes());
        assert_eq!(
            (usize::from(cfg.num_clocks.get()), cfg.reserved),
            (clocks, [0; 6])
        );
    }
}

#[test]
fn a_device_has_no_more_clocks_than_it_can_keep() {
    let mut rig = Rig::with_clocks(&[ClockKind::Utc; MAX_CLOCKS + 1]);
    let cfg: wire::RespCfg = rig.done(head(wire::REQ_CFG).as_bytes());
    assert_eq!(usize::from(cfg.num_clocks.get()), MAX_CLOCKS);
}

#[test]
fn clock_cap_tells_the_type_and_an_unspecified_smearing() {
    let mut rig = Rig::with_clocks(&ALL);
    for (clock, clock_type) in (0..5).zip(0..) {
        let cap: wire::RespClockCap = rig.done(&of_clock(wire::REQ_CLOCK_CAP, clock));
        assert_eq!((cap.clock_type, cap.leap_second_smearing), (clock_type, 0));
        assert_eq!(cap.reserved, [0; 5]);
    }
}

#[test]
fn alarm_cap_is_set_on_every_clock_exactly_where_alarms_were_negotiated() {
    for negotiated in [false, true] {
        let mut rig = Rig::with_clocks(&ALL);
        rig.rtc.set_features(negotiated);
        for clock in 0..5 {
            let cap: wire::RespClockCap = rig.done(&of_clock(wire::REQ_CLOCK_CAP, clock));
            assert_eq!(cap.flags, u8::from(negotiated));
        }
    }
}

#[test]
fn cross_cap_is_set_exactly_where_read_cross_works() {
    for counter in [Counter::Unknown, Counter::At(1)] {
        for clock in [UTC, TAI, MONOTONIC] {
            for hw_counter in [wire::COUNTER_ARM_VCT, wire::COUNTER_X86_TSC] {
                let mut rig = Rig::new();
                rig.now.counter = counter;
                let cap = rig.cross_cap(clock, hw_counter);
                let read = rig.status(&of_pair(wire::REQ_READ_CROSS, clock, hw_counter));
                let works = counter == Counter::At(1) && hw_counter == wire::COUNTER_ARM_VCT;
                assert_eq!(cap, u8::from(works));
                let expected = [Status::Unsupported, Status::Ok][usize::from(works)];
                assert_eq!(read, expected as u8);
            }
        }
    }
}

#[test]
fn a_counter_that_is_withheld_is_a_capability_all_the_same() {
    let mut rig = Rig::new();
    rig.now.counter = Counter::Withheld;
    assert_eq!(rig.cross_cap(UTC, wire::COUNTER_ARM_VCT), FLAG_CROSS_CAP);
}

#[test]
fn capabilities_stay_the_same_while_the_driver_lives() {
    for (first, later, cap) in [
        (Counter::At(1), Counter::Unknown, FLAG_CROSS_CAP),
        (Counter::Unknown, Counter::At(1), 0),
    ] {
        let mut rig = Rig::new();
        rig.now.counter = first;
        assert_eq!(rig.cross_cap(UTC, wire::COUNTER_ARM_VCT), cap);
        assert!(rig.take_changed(), "it must be known after a crash");
        rig.now.counter = later;
        assert_eq!(rig.cross_cap(MONOTONIC, wire::COUNTER_ARM_VCT), cap);
        assert!(!rig.take_changed());
        rig.start_driver();
        assert_eq!(
            rig.cross_cap(UTC, wire::COUNTER_ARM_VCT),
            FLAG_CROSS_CAP - cap
        );
    }
}

#[test]
fn read_cross_settles_the_capability_too() {
    let mut rig = Rig::new();
    rig.now.counter = Counter::Unknown;
    assert_eq!(rig.cross(UTC), Err(Status::Unsupported as u8));
    rig.now.counter = Counter::At(1);
    assert_eq!(rig.cross_cap(UTC, wire::COUNTER_ARM_VCT), 0);
}

#[test]
fn capabilities_are_the_same_after_a_reset() {
    let mut rig = Rig::new();
    let caps = |rig: &mut Rig| -> Vec<Vec<u8>> {
        let mut caps = vec![rig.ask(head(wire::REQ_CFG).as_bytes())];
        for clock in 0..CLOCKS.len() as u16 {
            caps.push(rig.ask(&of_clock(wire::REQ_CLOCK_CAP, clock)));
            caps.push(rig.ask(&of_pair(wire::REQ_CROSS_CAP, clock, 0)));
        }
        caps
    };
    let before = caps(&mut rig);
    rig.rtc.reset(&rig.now, &mut rig.effects);
    rig.rtc.set_features(true);
    assert_eq!(caps(&mut rig), before);
}
