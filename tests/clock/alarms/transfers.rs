//! Alarms in the device state.

use super::*;

/// Moves the guest to a backend by device state.
fn migrated(guest: ClockDriver, to: &Rig) -> ClockDriver {
    let stream = save(&guest.driver.control);
    guest.moved_to(to.clock_stream(), |control| assert!(load(control, &stream)))
}

#[test]
fn alarms_and_monotonic_go_to_another_backend_by_device_state() {
    host::with_longer_spans(|span| {
        let (source, destination) = (launch(), launch());
        let mut guest = listening(&source);
        let ids = host::ids();
        for clock in &ids[1..] {
            guest.set_alarm(*clock, 1, true);
            told_once(&mut guest, *clock);
        }
        let time = host::utc() + 10 * span;
        guest.set_alarm(UTC, time, true);
        let last = guest.read(MONOTONIC);
        for queue in [REQUESTQ, ALARMQ] {
            guest.driver.stop(queue);
        }
        let mut guest = migrated(guest, &destination);
        let in_time = host::utc() < time;
        assert!(guest.read(MONOTONIC) > last);
        assert_eq!(guest.clocks() as usize, ids.len());
        assert_eq!(guest.notified(), UTC, "and none that was told");
        assert!(host::utc() >= time);
        guest.no_notification();
        in_time
    });
}

#[test]
fn an_alarm_that_falls_due_on_the_way_is_told_on_arrival() {
    host::with_longer_spans(|span| {
        let (source, destination) = (launch(), launch());
        let mut guest = listening(&source);
        let time = host::utc() + span;
        guest.set_alarm(UTC, time, true);
        for queue in [REQUESTQ, ALARMQ] {
            guest.driver.stop(queue);
        }
        let stream = save(&guest.driver.control);
        let in_time = host::utc() < time;
        host::wait_until(UTC, time + MS);
        let mut guest = guest.moved_to(destination.clock_stream(), |control| {
            assert!(load(control, &stream));
        });
        told_once(&mut guest, UTC);
        in_time
    });
}

#[test]
fn monotonic_never_goes_back_on_a_long_journey() {
    let mut guest: Option<(Rig, ClockDriver)> = None;
    let mut last = 0;
    for _ in 0..6 {
        let rig = launch();
        let mut there = match guest.take() {
            None => ClockDriver::connect(&rig),
            Some((_source, guest)) => migrated(guest, &rig),
        };
        for _ in 0..10 {
            let reading = there.read(MONOTONIC);
            assert!(reading > last, "{reading} after {last}");
            last = reading;
        }
        guest = Some((rig, there));
    }
}

/// The part of a device that must not change by itself.
fn alarms(guest: &mut ClockDriver) -> Vec<Result<(u64, bool), u8>> {
    (0..4).map(|clock| guest.read_alarm(clock)).collect()
}

#[test]
fn a_source_goes_on_as_if_nothing_had_happened() {
    host::with_longer_spans(|span| {
        let rig = launch();
        let mut guest = listening(&rig);
        guest.set_alarm(MONOTONIC, 77, true);
        told_once(&mut guest, MONOTONIC);
        let time = host::utc() + 5 * span;
        guest.set_alarm(UTC, time, true);
        let before = alarms(&mut guest);
        let last = guest.read(MONOTONIC);
        assert!(!save(&guest.driver.control).is_empty());
        // One that nobody reads, and another that replaces it.
        drop(start_save(&guest.driver.control));
        let mut reader = start_save(&guest.driver.control);
        reader.read_exact(&mut [0; 4]).unwrap();
        drop(reader);
        assert!(!save(&guest.driver.control).is_empty());
        assert_eq!(alarms(&mut guest), before);
        assert!(guest.read(MONOTONIC) > last);
        let in_time = host::utc() < time;
        told_once(&mut guest, UTC);
        assert!(host::utc() >= time);
        in_time
    });
}

#[test]
fn every_truncation_and_every_single_bit_flip_is_refused_and_changes_nothing() {
    let source = launch();
    let mut guest = ClockDriver::connect(&source);
    guest.set_alarm(UTC, u64::MAX - 1, true);
    guest.set_alarm(MONOTONIC, 3, true);
    let mut stream = save(&guest.driver.control);
    let rig = launch();
    let mut guest = ClockDriver::connect(&rig);
    guest.set_alarm(UTC, 1 << 62, false);
    let before = alarms(&mut guest);
    let control = guest.driver.control.clone();
    for len in 0..stream.len() {
        assert!(!load(&control, &stream[..len]), "cut off after {len} bytes");
    }
    for bit in 0..stream.len() * 8 {
        stream[bit / 8] ^= 1 << (bit % 8);
        assert!(!load(&control, &stream), "bit {bit}");
        stream[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(!load(&control, &[&stream[..], &[0]].concat()));
    assert_eq!(alarms(&mut guest), before);
    assert!(load(&control, &stream), "and the stream itself is fine");
    assert_eq!(guest.read_alarm(UTC), Ok((u64::MAX - 1, true)));
    post(&mut guest);
    told_once(&mut guest, MONOTONIC);
}

#[test]
fn neither_device_takes_the_others_stream() {
    let rig = Rig::launch_devices(Devices::TimerAndClock, &[]);
    let mut timer = Client::connect(&rig);
    timer.configure(2);
    let mut guest = ClockDriver::connect(&rig);
    guest.set_alarm(UTC, u64::MAX, true);
    let before = (timer.state().at_rest(false), alarms(&mut guest));
    let streams = [save(&timer.driver.control), save(&guest.driver.control)];
    assert!(!load(&guest.driver.control, &streams[0]));
    assert!(!load(&timer.driver.control, &streams[1]));
    for device in ["clock", "timer"] {
        rig.log_with(&format!(
            "not one of a vhost-user-timer backend's {device} device"
        ));
    }
    assert_eq!((timer.state().at_rest(false), alarms(&mut guest)), before);
    assert!(load(&guest.driver.control, &streams[1]));
    assert!(load(&timer.driver.control, &streams[0]));
}

#[test]
fn a_utc_that_treats_leap_seconds_otherwise_is_refused() {
    let source = Rig::launch_devices(Devices::Clock, &["--rtc-clock=smeared"]);
    let rig = Rig::launch_devices(Devices::Clock, &["--rtc-clock=utc"]);
    let stream = save(&ClockDriver::connect(&source).driver.control);
    let mut guest = ClockDriver::connect(&rig);
    let capability = guest.raw(&proper(msg::CLOCK_CAP, UTC), 16);
    assert!(!load(&guest.driver.control, &stream));
    rig.log_with("start it with the clocks that the source has");
    let after = guest.raw(&proper(msg::CLOCK_CAP, UTC), 16);
    assert_eq!(after.writable, capability.writable);
}
