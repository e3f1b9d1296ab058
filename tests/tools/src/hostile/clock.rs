//! virtio-rtc: requests of every shape, with status and used length as the standard has them
//! (virtio 1.4 §5.23.6), and alarms that expire once.

use fastrand::Rng;
use vhost_user_timer_kit::clock_driver::{
    ClockDriver, MONOTONIC, UTC, host, msg, proper, rtc_status, set_alarm,
};
use vhost_user_timer_kit::contract::{u16_at, u64_at};
use vhost_user_timer_kit::raw_driver::{Cut, Layout};

use super::round::{Round, Socket};

/// Requests in a round.
const REQUESTS: usize = 600;

/// The alarm of a clock: its time, and whether it is enabled.
type Alarm = (u64, bool);

/// The longest time there is, which never comes.
const NEVER: u64 = u64::MAX;

pub(super) fn round(round: &mut Round<'_>) {
    round.beside_a_neighbour(Socket::Clock, |round| {
        round.tally.connections += 1;
        let mut guest = ClockDriver::connect(&round.victim.rig);
        let clocks = host::ids();
        let mut alarms: Vec<Alarm> = vec![(NEVER, false); clocks.len()];
        for clock in &clocks {
            guest.set_alarm(*clock, NEVER, false);
        }
        for _ in 0..REQUESTS {
            let bytes = any_request(&mut round.random);
            // A chain has a descriptor.
            let room = round.random.usize(usize::from(bytes.is_empty())..40);
            round.act(|| format!("room {room}: {bytes:x?}"));
            guest.layout = Layout {
                readable: Cut::at(&[round.random.usize(0..20), usize::MAX]),
                writable: Cut::at(&[round.random.usize(0..20), usize::MAX]),
                indirect: round.random.bool(),
                reversed: round.random.bool(),
            };
            let used = guest.raw(&bytes, room);
            let written = used.bytes();
            let (statuses, len) = expected(&bytes, room, clocks.len() as u16);
            let status = written.first().copied();
            let allowed = status.is_none_or(|status| statuses.contains(&status));
            assert!(
                allowed,
                "{bytes:x?}: status {status:?}, not of {statuses:?}"
            );
            let granted = status == Some(rtc_status::OK);
            let fits: &[usize] = match room {
                _ if granted => &[len],
                0 => &[0],
                // The status fits, the rest of the head does not.
                1..8 => &[1],
                // The head, or a whole response that is otherwise zero.
                _ => &[8, len],
            };
            let len = used.len as usize;
            assert!(
                fits.contains(&len),
                "{bytes:x?} with room {room}: {len} of {fits:?}"
            );
            round.tally.refusals += u64::from(!granted);
            if granted {
                note(&mut alarms, &bytes);
            }
        }
        guest.layout = Layout::plain();
        for (clock, alarm) in clocks.iter().zip(&alarms) {
            assert_eq!(guest.read_alarm(*clock), Ok(*alarm), "clock {clock}");
        }
        expire(round, &mut guest);
        for clock in clocks {
            guest.set_alarm(clock, 0, false);
        }
    });
}

/// An alarm that is due is reported once.
fn expire(round: &mut Round<'_>, guest: &mut ClockDriver) {
    for clock in [UTC, MONOTONIC] {
        guest.post_alarm_buffer();
        let past = round.random.u64(0..host::clock(clock));
        round.act(|| format!("clock {clock}'s alarm at {past}"));
        guest.set_alarm(clock, past, true);
        assert_eq!(guest.notified(), clock);
        guest.post_alarm_buffer();
        guest.no_notification();
    }
}

/// What an executed request makes of the alarms.
fn note(alarms: &mut [Alarm], bytes: &[u8]) {
    match u16_at(bytes, 0) {
        msg::SET_ALARM => {
            let clock = usize::from(u16_at(bytes, 16));
            alarms[clock] = (u64_at(bytes, 8), bytes[18] == 1);
        }
        msg::SET_ALARM_ENABLED => alarms[usize::from(u16_at(bytes, 8))].1 = bytes[10] == 1,
        _ => {}
    }
}

fn any_request(random: &mut Rng) -> Vec<u8> {
    let (msg_type, ..) = *random.choice(&msg::ALL).expect("one");
    let clock = match random.u8(0..6) {
        0 => random.u16(..),
        1 => 3,
        _ => random.u16(0..3),
    };
    let mut bytes = match msg_type {
        msg::SET_ALARM => set_alarm(clock, NEVER - random.u64(0..1 << 40), random.bool()),
        _ => proper(msg_type, clock),
    };
    match random.u8(0..12) {
        0 => bytes.truncate(random.usize(0..bytes.len())),
        1 => bytes.resize(bytes.len() + random.usize(1..600), 0xee),
        2 => {
            let unknown = random.u16(0x10..0x1000);
            bytes[..2].copy_from_slice(&unknown.to_le_bytes());
        }
        // Reserved bytes of the head.
        3 => bytes[random.usize(2..8)] = random.u8(1..),
        _ => {}
    }
    bytes
}

/// The statuses that a request may get, and the length of its whole response.
fn expected(bytes: &[u8], room: usize, clocks: u16) -> (Vec<u8>, usize) {
    if bytes.len() < 8 {
        return (vec![rtc_status::EINVAL], 8);
    }
    let msg_type = u16_at(bytes, 0);
    let Some((_, len, response, _)) = msg::ALL.into_iter().find(|one| one.0 == msg_type) else {
        // Where only the status fits, it may be either.
        let fits = room < 8;
        let statuses = [
            fits.then_some(rtc_status::EINVAL),
            Some(rtc_status::EOPNOTSUPP),
        ];
        return (statuses.into_iter().flatten().collect(), 8);
    };
    if bytes.len() < len || room < response {
        let len = if room < response { 8 } else { response };
        return (vec![rtc_status::EINVAL], len);
    }
    let at = if msg_type == msg::SET_ALARM { 16 } else { 8 };
    if msg_type != msg::CFG && u16_at(bytes, at) >= clocks {
        // Of READ_CROSS, the counter may be unknown first.
        return (vec![rtc_status::ENODEV, rtc_status::EOPNOTSUPP], response);
    }
    if bytes[2..8] != [0; 6] {
        return (vec![rtc_status::EINVAL, rtc_status::EOPNOTSUPP], response);
    }
    let mut statuses = vec![rtc_status::OK];
    if msg_type == msg::READ_CROSS {
        // The VM of a victim is PAUSED, and the counter another on other hosts.
        statuses = vec![rtc_status::EIO, rtc_status::EOPNOTSUPP];
    }
    (statuses, response)
}
