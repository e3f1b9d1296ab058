//! A saved clock device as a stream of bytes.
//!
//! The types here are the stream's own, so that nothing else can change it by accident. Nothing in
//! a stream is trusted.

use serde::{Deserialize, Serialize};

pub use super::envelope::DecodeError;
use super::envelope::StreamFormat;
use vhost_user_timer_model::rtc::{AlarmState, ClockKind, Saved, SavedClock};

const FORMAT: StreamFormat = StreamFormat {
    magic: *b"vuclock1",
    device: "clock device",
    version: 1,
};

#[derive(Serialize, Deserialize)]
enum Versioned {
    /// Never written: version 0 is no version.
    V0,
    V1(V1),
}

#[derive(Serialize, Deserialize)]
struct V1 {
    utc_ns: u64,
    monotonic_ns: u64,
    clocks: Vec<ClockV1>,
    cross_capable: Option<bool>,
    counter_floor: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct ClockV1 {
    kind: u8,
    alarm_time: u64,
    alarm_state: u8,
}

/// A saved clock device as a stream.
pub fn encode(saved: &Saved) -> Vec<u8> {
    FORMAT.encode(&Versioned::V1(V1 {
        utc_ns: saved.utc_ns,
        monotonic_ns: saved.monotonic_ns,
        clocks: saved
            .clocks
            .iter()
            .map(|clock| ClockV1 {
                kind: clock.kind as u8,
                alarm_time: clock.alarm_time,
                alarm_state: clock.alarm_state as u8,
            })
            .collect(),
        cross_capable: saved.cross_capable,
        counter_floor: saved.counter_floor,
    }))
}

/// The saved clock device of a stream.
///
/// # Errors
///
/// [`DecodeError`] for everything that [`encode`] does not write. Which clocks a backend has is for
/// the device to say.
pub fn decode(bytes: &[u8]) -> Result<Saved, DecodeError> {
    let malformed = DecodeError::Malformed;
    let Versioned::V1(state) = FORMAT.decode(bytes)? else {
        return Err(malformed("no version"));
    };
    let clock = |clock: ClockV1| {
        Ok(SavedClock {
            kind: ClockKind::from_code(clock.kind).ok_or(malformed("no such clock"))?,
            alarm_time: clock.alarm_time,
            alarm_state: AlarmState::from_code(clock.alarm_state)
                .ok_or(malformed("no such state of an alarm"))?,
        })
    };
    Ok(Saved {
        utc_ns: state.utc_ns,
        monotonic_ns: state.monotonic_ns,
        clocks: state
            .clocks
            .into_iter()
            .map(clock)
            .collect::<Result<_, _>>()?,
        cross_capable: state.cross_capable,
        counter_floor: state.counter_floor,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Saved {
        let clock = |kind, alarm_time, alarm_state| SavedClock {
            kind,
            alarm_time,
            alarm_state,
        };
        Saved {
            utc_ns: 1_790_000_000_123_456_789,
            monotonic_ns: 77,
            clocks: vec![
                clock(ClockKind::UtcSmeared, u64::MAX, AlarmState::Waiting),
                clock(ClockKind::Monotonic, 0, AlarmState::Due),
                clock(ClockKind::Tai, 5, AlarmState::Told),
            ],
            cross_capable: Some(true),
            counter_floor: Some(1 << 40),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let empty = Saved {
            clocks: Vec::new(),
            cross_capable: None,
            counter_floor: None,
            ..saved()
        };
        for saved in [saved(), empty] {
            assert_eq!(decode(&encode(&saved)), Ok(saved));
        }
    }

    #[test]
    fn every_truncation_and_every_single_bit_flip_is_refused() {
        let mut bytes = encode(&saved());
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{len}");
        }
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes).is_err(), "{bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn what_has_a_right_checksum_is_not_trusted_either() {
        let clock = |kind, alarm_state| {
            Versioned::V1(V1 {
                utc_ns: 0,
                monotonic_ns: 0,
                clocks: vec![ClockV1 {
                    kind,
                    alarm_time: 0,
                    alarm_state,
                }],
                cross_capable: None,
                counter_floor: None,
            })
        };
        assert!(decode(&FORMAT.encode(&clock(4, 3))).is_ok());
        for bad in [clock(5, 0), clock(0, 4), Versioned::V0] {
            let refused = decode(&FORMAT.encode(&bad));
            assert!(matches!(refused, Err(DecodeError::Malformed(_))));
        }
        let version = DecodeError::Version {
            version: 2,
            newest: 1,
        };
        assert_eq!(decode(&FORMAT.with_payload(&[2])), Err(version));
    }

    #[test]
    fn the_timer_devices_stream_is_refused_as_what_it_is() {
        let vm = super::super::stream::encode(&vhost_user_timer_model::vm::Saved {
            abi: vhost_user_timer_protocol::Abi::Arm64,
            frequency: 1,
            flags: vhost_user_timer_model::vm::VmFlags::default(),
            counts: [0, 0],
            vcpus: Vec::new(),
        });
        assert_eq!(decode(&vm), Err(DecodeError::Foreign("clock device")));
    }
}
