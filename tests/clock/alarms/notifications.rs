//! When an alarm is reported, and in which buffer.

use super::*;

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
        host::with_longer_spans(|span| {
            let time = host::clock(clock) + span;
            guest.set_alarm(clock, time, true);
            let in_time = host::clock(clock) < time;
            // No request comes meanwhile: only the timerfd can wake the backend.
            assert_eq!(guest.notified(), clock);
            assert!(host::clock(clock) >= time, "clock {clock}");
            assert!(guest.read(clock) >= time, "clock {clock}");
            guest.no_notification();
            guest.post_alarm_buffer();
            in_time
        });
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
        host::with_longer_spans(|span| {
            // Read in this order: the second's time stays the later one, whatever lies between.
            let times = [(first, span), (second, 4 * span)];
            let times = times.map(|(clock, after)| (clock, host::clock(clock) + after));
            for (clock, time) in times.into_iter().rev() {
                guest.set_alarm(clock, time, true);
            }
            let in_time = host::clock(first) < times[0].1;
            let mut told = [guest.notified(), guest.notified()];
            if !in_time {
                // The second may have been due before the first was set.
                told.sort_by_key(|clock| *clock != first);
            }
            assert_eq!(told, [first, second]);
            guest.no_notification();
            guest.post_alarm_buffer();
            guest.post_alarm_buffer();
            in_time
        });
    }
}

#[test]
fn an_alarm_that_is_disabled_before_its_time_is_never_told() {
    let rig = launch();
    let mut guest = listening(&rig);
    for clock in host::ids() {
        host::with_longer_spans(|span| {
            let time = host::clock(clock) + span;
            guest.set_alarm(clock, time, true);
            guest.set_alarm_enabled(clock, false);
            let in_time = host::clock(clock) < time;
            host::wait_until(clock, time + MS);
            if in_time {
                guest.no_notification();
            } else {
                // It may have been told before it was disabled.
                assert!(rig.comes_to_rest());
                if guest.driver.used_already(ALARMQ).is_some() {
                    guest.post_alarm_buffer();
                }
            }
            assert_eq!(guest.read_alarm(clock), Ok((time, false)));
            in_time
        });
    }
}

#[test]
fn an_alarm_that_expired_and_was_not_told_is_obsolete_when_it_is_disabled_or_set_again() {
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
