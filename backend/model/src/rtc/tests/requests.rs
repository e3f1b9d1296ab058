//! Virtio 1.4 §5.23.6, "Device Operation": statuses, sizes, reserved bytes.

use zerocopy::IntoBytes;

use super::rig::{
    MONOTONIC, Rig, UTC, every_message, head, of_clock, of_pair, set_alarm, set_alarm_enabled,
};
use crate::rtc::wire::{self, Status};
use crate::rtc::{HostClock, Needs, Request, Rtc, Sampled};

const OK: u8 = Status::Ok as u8;
const UNSUPPORTED: u8 = Status::Unsupported as u8;
const NO_DEVICE: u8 = Status::NoDevice as u8;
const INVALID: u8 = Status::Invalid as u8;

#[test]
fn statuses_and_kinds_have_the_numbers_of_the_specification() {
    assert_eq!(
        (OK, UNSUPPORTED, NO_DEVICE, INVALID, Status::Io as u8),
        (0, 2, 3, 4, 5)
    );
}

#[test]
fn every_message_is_ok_and_answered_in_its_exact_size() {
    for (request, size) in every_message() {
        let response = Rig::new().ask(&request);
        assert_eq!((response[0], response.len()), (OK, size), "{request:?}");
        assert_eq!(response[1..8], [0; 7]);
    }
}

#[test]
fn an_unknown_message_is_not_supported() {
    for msg_type in [0, 3, 0xFFF, 0x1006, wire::NOTIF_ALARM, u16::MAX] {
        let response = Rig::new().ask(head(msg_type).as_bytes());
        assert_eq!(response, [UNSUPPORTED, 0, 0, 0, 0, 0, 0, 0]);
    }
}

#[test]
fn an_unknown_counter_is_not_supported() {
    for msg_type in [wire::REQ_READ_CROSS, wire::REQ_CROSS_CAP] {
        for counter in 2..=wire::COUNTER_INVALID {
            assert_eq!(
                Rig::new().status(&of_pair(msg_type, UTC, counter)),
                UNSUPPORTED
            );
            assert_eq!(
                Rig::new().status(&of_pair(msg_type, 9, counter)),
                UNSUPPORTED
            );
        }
    }
}

#[test]
fn a_clock_id_that_is_no_clock_is_no_device() {
    for clock in [3, 0x100, u16::MAX] {
        for request in [
            of_clock(wire::REQ_READ, clock),
            of_pair(wire::REQ_READ_CROSS, clock, 0),
            of_clock(wire::REQ_CLOCK_CAP, clock),
            of_pair(wire::REQ_CROSS_CAP, clock, 0),
            of_clock(wire::REQ_READ_ALARM, clock),
            set_alarm(clock, 0, 0),
            set_alarm_enabled(clock, 0),
        ] {
            assert_eq!(Rig::new().status(&request), NO_DEVICE);
        }
    }
}

#[test]
fn reserved_bytes_that_are_not_zero_are_invalid() {
    for (request, _) in every_message() {
        let msg_type = u16::from_le_bytes([request[0], request[1]]);
        let body_reserved: &[usize] = match msg_type {
            wire::REQ_CFG => &[],
            wire::REQ_READ | wire::REQ_CLOCK_CAP | wire::REQ_READ_ALARM => &[10, 15],
            wire::REQ_SET_ALARM => &[19, 23],
            _ => &[11, 15],
        };
        for at in [2, 7].iter().chain(body_reserved) {
            let mut request = request.clone();
            request[*at] = 1;
            assert_eq!(
                Rig::new().status(&request),
                INVALID,
                "byte {at} of {request:?}"
            );
        }
    }
}

#[test]
fn flags_that_are_not_allowed_are_invalid() {
    for flags in [2, 3, 0x80, 0xFF] {
        assert_eq!(Rig::new().status(&set_alarm(UTC, 0, flags)), INVALID);
        assert_eq!(Rig::new().status(&set_alarm_enabled(UTC, flags)), INVALID);
    }
}

#[test]
fn a_request_that_does_not_fit_is_invalid() {
    for (request, size) in every_message() {
        for length in 0..request.len() {
            let response = Rig::new().ask(&request[..length]);
            let expected = if length < 8 { 8 } else { size };
            assert_eq!((response[0], response.len()), (INVALID, expected));
        }
    }
}

#[test]
fn a_response_that_does_not_fit_is_invalid_and_changes_nothing() {
    for (request, size) in every_message() {
        for room in 1..size {
            let mut rig = Rig::new();
            let before = rig.rtc.clone();
            let response = rig.ask_with_room(&request, room);
            let length = if room < 8 { 1 } else { 8 };
            assert_eq!((response[0], response.len()), (INVALID, length));
            assert!(response[1..].iter().all(|byte| *byte == 0));
            assert_eq!(rig.rtc, before);
        }
    }
}

#[test]
fn without_room_for_a_status_there_is_none() {
    for (request, _) in every_message() {
        assert!(Rig::new().ask_with_room(&request, 0).is_empty());
    }
    assert!(Rig::new().ask_with_room(&[], 0).is_empty());
}

#[test]
fn a_refusal_whose_head_does_not_fit_is_its_status_alone() {
    for room in 1..8 {
        for (request, status) in [
            (&of_clock(wire::REQ_READ, UTC)[..], INVALID),
            (&set_alarm(UTC, 7, 1), INVALID),
            (&[1], INVALID),
            (head(0x4321).as_bytes(), UNSUPPORTED),
        ] {
            let mut rig = Rig::new();
            let before = rig.rtc.clone();
            assert_eq!(rig.ask_with_room(request, room), [status]);
            assert_eq!(rig.rtc, before);
        }
    }
}

#[test]
fn excess_of_request_and_room_is_ignored() {
    for (request, size) in every_message() {
        let exact = Rig::new().ask_with_room(&request, size);
        let longer = [&request[..], &[0xEE; 100]].concat();
        assert_eq!(Rig::new().ask_with_room(&longer, 5_000), exact);
        let rtc = Rig::new().rtc;
        assert_eq!(needs(&rtc, &longer), needs(&rtc, &request));
    }
}

#[test]
fn a_clock_that_was_not_sampled_is_an_io_error_and_not_a_time() {
    let request = Request::parse(&of_clock(wire::REQ_READ, UTC));
    let mut rig = Rig::new();
    let boottime = Sampled::Clock(HostClock::Boottime, Some(7));
    for now in [Sampled::Nothing, boottime] {
        rig.rtc
            .handle(&request, wire::MAX_RESPONSE, &now, &mut rig.effects);
        assert_eq!(rig.effects.response.first(), Some(&(Status::Io as u8)));
    }
}

#[test]
fn a_refused_request_is_zero_but_for_its_status() {
    let request = of_clock(wire::REQ_READ_ALARM, 9);
    let mut expected = [0; 24];
    expected[0] = NO_DEVICE;
    assert_eq!(Rig::new().ask(&request), expected);
}

fn needs(rtc: &Rtc, request: &[u8]) -> Needs {
    rtc.needs(&Request::parse(request))
}

#[test]
fn the_shell_samples_only_what_is_used() {
    use Needs::{Clock, Cross, Nothing, Time};
    let mut rig = Rig::new();
    let all = |rig: &Rig| every_message().map(|(request, _)| needs(&rig.rtc, &request));
    let others = [Cross, Nothing, Nothing, Cross, Nothing, Time, Time];
    let [read, rest @ ..] = all(&rig);
    assert_eq!((read, rest), (Clock(HostClock::Realtime), others));
    // By this request, an alarm of any clock may have expired.
    rig.set_alarm(MONOTONIC, u64::MAX, true);
    let [read, rest @ ..] = all(&rig);
    assert_eq!((read, rest), (Time, others));
    assert_eq!(needs(&rig.rtc, &[]), Nothing);
    let cut = &of_clock(wire::REQ_READ, UTC)[..15];
    assert_eq!(needs(&rig.rtc, cut), Nothing);
    assert_eq!(needs(&rig.rtc, &[0xFF; 64]), Nothing);
}

#[test]
fn a_response_allocates_nothing_once_it_is_warm() {
    let mut rig = Rig::new();
    rig.effects.response.reserve(wire::MAX_RESPONSE);
    let (at, capacity) = (
        rig.effects.response.as_ptr(),
        rig.effects.response.capacity(),
    );
    for (request, _) in every_message() {
        rig.ask_unseen(&request, usize::MAX);
        assert_eq!(rig.effects.response.as_ptr(), at);
        assert_eq!(rig.effects.response.capacity(), capacity);
    }
}
