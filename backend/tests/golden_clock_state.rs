//! Streams of the clock device are read forever, in every version that a backend ever wrote.
//!
//! As `golden_device_state.rs` for the timer device's: the files in `data/clock-state` are never
//! changed, and `VUT_WRITE_GOLDEN=1` writes those that are not there.

use std::path::PathBuf;

use vhost_user_timer::state::clock_stream::{decode, encode};
use vhost_user_timer_model::rtc::{
    AlarmState, ClockKind, Counter, Effects, Rtc, Sample, Saved, SavedClock,
};

const FILE: &str = "v1-three-clocks.bin";

fn golden() -> Saved {
    let clock = |kind, alarm_time, alarm_state| SavedClock {
        kind,
        alarm_time,
        alarm_state,
    };
    Saved {
        utc_ns: 1_790_000_000_123_456_789,
        monotonic_ns: 0x0123_4567_89ab_cdef,
        clocks: vec![
            clock(ClockKind::UtcSmeared, u64::MAX, AlarmState::Waiting),
            clock(ClockKind::Monotonic, 1, AlarmState::Due),
            clock(ClockKind::Tai, 0x1_0000_0000, AlarmState::Told),
        ],
        cross_capable: Some(true),
        counter_floor: Some(0xfedc_ba98_7654_3210),
    }
}

/// The folder of this crate's Cargo.toml. It is looked up when the test runs, so that the program
/// can run elsewhere than it was built.
fn manifest_dir() -> PathBuf {
    let folder = std::env::var_os("CARGO_MANIFEST_DIR");
    folder.expect("CARGO_MANIFEST_DIR: cargo sets it").into()
}

fn stream() -> Vec<u8> {
    let folder = manifest_dir().join("tests/data/clock-state");
    let path = folder.join(FILE);
    if std::env::var_os("VUT_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, encode(&golden())).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn the_golden_file_says_what_it_always_said_and_is_of_the_version_that_is_written_now() {
    assert_eq!(decode(&stream()), Ok(golden()));
    assert_eq!(encode(&golden()), stream());
}

#[test]
fn the_golden_file_makes_a_device() {
    let now = Sample {
        utc_ns: golden().utc_ns + 5,
        tai_ns: None,
        monotonic_ns: 9,
        counter: Counter::Withheld,
    };
    let mut rtc = Rtc::new(&[ClockKind::UtcSmeared, ClockKind::Monotonic]);
    let saved = decode(&stream()).unwrap();
    rtc.load(&saved, &now, &mut Effects::default()).unwrap();
    let again = rtc.save(&now);
    assert_eq!(again.monotonic_ns, golden().monotonic_ns + 5);
    assert_eq!(again.clocks, golden().clocks);
}
