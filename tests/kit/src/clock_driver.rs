//! A guest's driver of the clock device: virtio-rtc by hand, over the [raw
//! driver](crate::raw_driver).
//!
//! Codes and offsets are typed from the specification (virtio 1.4 §5.23); nothing of the backend is
//! used. Every response is checked for what the specification says of all responses: the used
//! length is exactly the response's, reserved bytes are zero, and nothing past it is written.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::time::{ClockId, DynamicClockId, Timespec, clock_gettime, clock_gettime_dynamic};
use vhost::vhost_user::Frontend;

use crate::contract::{u16_at, u64_at};
use crate::raw_driver::{Driver, Layout, Rig, Setup, Used};

/// VIRTIO_RTC_F_ALARM.
pub const F_ALARM: u64 = 1 << 0;
/// VHOST_F_LOG_ALL.
pub const F_LOG_ALL: u64 = 1 << 26;

/// The requestq.
pub const REQUESTQ: u16 = 0;
/// The alarmq.
pub const ALARMQ: u16 = 1;

/// The id of the UTC-like clock.
pub const UTC: u16 = 0;
/// The id of the MONOTONIC clock.
pub const MONOTONIC: u16 = 1;
/// The id of the TAI clock, where there is one.
pub const TAI: u16 = 2;

/// A second, ns.
pub const SECOND: u64 = 1_000_000_000;
/// A millisecond, ns.
pub const MS: u64 = 1_000_000;

/// `msg_type`s.
pub mod msg {
    /// VIRTIO_RTC_REQ_READ.
    pub const READ: u16 = 0x0001;
    /// VIRTIO_RTC_REQ_READ_CROSS.
    pub const READ_CROSS: u16 = 0x0002;
    /// VIRTIO_RTC_REQ_CFG.
    pub const CFG: u16 = 0x1000;
    /// VIRTIO_RTC_REQ_CLOCK_CAP.
    pub const CLOCK_CAP: u16 = 0x1001;
    /// VIRTIO_RTC_REQ_CROSS_CAP.
    pub const CROSS_CAP: u16 = 0x1002;
    /// VIRTIO_RTC_REQ_READ_ALARM.
    pub const READ_ALARM: u16 = 0x1003;
    /// VIRTIO_RTC_REQ_SET_ALARM.
    pub const SET_ALARM: u16 = 0x1004;
    /// VIRTIO_RTC_REQ_SET_ALARM_ENABLED.
    pub const SET_ALARM_ENABLED: u16 = 0x1005;
    /// VIRTIO_RTC_NOTIF_ALARM.
    pub const ALARM: u16 = 0x2000;

    /// Every request, the lengths of request and response, and whether it is about an alarm.
    pub const ALL: [(u16, usize, usize, bool); 8] = [
        (READ, 16, 16, false),
        (READ_CROSS, 16, 24, false),
        (CFG, 8, 16, false),
        (CLOCK_CAP, 16, 16, false),
        (CROSS_CAP, 16, 16, false),
        (READ_ALARM, 16, 24, true),
        (SET_ALARM, 24, 8, true),
        (SET_ALARM_ENABLED, 16, 8, true),
    ];
}

/// Statuses.
pub mod rtc_status {
    /// VIRTIO_RTC_S_OK.
    pub const OK: u8 = 0;
    /// VIRTIO_RTC_S_EOPNOTSUPP.
    pub const EOPNOTSUPP: u8 = 2;
    /// VIRTIO_RTC_S_ENODEV.
    pub const ENODEV: u8 = 3;
    /// VIRTIO_RTC_S_EINVAL.
    pub const EINVAL: u8 = 4;
    /// VIRTIO_RTC_S_EIO.
    pub const EIO: u8 = 5;
}

/// Hardware counters.
pub mod counter {
    /// VIRTIO_RTC_COUNTER_ARM_VCT.
    pub const ARM_VCT: u8 = 0;
    /// VIRTIO_RTC_COUNTER_X86_TSC.
    pub const X86_TSC: u8 = 1;
    /// VIRTIO_RTC_COUNTER_INVALID.
    pub const INVALID: u8 = 0xff;
}

/// Clock types.
pub mod clock_type {
    /// VIRTIO_RTC_CLOCK_UTC.
    pub const UTC: u8 = 0;
    /// VIRTIO_RTC_CLOCK_TAI.
    pub const TAI: u8 = 1;
    /// VIRTIO_RTC_CLOCK_MONOTONIC.
    pub const MONOTONIC: u8 = 2;
    /// VIRTIO_RTC_CLOCK_UTC_SMEARED.
    pub const UTC_SMEARED: u8 = 3;
    /// VIRTIO_RTC_CLOCK_UTC_MAYBE_SMEARED.
    pub const UTC_MAYBE_SMEARED: u8 = 4;
}

/// The host's own clocks, ns.
pub mod host {
    use super::*;

    fn ns(time: Timespec) -> u64 {
        // None of these clocks is before its epoch.
        time.tv_sec as u64 * SECOND + time.tv_nsec as u64
    }

    /// CLOCK_REALTIME, which the UTC-like clock is.
    pub fn utc() -> u64 {
        ns(clock_gettime(ClockId::Realtime))
    }

    /// CLOCK_BOOTTIME, from which the MONOTONIC clock follows.
    pub fn boottime() -> u64 {
        ns(clock_gettime(ClockId::Boottime))
    }

    /// CLOCK_TAI, where the kernel knows it.
    pub fn tai() -> Option<u64> {
        let tai = ns(clock_gettime_dynamic(DynamicClockId::Tai).ok()?);
        (tai > utc() + 5 * SECOND).then_some(tai)
    }

    /// The host's reading of the clock with this id, for a device that was never migrated.
    ///
    /// # Panics
    ///
    /// For TAI, if the kernel does not know it.
    pub fn clock(id: u16) -> u64 {
        match id {
            UTC => utc(),
            MONOTONIC => boottime(),
            _ => tai().expect("the kernel knows TAI"),
        }
    }

    /// Waits until a clock has reached a time.
    pub fn wait_until(id: u16, time: u64) {
        while let Some(left) = time.checked_sub(clock(id)).filter(|left| *left > 0) {
            std::thread::sleep(Duration::from_nanos(left));
        }
    }

    /// Calls `act` with a span of time, ns, in which it has to be done with something, and again
    /// with twice the span until it says that it was: where its thread was off the CPU for that
    /// long, it has shown nothing. What it checks must hold either way.
    ///
    /// # Panics
    ///
    /// If it is never done in time.
    #[track_caller]
    pub fn with_longer_spans(mut act: impl FnMut(u64) -> bool) {
        let spans = std::iter::successors(Some(60 * MS), |span| Some(2 * span));
        let mut spans = spans.take_while(|span| *span < 120 * SECOND);
        assert!(spans.any(&mut act), "it is never in time");
    }

    /// The ids of a device's clocks on this host.
    pub fn ids() -> Vec<u16> {
        let tai = tai().map(|_| TAI);
        [UTC, MONOTONIC].into_iter().chain(tai).collect()
    }
}

/// A request of `len` bytes: its type, and fields at their offsets.
pub fn request(msg_type: u16, len: usize, fields: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[..2].copy_from_slice(&msg_type.to_le_bytes());
    for (at, field) in fields {
        bytes[*at..at + field.len()].copy_from_slice(field);
    }
    bytes
}

/// A well-formed request of any type, for this clock and the counter ARM_VCT. One that sets an
/// alarm disables it.
///
/// # Panics
///
/// If there is no such type.
pub fn proper(msg_type: u16, clock: u16) -> Vec<u8> {
    let known = msg::ALL.iter().find(|(known, ..)| *known == msg_type);
    let (_, len, ..) = *known.expect("a request's type");
    let clock = clock.to_le_bytes();
    match msg_type {
        msg::CFG => request(msg_type, len, &[]),
        msg::SET_ALARM => request(msg_type, len, &[(16, &clock)]),
        _ => request(msg_type, len, &[(8, &clock)]),
    }
}

/// Parses a response; its status if that is not OK.
///
/// # Panics
///
/// If it has another length, or if a reserved byte of its head is not zero.
#[track_caller]
fn response(used: &Used, len: usize) -> Result<&[u8], u8> {
    let bytes = used.bytes();
    assert_eq!(bytes.len(), len, "the used length is the response's");
    assert_eq!(bytes[1..8], [0; 7], "the head's reserved bytes");
    match bytes[0] {
        rtc_status::OK => Ok(bytes),
        status => {
            let rest = &bytes[1..];
            assert!(
                rest.iter().all(|byte| *byte == 0),
                "a refusal says no more: {bytes:?}"
            );
            Err(status)
        }
    }
}

#[track_caller]
fn zero(bytes: &[u8]) {
    assert!(bytes.iter().all(|byte| *byte == 0), "reserved: {bytes:?}");
}

/// What CLOCK_CAP answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockCap {
    /// A [`clock_type`].
    pub clock_type: u8,
    /// How leap seconds are smeared.
    pub smearing: u8,
    /// Bit 0: it has an alarm.
    pub flags: u8,
}

/// A clock and a counter at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cross {
    /// What the clock read, ns.
    pub clock: u64,
    /// What the counter read.
    pub cycles: u64,
}

/// A guest that drives the clock device.
pub struct ClockDriver {
    /// The driver underneath.
    pub driver: Driver,
    /// How requests are laid out.
    pub layout: Layout,
}

#[allow(
    clippy::missing_panics_doc,
    clippy::missing_errors_doc,
    reason = "each panics where the backend breaks a rule, which is how a test fails; what is refused \
              is an error: its status"
)]
impl ClockDriver {
    /// On a new connection, with alarms.
    pub fn connect(rig: &Rig) -> Self {
        Self::connect_with(rig, Self::setup())
    }

    /// What [`connect`](Self::connect) sets up.
    pub fn setup() -> Setup {
        Setup {
            features: F_ALARM,
            ..Setup::default()
        }
    }

    /// On a new connection with this set-up.
    pub fn connect_with(rig: &Rig, setup: Setup) -> Self {
        Self::over(rig.clock_stream(), setup)
    }

    /// Over a connected socket.
    pub fn over(stream: UnixStream, setup: Setup) -> Self {
        Self::new(Driver::over(stream, setup))
    }

    /// Over a driver whose rings are started.
    pub fn new(driver: Driver) -> Self {
        ClockDriver {
            driver,
            layout: Layout::plain(),
        }
    }

    /// The same guest on another connection or with another backend, unnoticed by the guest.
    /// `prepare` is called before its rings start.
    #[must_use]
    pub fn moved_to(self, stream: UnixStream, prepare: impl FnOnce(&mut Frontend)) -> Self {
        ClockDriver {
            driver: self.driver.moved_to(stream, prepare),
            ..self
        }
    }

    /// Sends these bytes as a request.
    pub fn raw(&mut self, request: &[u8], room: usize) -> Used {
        self.driver.call(REQUESTQ, request, room, &self.layout)
    }

    /// Sends a request whose response has this length. Returns the response, or the status if that
    /// is not OK.
    #[track_caller]
    fn ask(&mut self, request: &[u8], len: usize) -> Result<Vec<u8>, u8> {
        let used = self.raw(request, len);
        response(&used, len).map(<[u8]>::to_vec)
    }

    /// The status of a request whose response has this length.
    #[track_caller]
    pub fn status(&mut self, request: &[u8], len: usize) -> u8 {
        self.ask(request, len).err().unwrap_or(rtc_status::OK)
    }

    /// CFG: how many clocks there are.
    #[track_caller]
    pub fn clocks(&mut self) -> u16 {
        let bytes = self.ask(&proper(msg::CFG, 0), 16).expect("CFG");
        zero(&bytes[10..]);
        u16_at(&bytes, 8)
    }

    /// CLOCK_CAP.
    #[track_caller]
    pub fn clock_cap(&mut self, clock: u16) -> Result<ClockCap, u8> {
        let bytes = self.ask(&proper(msg::CLOCK_CAP, clock), 16)?;
        zero(&bytes[11..]);
        Ok(ClockCap {
            clock_type: bytes[8],
            smearing: bytes[9],
            flags: bytes[10],
        })
    }

    /// CROSS_CAP: whether READ_CROSS works.
    #[track_caller]
    pub fn cross_cap(&mut self, clock: u16, counter: u8) -> Result<bool, u8> {
        let fields: [(_, &[u8]); 2] = [(8, &clock.to_le_bytes()), (10, &[counter])];
        let bytes = self.ask(&request(msg::CROSS_CAP, 16, &fields), 16)?;
        zero(&bytes[9..]);
        assert!(bytes[8] <= 1, "flags {:#x}", bytes[8]);
        Ok(bytes[8] == 1)
    }

    /// READ.
    #[track_caller]
    pub fn try_read(&mut self, clock: u16) -> Result<u64, u8> {
        let bytes = self.ask(&proper(msg::READ, clock), 16)?;
        Ok(u64_at(&bytes, 8))
    }

    /// READ of a clock that exists.
    #[track_caller]
    pub fn read(&mut self, clock: u16) -> u64 {
        self.try_read(clock).expect("READ")
    }

    /// READ of a clock of a device that was never migrated: it lies between two of the host's
    /// readings.
    #[track_caller]
    pub fn reads_the_hosts(&mut self, clock: u16) {
        let before = host::clock(clock);
        let reading = self.read(clock);
        let after = host::clock(clock);
        assert!(
            (before..=after).contains(&reading),
            "clock {clock}: {reading} is not from {before} to {after}"
        );
    }

    /// READ_CROSS.
    #[track_caller]
    pub fn read_cross(&mut self, clock: u16, counter: u8) -> Result<Cross, u8> {
        let fields: [(_, &[u8]); 2] = [(8, &clock.to_le_bytes()), (10, &[counter])];
        let bytes = self.ask(&request(msg::READ_CROSS, 16, &fields), 24)?;
        Ok(Cross {
            clock: u64_at(&bytes, 8),
            cycles: u64_at(&bytes, 16),
        })
    }

    /// READ_ALARM: the alarm's time, and whether it is enabled.
    #[track_caller]
    pub fn read_alarm(&mut self, clock: u16) -> Result<(u64, bool), u8> {
        let bytes = self.ask(&proper(msg::READ_ALARM, clock), 24)?;
        zero(&bytes[17..]);
        assert!(bytes[16] <= 1, "flags {:#x}", bytes[16]);
        Ok((u64_at(&bytes, 8), bytes[16] == 1))
    }

    /// SET_ALARM.
    #[track_caller]
    pub fn set_alarm(&mut self, clock: u16, time: u64, enabled: bool) {
        self.ask(&set_alarm(clock, time, enabled), 8)
            .expect("SET_ALARM");
    }

    /// SET_ALARM_ENABLED.
    #[track_caller]
    pub fn set_alarm_enabled(&mut self, clock: u16, enabled: bool) {
        let fields: [(_, &[u8]); 2] = [(8, &clock.to_le_bytes()), (10, &[enabled.into()])];
        self.ask(&request(msg::SET_ALARM_ENABLED, 16, &fields), 8)
            .expect("SET_ALARM_ENABLED");
    }

    /// Posts a buffer for a notification. Returns its head.
    pub fn post_alarm_buffer(&mut self) -> u16 {
        self.driver.submit(ALARMQ, &[], 16, &Layout::plain())
    }

    /// The next notification: the clock whose alarm expired.
    #[track_caller]
    pub fn notified(&mut self) -> u16 {
        notification(&self.driver.used(ALARMQ))
    }

    /// Returns once every alarm that was due at the time of the call is reported, as far as there
    /// are buffers: the backend reports it after the answer to a request that reads the clocks.
    #[track_caller]
    pub fn settle(&mut self) {
        self.read(UTC);
        self.read(UTC);
    }

    /// Checks that no alarm was reported besides those taken with [`notified`](Self::notified).
    #[track_caller]
    pub fn no_notification(&mut self) {
        self.settle();
        if let Some(used) = self.driver.used_already(ALARMQ) {
            panic!(
                "clock {}'s alarm was told and should not be",
                notification(&used)
            );
        }
    }
}

/// The bytes of a SET_ALARM.
pub fn set_alarm(clock: u16, time: u64, enabled: bool) -> Vec<u8> {
    let fields: [(_, &[u8]); 3] = [
        (8, &time.to_le_bytes()),
        (16, &clock.to_le_bytes()),
        (18, &[enabled.into()]),
    ];
    request(msg::SET_ALARM, 24, &fields)
}

#[track_caller]
fn notification(used: &Used) -> u16 {
    let bytes = used.bytes();
    assert_eq!(bytes.len(), 16, "a notification's length");
    assert_eq!(u16_at(bytes, 0), msg::ALARM);
    zero(&bytes[2..8]);
    zero(&bytes[10..]);
    u16_at(bytes, 8)
}
