//! Virtio 1.4 §5.23.6.5, "Read Requests": READ_CROSS.

use super::rig::{MONOTONIC, Rig, START, TAI, UTC};
use crate::rtc::Counter;
use crate::rtc::wire::Status;

const IO: Result<(u64, u64), u8> = Err(Status::Io as u8);

#[test]
fn a_reading_comes_with_the_counter_of_its_instant() {
    let mut rig = Rig::new();
    rig.pass(11);
    assert_eq!(rig.cross(UTC), Ok((START.utc_ns + 11, 7_011)));
    assert_eq!(rig.cross(TAI), Ok((START.tai_ns.unwrap() + 11, 7_011)));
    assert_eq!(rig.cross(MONOTONIC), Ok((START.monotonic_ns + 11, 7_011)));
}

#[test]
fn a_counter_that_is_not_known_now_is_an_io_error_until_it_is() {
    let mut rig = Rig::new();
    rig.now.counter = Counter::Withheld;
    assert_eq!(rig.cross(UTC), IO);
    rig.now.counter = Counter::At(5);
    assert_eq!(rig.cross(UTC), Ok((START.utc_ns, 5)));
    rig.now.counter = Counter::Unknown;
    assert_eq!(rig.cross(UTC), IO, "this driver was told that it works");
}

#[test]
fn a_count_that_is_not_given_is_not_held_against_the_next() {
    let mut rig = Rig::new();
    rig.now.tai_ns = None;
    rig.now.counter = Counter::At(9_000);
    assert_eq!(rig.cross(TAI), IO);
    rig.now.counter = Counter::At(8_000);
    assert_eq!(rig.cross(UTC), Ok((START.utc_ns, 8_000)));
}

#[test]
fn no_count_is_given_after_a_later_one() {
    let mut rig = Rig::new();
    assert!(rig.cross(UTC).is_ok());
    rig.now.counter = Counter::At(6_999);
    for clock in [UTC, TAI, MONOTONIC] {
        assert_eq!(rig.cross(clock), IO);
    }
    rig.now.counter = Counter::At(7_000);
    assert!(rig.cross(UTC).is_ok(), "the same is allowed");
}

#[test]
fn the_next_driver_does_not_know_of_a_former_count() {
    let mut rig = Rig::new();
    assert!(rig.cross(UTC).is_ok());
    rig.start_driver();
    rig.now.counter = Counter::At(1);
    assert_eq!(rig.cross(UTC), Ok((START.utc_ns, 1)));
}

#[test]
fn a_counter_that_wraps_goes_on() {
    let mut rig = Rig::new();
    rig.now.counter = Counter::At(u64::MAX);
    assert!(rig.cross(UTC).is_ok());
    rig.now.counter = Counter::At(2);
    assert_eq!(rig.cross(UTC), Ok((START.utc_ns, 2)));
}

#[test]
fn a_count_is_after_another_within_half_the_counter() {
    for (ahead, is_after) in [(1 << 62, true), (u64::MAX >> 1, true), (1 << 63, false)] {
        let mut rig = Rig::new();
        assert!(rig.cross(UTC).is_ok());
        rig.now.counter = Counter::At(7_000 + ahead);
        assert_eq!(rig.cross(UTC).is_ok(), is_after);
    }
}

#[test]
fn a_count_that_was_given_must_be_known_after_a_crash() {
    let mut rig = Rig::new();
    assert!(rig.cross(UTC).is_ok());
    assert!(rig.take_changed());
}
