//! The clock device's requests (virtio 1.4 §5.23.6), over the rings, as a guest makes them.

use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::clock_driver::{
    ClockCap, ClockDriver, F_ALARM, MONOTONIC, REQUESTQ, UTC, clock_type, counter, host, msg,
    proper, request, rtc_status, set_alarm,
};
use vhost_user_timer_kit::contract::u64_at;
use vhost_user_timer_kit::raw_driver::{
    Cut, Driver, Layout, NEXT, POISON, Rig, Setup, WRITE, descriptor, until,
};

/// READs of each clock.
const READS: u32 = 3_000;

fn launch(args: &[&str]) -> Rig {
    Rig::launch_devices(Devices::Clock, args)
}

fn types(guest: &mut ClockDriver) -> Vec<u8> {
    let clocks = guest.clocks();
    (0..clocks)
        .map(|clock| guest.clock_cap(clock).unwrap().clock_type)
        .collect()
}

#[test]
fn the_clocks_are_those_that_the_operator_says() {
    for (args, utc) in [
        (&["--rtc-clock=utc"][..], clock_type::UTC),
        (&["--rtc-clock=smeared"], clock_type::UTC_SMEARED),
        (
            &["--rtc-clock=maybe-smeared"],
            clock_type::UTC_MAYBE_SMEARED,
        ),
        // By default the clock is called UTC if the kernel knows how far UTC is from TAI.
        (
            &[],
            match host::tai() {
                Some(_) => clock_type::UTC,
                None => clock_type::UTC_MAYBE_SMEARED,
            },
        ),
    ] {
        let rig = launch(args);
        let mut guest = ClockDriver::connect(&rig);
        let mut expected = vec![utc, clock_type::MONOTONIC];
        expected.extend(host::tai().map(|_| clock_type::TAI));
        assert_eq!(types(&mut guest), expected, "{args:?}");
    }
}

#[test]
fn a_clocks_capabilities_say_whether_alarms_were_negotiated() {
    let rig = launch(&[]);
    for (features, flags) in [(0, 0), (F_ALARM, 1), (0, 0)] {
        let setup = Setup {
            features,
            ..Setup::default()
        };
        let mut guest = ClockDriver::connect_with(&rig, setup);
        for clock in host::ids() {
            let ClockCap {
                smearing,
                flags: said,
                ..
            } = guest.clock_cap(clock).unwrap();
            assert_eq!((smearing, said), (0, flags));
        }
    }
}

#[test]
fn capabilities_are_the_same_whatever_is_asked_in_between() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    let capabilities = |guest: &mut ClockDriver| {
        let clocks = guest.clocks();
        let each: Vec<_> = (0..=clocks)
            .map(|clock| {
                let cross = guest.cross_cap(clock, counter::ARM_VCT);
                (guest.clock_cap(clock), cross)
            })
            .collect();
        (clocks, each)
    };
    let before = capabilities(&mut guest);
    for (msg_type, ..) in msg::ALL {
        for clock in 0..5 {
            guest.raw(&proper(msg_type, clock), 24);
        }
    }
    assert_eq!(capabilities(&mut guest), before);
}

#[test]
fn a_reading_is_the_hosts_clock_between_the_question_and_the_answer() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    for clock in host::ids() {
        for _ in 0..READS {
            guest.reads_the_hosts(clock);
        }
    }
}

#[test]
fn monotonic_never_goes_back_over_connections_and_whatever_is_asked() {
    let rig = launch(&[]);
    let mut last = 0;
    for _ in 0..20 {
        let mut guest = ClockDriver::connect(&rig);
        for _ in 0..100 {
            let reading = guest.read(MONOTONIC);
            assert!(reading >= last, "{reading} after {last}");
            last = reading;
            guest.read(UTC);
        }
    }
}

#[test]
fn readings_are_in_the_order_in_which_they_became_available() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    let read = proper(msg::READ, MONOTONIC);
    let mut last = 0;
    for _ in 0..50 {
        let heads: Vec<_> = (0..60)
            .map(|_| guest.driver.add(REQUESTQ, &read, 16, &Layout::plain()))
            .collect();
        guest.driver.rings[usize::from(REQUESTQ)].kick(&guest.driver.memory);
        for head in heads {
            let used = guest.driver.used(REQUESTQ);
            assert_eq!(used.head, head, "they are served in order");
            let reading = u64::from_le_bytes(used.bytes()[8..16].try_into().unwrap());
            assert!(reading >= last, "{reading} after {last}");
            last = reading;
        }
    }
}

fn layouts() -> Vec<Layout> {
    Layout::all(&[
        Cut::whole(),
        Cut::every(1),
        Cut::every(3),
        Cut::every(8),
        Cut::at(&[0, 1, 0, 0, 5]),
        Cut::at(&[0, usize::MAX, 0]),
    ])
}

/// Requests with the same answer each time, the room for it, and its status.
fn repeatable() -> Vec<(Vec<u8>, usize, u8)> {
    vec![
        (proper(msg::CFG, 0), 16, rtc_status::OK),
        (proper(msg::CLOCK_CAP, MONOTONIC), 16, rtc_status::OK),
        (proper(msg::CROSS_CAP, UTC), 16, rtc_status::OK),
        (set_alarm(UTC, u64::MAX, true), 8, rtc_status::OK),
        (proper(msg::READ_ALARM, UTC), 24, rtc_status::OK),
        (proper(msg::READ_ALARM, UTC), 100, rtc_status::OK),
        (proper(msg::READ, 77), 16, rtc_status::ENODEV),
        (proper(msg::CFG, 0), 15, rtc_status::EINVAL),
        (vec![1], 16, rtc_status::EINVAL),
        (request(0x4321, 20, &[]), 16, rtc_status::EOPNOTSUPP),
    ]
}

#[test]
fn the_same_request_in_any_layout_gets_the_same_bytes() {
    let rig = launch(&[]);
    for event_idx in [true, false] {
        let setup = Setup {
            event_idx,
            ..ClockDriver::setup()
        };
        let mut guest = ClockDriver::connect_with(&rig, setup);
        guest.set_alarm(UTC, u64::MAX, true);
        for (bytes, room, status) in repeatable() {
            let plain = guest.raw(&bytes, room);
            assert_eq!(plain.bytes()[0], status, "{bytes:?}");
            for layout in layouts() {
                guest.layout = layout;
                let used = guest.raw(&bytes, room);
                assert_eq!(used.len, plain.len, "{:?}", guest.layout);
                assert_eq!(used.writable, plain.writable, "{:?}", guest.layout);
            }
            guest.layout = Layout::plain();
        }
    }
}

#[test]
fn a_reading_comes_through_any_layout() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    for layout in layouts() {
        guest.layout = layout;
        guest.reads_the_hosts(UTC);
    }
}

/// The answer of a request with this much room: all bytes that are written.
#[track_caller]
fn answered(guest: &mut ClockDriver, bytes: &[u8], room: usize) -> Vec<u8> {
    let used = guest.raw(bytes, room);
    guest.reads_the_hosts(UTC);
    used.bytes().to_vec()
}

/// A refusal in a response of this length.
fn refusal(status: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[0] = status;
    bytes
}

#[test]
fn an_unknown_message_is_eopnotsupp() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    for msg_type in [0, 3, 0x0fff, 0x1006, msg::ALARM, 0x2001, 0x8000, 0xffff] {
        for len in [8, 9, 24, 4_096] {
            for room in [8, 16, 1_000] {
                assert_eq!(
                    answered(&mut guest, &request(msg_type, len, &[]), room),
                    refusal(rtc_status::EOPNOTSUPP, 8),
                    "{msg_type:#x}"
                );
            }
        }
    }
}

#[test]
fn a_bad_clock_is_enodev() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    let clocks = guest.clocks();
    for (msg_type, _, len, _) in msg::ALL {
        for clock in [clocks, clocks + 1, 255, 256, 0x8000, u16::MAX] {
            if msg_type != msg::CFG {
                assert_eq!(
                    answered(&mut guest, &proper(msg_type, clock), len),
                    refusal(rtc_status::ENODEV, len),
                    "{msg_type:#x} {clock}"
                );
            }
        }
    }
}

#[test]
fn an_unknown_counter_is_eopnotsupp_and_one_that_is_not_had_is_no_capability() {
    let rig = launch(&["--rtc-counter-offset=0"]);
    let mut guest = ClockDriver::connect(&rig);
    for clock in host::ids() {
        for counter in [2, 3, 0x7f, 0xfe, counter::INVALID] {
            let refused = Err(rtc_status::EOPNOTSUPP);
            assert_eq!(guest.cross_cap(clock, counter), refused);
            assert_eq!(
                guest.read_cross(clock, counter).map(|_| ()).err(),
                refused.err()
            );
        }
        assert_eq!(guest.cross_cap(clock, counter::X86_TSC), Ok(false));
        let refused = guest.read_cross(clock, counter::X86_TSC);
        assert_eq!(refused, Err(rtc_status::EOPNOTSUPP));
        assert_eq!(guest.cross_cap(clock, counter::ARM_VCT), Ok(true));
        guest.reads_the_hosts(UTC);
    }
}

#[test]
fn a_request_that_is_cut_short_is_einval() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    for (msg_type, len, response, _) in msg::ALL {
        for cut in 0..len {
            let bytes = &proper(msg_type, UTC)[..cut];
            // If the head is cut short, not even the message type is known.
            let expected = if cut < 8 { 8 } else { response };
            assert_eq!(
                answered(&mut guest, bytes, response),
                refusal(rtc_status::EINVAL, expected),
                "{msg_type:#x}, {cut} bytes"
            );
        }
    }
}

#[test]
fn a_response_that_does_not_fit_is_einval_and_a_status_that_does_not_is_none() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    for (msg_type, _, response, _) in msg::ALL {
        for room in 0..response {
            let expected = match room {
                0 => vec![],
                // The status fits, the rest of the head does not.
                1..8 => vec![rtc_status::EINVAL],
                _ => refusal(rtc_status::EINVAL, 8),
            };
            let bytes = proper(msg_type, UTC);
            let what = format!("{msg_type:#x} in {room} bytes");
            assert_eq!(answered(&mut guest, &bytes, room), expected, "{what}");
        }
    }
    assert_eq!(
        guest.read_alarm(UTC),
        Ok((0, false)),
        "and nothing was done"
    );
}

#[test]
fn a_set_alarm_whose_response_does_not_fit_sets_none() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    for room in 0..8 {
        let used = guest.raw(&set_alarm(UTC, 7, true), room);
        let mut expected = vec![POISON; room];
        let status = expected.first_mut();
        let len = status.iter().len();
        status
            .into_iter()
            .for_each(|byte| *byte = rtc_status::EINVAL);
        assert_eq!((used.len as usize, used.writable), (len, expected));
    }
    assert_eq!(guest.read_alarm(UTC), Ok((0, false)));
}

#[test]
fn a_reserved_byte_that_is_not_zero_is_einval() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    for (msg_type, len, response, _) in msg::ALL {
        let reserved: Vec<usize> = match msg_type {
            msg::CFG => (2..8).collect(),
            msg::READ_CROSS | msg::CROSS_CAP => (2..8).chain(11..16).collect(),
            msg::SET_ALARM => (2..8).chain(18..24).collect(),
            msg::SET_ALARM_ENABLED => (2..8).chain(10..16).collect(),
            _ => (2..8).chain(10..16).collect(),
        };
        for at in reserved {
            for value in [2, 0x80, 0xff] {
                let mut bytes = proper(msg_type, UTC);
                assert_eq!(bytes.len(), len);
                // Bit 0 is an alarm's only flag.
                bytes[at] |= value;
                assert_eq!(
                    answered(&mut guest, &bytes, response),
                    refusal(rtc_status::EINVAL, response),
                    "{msg_type:#x}, byte {at}"
                );
            }
        }
    }
    assert_eq!(guest.read_alarm(UTC), Ok((0, false)));
}

#[test]
fn what_follows_a_request_and_room_past_a_response_are_left_alone() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect(&rig);
    for (msg_type, _, response, _) in msg::ALL {
        // Past what the timer device takes as well.
        for excess in [1, 8, 100, 5_000, 256 << 10, 600_000] {
            let mut bytes = proper(msg_type, UTC);
            bytes.resize(bytes.len() + excess, 0xee);
            let used = guest.raw(&bytes, response + excess);
            let expected = match msg_type {
                msg::READ_CROSS => rtc_status::EOPNOTSUPP,
                _ => rtc_status::OK,
            };
            let written = used.bytes();
            assert_eq!((written.len(), written[0]), (response, expected));
        }
        guest.reads_the_hosts(UTC);
    }
}

#[test]
fn excess_is_ignored_wherever_it_lies() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect_with(
        &rig,
        Setup {
            size: 16,
            ..ClockDriver::setup()
        },
    );
    let Driver { memory, rings, .. } = &mut guest.driver;
    let ring = &mut rings[usize::from(REQUESTQ)];
    let (at, response, nowhere) = (memory.allocate(16), memory.allocate(16), 1 << 60);
    memory.write(at, &proper(msg::READ, UTC));
    memory.write(response, &[POISON; 16]);
    for (index, (address, len, flags)) in (0..).zip([
        (at, 16, NEXT),
        (nowhere, 1 << 20, NEXT),
        (response, 16, WRITE | NEXT),
        (nowhere, 1 << 20, WRITE | NEXT),
        (nowhere, u32::MAX >> 1, WRITE),
    ]) {
        ring.set_descriptor(memory, index, descriptor(address, len, flags, index + 1));
    }
    let before = host::utc();
    ring.make_available(memory, 0);
    ring.kick_anyway();
    until("an answer", || ring.used_index(memory) != 0);
    let entry = memory.read(ring.used_at() + 4, 8);
    assert_eq!(
        entry,
        [0, 0, 0, 0, 16, 0, 0, 0],
        "the head and the used length"
    );
    let bytes = memory.read(response, 16);
    assert_eq!(bytes[..8], [0; 8], "OK");
    let reading = u64_at(&bytes, 8);
    assert!((before..=host::utc()).contains(&reading), "{reading}");
}

#[test]
fn without_the_feature_there_are_no_alarms() {
    let rig = launch(&[]);
    let mut guest = ClockDriver::connect_with(&rig, Setup::default());
    for (msg_type, _, response, about_alarms) in msg::ALL {
        // Whatever else is wrong with the request.
        for clock in [UTC, 99] {
            if about_alarms {
                assert_eq!(
                    answered(&mut guest, &proper(msg_type, clock), response),
                    refusal(rtc_status::ENODEV, response)
                );
            }
        }
    }
    drop(guest);
    let mut guest = ClockDriver::connect(&rig);
    assert_eq!(guest.read_alarm(UTC), Ok((0, false)));
}

#[test]
fn bad_requests_are_refused_in_any_layout_with_and_without_event_idx() {
    let rig = launch(&[]);
    for event_idx in [true, false] {
        for layout in [
            Layout::plain().indirect(),
            Layout::cut(Cut::every(5)).indirect(),
        ] {
            let setup = Setup {
                event_idx,
                ..ClockDriver::setup()
            };
            let mut guest = ClockDriver::connect_with(&rig, setup);
            guest.layout = layout;
            let unknown = request(7, 8, &[]);
            assert_eq!(guest.status(&unknown, 8), rtc_status::EOPNOTSUPP);
            let foreign = proper(msg::READ, 9);
            assert_eq!(guest.status(&foreign, 16), rtc_status::ENODEV);
            let short = &proper(msg::READ, 0)[..15];
            assert_eq!(guest.status(short, 16), rtc_status::EINVAL);
            guest.reads_the_hosts(UTC);
        }
    }
}
