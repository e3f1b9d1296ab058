//! A real-time clock and its alarm.

#![expect(unsafe_code, reason = "every ioctl is unsafe")]

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

use crate::Result;

const DAY: i64 = 24 * 60 * 60;

/// `struct rtc_time`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Time {
    second: i32,
    minute: i32,
    hour: i32,
    day: i32,
    /// From 0.
    month: i32,
    /// From 1900.
    year: i32,
    week_day: i32,
    year_day: i32,
    is_dst: i32,
}

/// `struct rtc_wkalrm`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct WakeAlarm {
    enabled: u8,
    pending: u8,
    time: Time,
}

const RTC_RD_TIME: Opcode = opcode::read::<Time>(b'p', 0x09);
const RTC_WKALM_SET: Opcode = opcode::write::<WakeAlarm>(b'p', 0x0f);
const RTC_WKALM_RD: Opcode = opcode::read::<WakeAlarm>(b'p', 0x10);

/// The alarm that is set.
pub(crate) struct Alarm {
    /// When, in s since 1970.
    pub(crate) at: i64,
    pub(crate) enabled: u8,
    pub(crate) pending: u8,
}

/// An open RTC.
pub(crate) struct Rtc(File);

impl Rtc {
    /// The clock `rtc0` or so on.
    pub(crate) fn open(name: &str) -> Result<Self> {
        let path = format!("/dev/{name}");
        Ok(Self(
            File::open(&path).map_err(|error| format!("{path}: {error}"))?,
        ))
    }

    /// Its time, in s since 1970.
    pub(crate) fn now(&self) -> Result<i64> {
        // SAFETY: the opcode and the type are those of RTC_RD_TIME.
        let request = unsafe { Getter::<RTC_RD_TIME, Time>::new() };
        // SAFETY: the kernel fills the request's own value.
        let time = unsafe { ioctl(&self.0, request) };
        Ok(seconds(
            time.map_err(|error| format!("RTC_RD_TIME: {error}"))?,
        ))
    }

    /// Sets the alarm so many seconds after its time now, and gives when that is.
    pub(crate) fn set_alarm(&self, ahead: u32) -> Result<i64> {
        let at = self.now()? + i64::from(ahead);
        self.write_alarm(1, at)?;
        Ok(at)
    }

    /// Disables the alarm, and leaves its time.
    pub(crate) fn cancel_alarm(&self) -> Result<()> {
        self.write_alarm(0, self.alarm()?.at)
    }

    fn write_alarm(&self, enabled: u8, at: i64) -> Result<()> {
        let alarm = WakeAlarm {
            enabled,
            pending: 0,
            time: civil(at),
        };
        // SAFETY: the opcode and the type are those of RTC_WKALM_SET.
        let request = unsafe { Setter::<RTC_WKALM_SET, _>::new(alarm) };
        // SAFETY: the kernel reads the request's own value.
        unsafe { ioctl(&self.0, request) }.map_err(|error| format!("RTC_WKALM_SET: {error}").into())
    }

    /// The alarm that is set.
    pub(crate) fn alarm(&self) -> Result<Alarm> {
        // SAFETY: the opcode and the type are those of RTC_WKALM_RD.
        let request = unsafe { Getter::<RTC_WKALM_RD, WakeAlarm>::new() };
        // SAFETY: the kernel fills the request's own value.
        let alarm =
            unsafe { ioctl(&self.0, request) }.map_err(|error| format!("RTC_WKALM_RD: {error}"))?;
        Ok(Alarm {
            at: seconds(alarm.time),
            enabled: alarm.enabled,
            pending: alarm.pending,
        })
    }

    /// Waits for an interrupt, and gives how long that took and what read() gave: the kinds in
    /// the low byte (0x20 is an alarm), and the number above.
    pub(crate) fn wait(&self, limit: Duration) -> Result<(Duration, u64)> {
        let began = Instant::now();
        let limit_spec = Timespec {
            tv_sec: limit.as_secs().try_into()?,
            tv_nsec: 0,
        };
        let mut descriptors = [PollFd::new(&self.0, PollFlags::IN)];
        if poll(&mut descriptors, Some(&limit_spec))? == 0 {
            return Err(format!("no interrupt within {limit:?}").into());
        }
        let mut data = [0; 8];
        (&self.0).read_exact(&mut data)?;
        Ok((began.elapsed(), u64::from_ne_bytes(data)))
    }
}

/// Seconds since 1970, in the proleptic Gregorian calendar. Years are counted from March, so
/// that the leap day is the last one.
fn seconds(time: Time) -> i64 {
    let march = i64::from(time.month) - 2;
    let year = i64::from(time.year) + 1900 + march.div_euclid(12);
    let days_before_month = (153 * march.rem_euclid(12) + 2) / 5;
    let days = 365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + days_before_month
        + i64::from(time.day)
        - 1
        - 719_468; // from 1 March of year 0 to 1970
    days * DAY + i64::from(time.hour) * 3600 + i64::from(time.minute) * 60 + i64::from(time.second)
}

/// The other way round, for times from 1970 on.
fn civil(at: i64) -> Time {
    let (days, second) = (at.div_euclid(DAY), at.rem_euclid(DAY) as i32);
    let is_leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let (mut year, mut day) = (1970, days);
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if day < length {
            break;
        }
        day -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 0;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    Time {
        second: second % 60,
        minute: second / 60 % 60,
        hour: second / 3600,
        day: day as i32 + 1,
        month,
        year: (year - 1900) as i32,
        ..Time::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_the_same_there_and_back() {
        for day in 0..100_000 {
            let at = day * DAY + 86_399;
            assert_eq!(seconds(civil(at)), at);
        }
    }

    #[test]
    fn a_known_time_is_told_as_it_is() {
        let time = civil(1_709_251_199); // 2024-02-29T23:59:59Z
        assert_eq!((time.year, time.month, time.day), (124, 1, 29));
        assert_eq!((time.hour, time.minute, time.second), (23, 59, 59));
    }
}
