//! Alarms of the clock device (virtio 1.4 §5.23.6.6): when they are told, and what they outlive.

use std::io::Read;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::clock_driver::{
    ALARMQ, ClockDriver, F_ALARM, MONOTONIC, MS, REQUESTQ, SECOND, UTC, host, msg, proper,
};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::{
    Cut, Driver, Layout, POISON, Rig, Setup, load, save, start_save,
};

/// Soon enough to wait for, and long enough to do something before on most machines.
const SOON: u64 = 60 * MS;
const HOUR: u64 = 3_600 * SECOND;

fn launch() -> Rig {
    Rig::launch_devices(Devices::Clock, &[])
}

/// A guest that posted buffers for notifications.
fn listening(rig: &Rig) -> ClockDriver {
    let mut guest = ClockDriver::connect(rig);
    post(&mut guest);
    guest
}

fn post(guest: &mut ClockDriver) {
    for _ in 0..8 {
        guest.post_alarm_buffer();
    }
}

/// The next notification is of this clock, and there is no other.
#[track_caller]
fn told_once(guest: &mut ClockDriver, clock: u16) {
    assert_eq!(guest.notified(), clock);
    guest.no_notification();
}

#[test]
fn an_alarm_in_the_past_is_told_once_and_at_once() {
    let rig = launch();
    let mut guest = listening(&rig);
    for clock in host::ids() {
        let now = host::clock(clock);
        for time in [0, 1, now - 1, now] {
            guest.set_alarm(clock, time, true);
            told_once(&mut guest, clock);
            assert_eq!(
                guest.read_alarm(clock),
                Ok((time, true)),
                "it stays enabled"
            );
            guest.post_alarm_buffer();
        }
    }
}

#[test]
fn an_alarm_to_come_is_told_once_and_not_before_its_time() {
    let rig = launch();
    let mut guest = listening(&rig);
    for clock in host::ids() {
        let time = host::clock(clock) + SOON;
        guest.set_alarm(clock, time, true);
        // Nobody asks meanwhile: it is the timerfd that tells of it.
        assert_eq!(guest.notified(), clock);
        assert!(host::clock(clock) >= time, "clock {clock}");
        assert!(guest.read(clock) >= time, "clock {clock}");
        guest.no_notification();
    }
}

#[test]
fn alarms_far_away_are_not_told() {
    let rig = launch();
    let mut guest = listening(&rig);
    for clock in host::ids() {
        for time in [
            host::clock(clock) + HOUR,
            i64::MAX as u64 - 1,
            i64::MAX as u64,
            1 << 63,
            u64::MAX,
        ] {
            guest.set_alarm(clock, time, true);
            guest.no_notification();
            assert_eq!(guest.read_alarm(clock), Ok((time, true)));
        }
    }
    assert!(rig.comes_to_rest(), "nothing is due, and nothing is done");
}

#[test]
fn alarms_of_several_clocks_are_told_in_the_order_of_their_times() {
    let rig = launch();
    let mut guest = listening(&rig);
    for (first, second) in [(UTC, MONOTONIC), (MONOTONIC, UTC)] {
        for (clock, after) in [(second, 4 * SOON), (first, SOON)] {
            guest.set_alarm(clock, host::clock(clock) + after, true);
        }
        assert_eq!(guest.notified(), first);
        assert_eq!(guest.notified(), second);
        guest.no_notification();
    }
}

#[test]
fn an_alarm_that_is_disabled_before_its_time_is_never_told() {
    let rig = launch();
    let mut guest = listening(&rig);
    for clock in host::ids() {
        let mut span = SOON;
        let time = loop {
            let time = host::clock(clock) + span;
            guest.set_alarm(clock, time, true);
            guest.set_alarm_enabled(clock, false);
            // It is of no use where this thread was not run for so long.
            if host::clock(clock) < time {
                break time;
            }
            while guest.driver.used_already(ALARMQ).is_some() {}
            post(&mut guest);
            span *= 2;
        };
        host::wait_until(clock, time + MS);
        guest.no_notification();
        assert_eq!(guest.read_alarm(clock), Ok((time, false)));
    }
}

#[test]
fn an_alarm_that_expired_and_was_not_told_is_obsolete_when_it_is_disabled_or_set_anew() {
    let rig = launch();
    let mut guest = ClockDriver::connect(&rig);
    for clock in host::ids() {
        guest.set_alarm(clock, 1, true);
        guest.set_alarm_enabled(clock, false);
    }
    guest.set_alarm(UTC, 1, true);
    guest.set_alarm(UTC, u64::MAX, true);
    post(&mut guest);
    guest.no_notification();
}

#[test]
fn enabling_an_alarm_keeps_its_time() {
    let rig = launch();
    let mut guest = listening(&rig);
    for clock in host::ids() {
        guest.set_alarm(clock, 5, false);
        guest.no_notification();
        assert_eq!(guest.read_alarm(clock), Ok((5, false)));
        guest.set_alarm_enabled(clock, true);
        told_once(&mut guest, clock);
        assert_eq!(guest.read_alarm(clock), Ok((5, true)));
        guest.set_alarm_enabled(clock, true);
        told_once(&mut guest, clock);

        let time = host::clock(clock) + HOUR;
        guest.set_alarm(clock, time, true);
        for enabled in [false, true, true, false] {
            guest.set_alarm_enabled(clock, enabled);
            assert_eq!(guest.read_alarm(clock), Ok((time, enabled)));
        }
        guest.no_notification();
    }
}

#[test]
fn without_a_buffer_an_alarm_is_told_when_there_is_one() {
    let rig = launch();
    let mut guest = ClockDriver::connect(&rig);
    for clock in host::ids() {
        guest.set_alarm(clock, host::clock(clock) - 1, true);
    }
    guest.settle();
    for clock in host::ids() {
        guest.post_alarm_buffer();
        assert_eq!(guest.notified(), clock);
    }
    post(&mut guest);
    guest.no_notification();
}

#[test]
fn a_buffer_that_is_too_short_comes_back_empty_and_the_next_one_is_used() {
    let rig = launch();
    for event_idx in [true, false] {
        let setup = Setup {
            event_idx,
            ..ClockDriver::setup()
        };
        let mut guest = ClockDriver::connect_with(&rig, setup);
        for room in [0, 1, 8, 15] {
            let head = guest
                .driver
                .submit(ALARMQ, &[], room, &Layout::plain().indirect());
            guest.set_alarm(UTC, 1, true);
            let used = guest.driver.used(ALARMQ);
            assert_eq!((used.head, used.len), (head, 0));
            assert_eq!(used.writable, vec![POISON; room]);
            guest.settle();
            assert!(guest.driver.used_already(ALARMQ).is_none());
            guest.post_alarm_buffer();
            told_once(&mut guest, UTC);
        }
    }
}

#[test]
fn a_buffer_of_any_layout_takes_a_notification() {
    let rig = launch();
    let mut guest = ClockDriver::connect(&rig);
    for cut in [
        Cut::whole(),
        Cut::every(1),
        Cut::every(3),
        Cut::at(&[0, 9, 0, 4]),
    ] {
        for layout in [
            Layout::cut(cut.clone()),
            Layout::cut(cut.clone()).reversed(),
            Layout::cut(cut.clone()).indirect(),
        ] {
            for room in [16, 17, 300] {
                let layout = if room == 300 {
                    layout.clone().indirect()
                } else {
                    layout.clone()
                };
                guest.driver.submit(ALARMQ, &[], room, &layout);
                guest.set_alarm(MONOTONIC, 1, true);
                told_once(&mut guest, MONOTONIC);
            }
        }
    }
}

#[test]
fn alarms_take_no_thread_and_no_descriptor() {
    let rig = launch();
    let mut guest = ClockDriver::connect(&rig);
    guest.settle();
    let before = rig.usage();
    let mut posted = 0;
    for n in 0..1_000 {
        for clock in host::ids() {
            let time = host::clock(clock) + (n % 7) * SOON;
            guest.set_alarm(clock, time, true);
            if n % 3 == 0 && posted < 100 {
                guest.post_alarm_buffer();
                posted += 1;
            }
            while guest.driver.used_already(ALARMQ).is_some() {
                posted -= 1;
            }
        }
    }
    let after = rig.usage();
    assert_eq!((after.threads, after.fds), (before.threads, before.fds));
}

#[test]
fn an_alarm_that_falls_due_while_the_rings_are_stopped_is_told_when_they_start() {
    for event_idx in [true, false] {
        let rig = launch();
        let setup = Setup {
            event_idx,
            ..ClockDriver::setup()
        };
        let mut guest = ClockDriver::connect_with(&rig, setup);
        post(&mut guest);
        let time = host::utc() + SOON;
        guest.set_alarm(UTC, time, true);
        let bases = [REQUESTQ, ALARMQ].map(|queue| (queue, guest.driver.stop(queue)));
        host::wait_until(UTC, time + MS);
        for (queue, base) in bases {
            guest.driver.start_at(queue, base);
        }
        // And nobody kicks: a guest that sleeps until its alarm has no reason to.
        told_once(&mut guest, UTC);
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

/// RESET_DEVICE, and the device set up anew on the same connection.
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
    let rig = launch();
    let mut guest = listening(&rig);
    let time = host::boottime() + SOON;
    guest.set_alarm(MONOTONIC, time, true);
    // The guest lives on, and then another begins.
    let mut guest = guest.moved_to(rig.clock_stream(), |_| {
        host::wait_until(MONOTONIC, time + MS);
    });
    told_once(&mut guest, MONOTONIC);
    guest.set_alarm(MONOTONIC, host::boottime() + SOON, true);
    drop(guest);
    host::wait_until(MONOTONIC, host::boottime() + SOON + MS);
    let mut guest = listening(&rig);
    told_once(&mut guest, MONOTONIC);
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
    // The requestq is where it begins, and all but started, when the alarmq is.
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

/// A backend with a state file, and a guest that listens.
fn mortal() -> (Rig, ClockDriver) {
    let rig = Rig::launch_devices_with_state(Devices::TimerAndClock, &[]);
    let guest = listening(&rig);
    (rig, guest)
}

#[test]
fn an_alarm_that_falls_due_while_the_backend_is_dead_is_told_at_once() {
    let (rig, mut guest) = mortal();
    let time = host::utc() + SOON;
    let last = guest.read(MONOTONIC);
    guest.set_alarm(UTC, time, true);
    guest.set_alarm(MONOTONIC, u64::MAX, true);
    let rig = rig.die_and_go_on(|| host::wait_until(UTC, time + MS), &[]);
    let mut guest = guest.moved_to(rig.clock_stream(), |_| {});
    told_once(&mut guest, UTC);
    assert_eq!(guest.read_alarm(UTC), Ok((time, true)));
    assert_eq!(guest.read_alarm(MONOTONIC), Ok((u64::MAX, true)));
    assert!(guest.read(MONOTONIC) > last);
}

#[test]
fn an_alarm_that_falls_due_after_the_restart_is_told_then() {
    let (rig, mut guest) = mortal();
    guest.set_alarm(MONOTONIC, u64::MAX, true);
    let time = host::utc() + 10 * SOON;
    guest.set_alarm(UTC, time, true);
    let rig = rig.die_and_go_on(|| (), &[]);
    let mut guest = guest.moved_to(rig.clock_stream(), |_| {});
    assert_eq!(guest.notified(), UTC);
    assert!(host::utc() >= time);
    guest.no_notification();
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

/// Moves the guest to a backend by device state.
fn migrated(guest: ClockDriver, to: &Rig) -> ClockDriver {
    let stream = save(&guest.driver.control);
    guest.moved_to(to.clock_stream(), |control| assert!(load(control, &stream)))
}

#[test]
fn alarms_and_monotonic_go_to_another_backend_by_device_state() {
    let (source, destination) = (launch(), launch());
    let mut guest = listening(&source);
    let ids = host::ids();
    for clock in &ids[1..] {
        guest.set_alarm(*clock, 1, true);
        told_once(&mut guest, *clock);
    }
    let time = host::utc() + 10 * SOON;
    guest.set_alarm(UTC, time, true);
    let last = guest.read(MONOTONIC);
    for queue in [REQUESTQ, ALARMQ] {
        guest.driver.stop(queue);
    }
    let mut guest = migrated(guest, &destination);
    assert!(guest.read(MONOTONIC) > last);
    assert_eq!(guest.clocks() as usize, ids.len());
    assert_eq!(guest.notified(), UTC, "and none that was told");
    assert!(host::utc() >= time);
    guest.no_notification();
}

#[test]
fn an_alarm_that_falls_due_on_the_way_is_told_on_arrival() {
    let (source, destination) = (launch(), launch());
    let mut guest = listening(&source);
    let time = host::utc() + SOON;
    guest.set_alarm(UTC, time, true);
    for queue in [REQUESTQ, ALARMQ] {
        guest.driver.stop(queue);
    }
    let stream = save(&guest.driver.control);
    host::wait_until(UTC, time + MS);
    let mut guest = guest.moved_to(destination.clock_stream(), |control| {
        assert!(load(control, &stream));
    });
    told_once(&mut guest, UTC);
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

/// What of a device must not change by itself.
fn alarms(guest: &mut ClockDriver) -> Vec<Result<(u64, bool), u8>> {
    (0..4).map(|clock| guest.read_alarm(clock)).collect()
}

#[test]
fn a_source_goes_on_as_if_nothing_had_happened() {
    let rig = launch();
    let mut guest = listening(&rig);
    guest.set_alarm(MONOTONIC, 77, true);
    told_once(&mut guest, MONOTONIC);
    let time = host::utc() + 5 * SOON;
    guest.set_alarm(UTC, time, true);
    let before = alarms(&mut guest);
    let last = guest.read(MONOTONIC);
    assert!(!save(&guest.driver.control).is_empty());
    // One that nobody reads, and one in its place.
    drop(start_save(&guest.driver.control));
    let mut reader = start_save(&guest.driver.control);
    reader.read_exact(&mut [0; 4]).unwrap();
    drop(reader);
    assert!(!save(&guest.driver.control).is_empty());
    assert_eq!(alarms(&mut guest), before);
    assert!(guest.read(MONOTONIC) > last);
    told_once(&mut guest, UTC);
    assert!(host::utc() >= time);
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
