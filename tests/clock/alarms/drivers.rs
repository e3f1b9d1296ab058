//! Alarms over stopped rings, resets and new drivers.

use super::*;

#[test]
fn an_alarm_that_falls_due_while_the_rings_are_stopped_is_told_when_they_start() {
    for event_idx in [true, false] {
        host::with_longer_spans(|span| {
            let rig = launch();
            let setup = Setup {
                event_idx,
                ..ClockDriver::setup()
            };
            let mut guest = ClockDriver::connect_with(&rig, setup);
            post(&mut guest);
            let time = host::utc() + span;
            guest.set_alarm(UTC, time, true);
            let bases = [REQUESTQ, ALARMQ].map(|queue| (queue, guest.driver.stop(queue)));
            let in_time = host::utc() < time;
            host::wait_until(UTC, time + MS);
            for (queue, base) in bases {
                guest.driver.start_at(queue, base);
            }
            // Nobody kicks either: a guest that sleeps until its alarm has no reason to.
            told_once(&mut guest, UTC);
            in_time
        });
    }
}

#[test]
fn an_alarm_that_was_told_is_not_told_again_when_the_rings_go_on() {
    let rig = launch();
    let mut guest = listening(&rig);
    guest.set_alarm(UTC, 1, true);
    told_once(&mut guest, UTC);
    for _ in 0..3 {
        let bases = [REQUESTQ, ALARMQ].map(|queue| (queue, guest.driver.stop(queue)));
        for (queue, base) in bases {
            guest.driver.start_at(queue, base);
        }
        guest.no_notification();
    }
    assert_eq!(guest.read_alarm(UTC), Ok((1, true)));
}

/// RESET_DEVICE, and the device set up again on the same connection.
fn reset(guest: &mut ClockDriver, features: u64) {
    guest.driver.control.reset_device().expect("RESET_DEVICE");
    let setup = Setup {
        features,
        ..Setup::default()
    };
    let set = guest.driver.control.set_features(setup.features());
    set.expect("SET_FEATURES");
    for queue in [REQUESTQ, ALARMQ] {
        guest.driver.stop(queue);
        guest.driver.start(queue);
    }
}

#[test]
fn alarms_are_kept_over_a_reset_and_those_that_are_past_expire() {
    let rig = launch();
    let mut guest = listening(&rig);
    guest.set_alarm(MONOTONIC, u64::MAX - 5, true);
    guest.set_alarm(UTC, 1, true);
    told_once(&mut guest, UTC);
    reset(&mut guest, F_ALARM);
    assert_eq!(guest.read_alarm(MONOTONIC), Ok((u64::MAX - 5, true)));
    assert_eq!(guest.read_alarm(UTC), Ok((1, true)));
    post(&mut guest);
    told_once(&mut guest, UTC);
}

#[test]
fn alarms_are_kept_and_not_told_over_a_driver_that_wants_none() {
    let rig = launch();
    let mut guest = ClockDriver::connect(&rig);
    guest.set_alarm(UTC, 1, true);
    reset(&mut guest, 0);
    post(&mut guest);
    guest.no_notification();
    reset(&mut guest, F_ALARM);
    post(&mut guest);
    told_once(&mut guest, UTC);
}

#[test]
fn an_alarm_that_falls_due_between_connections_is_told_on_the_next() {
    host::with_longer_spans(|span| {
        let rig = launch();
        let mut guest = listening(&rig);
        let time = host::boottime() + span;
        guest.set_alarm(MONOTONIC, time, true);
        // The same guest first, then a new one.
        let mut in_time = false;
        let mut guest = guest.moved_to(rig.clock_stream(), |_| {
            in_time = host::boottime() < time;
            host::wait_until(MONOTONIC, time + MS);
        });
        told_once(&mut guest, MONOTONIC);
        let time = host::boottime() + span;
        guest.set_alarm(MONOTONIC, time, true);
        drop(guest);
        // By its answer the backend has done with the guest before.
        let next = Control::negotiated(rig.clock_stream(), Setup::default().features());
        in_time &= host::boottime() < time;
        drop(next);
        host::wait_until(MONOTONIC, time + MS);
        let mut guest = listening(&rig);
        told_once(&mut guest, MONOTONIC);
        in_time
    });
}

#[test]
fn a_new_driver_is_told_once_of_a_kept_alarm_though_its_alarmq_is_served_first() {
    let rig = launch();
    let mut guest = ClockDriver::connect(&rig);
    guest.set_alarm(UTC, 1, true);
    drop(guest);
    let mut guest = ClockDriver::connect(&rig);
    for queue in [REQUESTQ, ALARMQ] {
        assert_eq!(guest.driver.stop(queue), 0);
    }
    for _ in 0..2 {
        guest.driver.add(ALARMQ, &[], 16, &Layout::plain());
    }
    // The requestq has its start index but is not started when the alarmq is.
    let index = usize::from(REQUESTQ);
    guest.driver.control.set_vring_base(index, 0).expect("BASE");
    guest.driver.start_at(ALARMQ, 0);
    assert_eq!(guest.notified(), UTC);
    let Driver { control, rings, .. } = &mut guest.driver;
    let ring = &rings[index];
    control.set_vring_addr(index, &ring.config()).expect("ADDR");
    control.set_vring_call(index, ring.call()).expect("CALL");
    control.set_vring_kick(index, ring.kick_fd()).expect("KICK");
    control.set_vring_enable(index, true).expect("ENABLE");
    guest.no_notification();
}
