//! Virtio 1.4 §5.23.6.5, "Read Requests": READ.

use super::rig::{MONOTONIC, Rig, S, START, TAI, of_clock};
use crate::rtc::wire::{self, Status};
use crate::rtc::{ClockKind, Rtc};

#[test]
fn every_clock_reads_its_own_time_in_nanoseconds() {
    let mut rig = Rig::with_clocks(&[
        ClockKind::UtcSmeared,
        ClockKind::Tai,
        ClockKind::Monotonic,
        ClockKind::Utc,
        ClockKind::UtcMaybeSmeared,
    ]);
    let readings = [0, 1, 2, 3, 4].map(|clock| rig.read(clock));
    let utc = START.utc_ns;
    assert_eq!(readings, [utc, START.tai_ns.unwrap(), 500 * S, utc, utc]);
}

#[test]
fn the_monotonic_clock_never_goes_back() {
    let mut rig = Rig::new();
    rig.pass(5);
    assert_eq!(rig.read(MONOTONIC), 500 * S + 5);
    rig.now.monotonic_ns -= 3;
    assert_eq!(rig.read(MONOTONIC), 500 * S + 5);
    assert_eq!(rig.cross(MONOTONIC), Ok((500 * S + 5, 7_005)));
    rig.start_driver();
    assert_eq!(
        rig.read(MONOTONIC),
        500 * S + 5,
        "not for the next driver either"
    );
    rig.now.monotonic_ns += 4;
    assert_eq!(rig.read(MONOTONIC), 500 * S + 6);
}

#[test]
fn the_monotonic_clock_does_not_step_with_the_wall_clock() {
    let mut rig = Rig::new();
    rig.step(-1_000);
    assert_eq!(rig.read(MONOTONIC), 500 * S);
}

#[test]
fn a_wall_clock_that_steps_back_reads_so() {
    let mut rig = Rig::new();
    let before = rig.read(0);
    rig.step(-1_000);
    assert_eq!(rig.read(0), before - 1_000);
}

#[test]
fn tai_without_a_known_distance_from_utc_is_an_io_error() {
    let mut rig = Rig::new();
    rig.now.tai_ns = None;
    assert_eq!(rig.status(&of_clock(wire::REQ_READ, TAI)), Status::Io as u8);
    assert_eq!(rig.cross(TAI), Err(Status::Io as u8));
    rig.now.tai_ns = Some(1);
    assert_eq!(rig.read(TAI), 1);
}

#[test]
fn a_reading_is_nothing_that_a_state_file_needs() {
    let mut rig = Rig::new();
    rig.read(MONOTONIC);
    assert!(!rig.take_changed());
    // On the same boot the clock cannot decrease anyway.
    let offset = Rtc::new(&[ClockKind::Monotonic]);
    assert_eq!(offset.save(&START).monotonic_ns, START.monotonic_ns);
}
