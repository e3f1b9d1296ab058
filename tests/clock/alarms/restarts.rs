//! Alarms over a backend that is killed.

use super::*;

/// A backend with a state file, and a guest that listens.
fn mortal() -> (Rig, ClockDriver) {
    let rig = Rig::launch_devices_with_state(Devices::TimerAndClock, &[]);
    let guest = listening(&rig);
    (rig, guest)
}

#[test]
fn an_alarm_that_falls_due_while_the_backend_is_dead_is_told_at_once() {
    host::with_longer_spans(|span| {
        let (rig, mut guest) = mortal();
        let time = host::utc() + span;
        let last = guest.read(MONOTONIC);
        guest.set_alarm(UTC, time, true);
        guest.set_alarm(MONOTONIC, u64::MAX, true);
        let mut in_time = false;
        let dead = || {
            in_time = host::utc() < time;
            host::wait_until(UTC, time + MS);
        };
        let rig = rig.die_and_go_on(dead, &[]);
        let mut guest = guest.moved_to(rig.clock_stream(), |_| {});
        told_once(&mut guest, UTC);
        assert_eq!(guest.read_alarm(UTC), Ok((time, true)));
        assert_eq!(guest.read_alarm(MONOTONIC), Ok((u64::MAX, true)));
        assert!(guest.read(MONOTONIC) > last);
        in_time
    });
}

#[test]
fn an_alarm_that_falls_due_after_the_restart_is_told_then() {
    host::with_longer_spans(|span| {
        let (rig, mut guest) = mortal();
        guest.set_alarm(MONOTONIC, u64::MAX, true);
        let time = host::utc() + 10 * span;
        guest.set_alarm(UTC, time, true);
        let rig = rig.die_and_go_on(|| (), &[]);
        let mut guest = guest.moved_to(rig.clock_stream(), |_| {});
        let in_time = host::utc() < time;
        assert_eq!(guest.notified(), UTC);
        assert!(host::utc() >= time);
        guest.no_notification();
        in_time
    });
}

#[test]
fn an_alarm_that_was_told_is_not_told_again_after_a_restart() {
    let (rig, mut guest) = mortal();
    for clock in host::ids() {
        guest.set_alarm(clock, 1, true);
        told_once(&mut guest, clock);
    }
    let rig = rig.die_and_go_on(|| (), &[]);
    let mut guest = guest.moved_to(rig.clock_stream(), |_| {});
    guest.no_notification();
    assert_eq!(guest.read_alarm(UTC), Ok((1, true)));
    guest.set_alarm_enabled(UTC, true);
    told_once(&mut guest, UTC);
}

#[test]
fn alarms_and_monotonic_survive_many_kills() {
    let (mut rig, mut guest) = mortal();
    let mut last = 0;
    for round in 1..=10 {
        let alarms = host::ids()
            .into_iter()
            .map(|clock| (clock, u64::MAX - round));
        for (clock, time) in alarms.clone() {
            guest.set_alarm(clock, time, round % 2 == 0);
        }
        let reading = guest.read(MONOTONIC);
        assert!(reading > last);
        last = reading;
        rig = rig.die_and_go_on(|| (), &[]);
        guest = guest.moved_to(rig.clock_stream(), |_| {});
        for (clock, time) in alarms {
            assert_eq!(guest.read_alarm(clock), Ok((time, round % 2 == 0)));
        }
    }
}

#[test]
fn alarms_are_kept_by_a_backend_that_has_no_clock_meanwhile() {
    let (rig, mut guest) = mortal();
    guest.set_alarm(UTC, 1, true);
    told_once(&mut guest, UTC);
    guest.set_alarm(MONOTONIC, u64::MAX - 9, true);
    let file = rig.backend.directory().join("state");
    let meanwhile = || {
        let option = format!("--state-file={}", file.display());
        let rig = Rig::launch(&[&option]);
        Client::connect(&rig).configure(3);
    };
    let rig = rig.die_and_go_on(meanwhile, &[]);
    let mut guest = guest.moved_to(rig.clock_stream(), |_| {});
    guest.no_notification();
    assert_eq!(guest.read_alarm(UTC), Ok((1, true)));
    assert_eq!(guest.read_alarm(MONOTONIC), Ok((u64::MAX - 9, true)));
    assert_eq!(Client::connect(&rig).info().vcpus, 3);
}
