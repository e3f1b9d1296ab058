//! The host's clocks for the guest's clock device, and an alarm on the wall clock.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use rustix::io::Errno;
use rustix::time::{
    ClockId, DynamicClockId, TimerfdClockId, TimerfdTimerFlags, clock_gettime_dynamic,
};
use vhost_user_timer_counter::{clock_ticks, ticks_of};
use vhost_user_timer_model::rtc::{Counter, HostClock, Sample};
use vhost_user_timer_protocol::counter::NS_PER_SEC;

use crate::sys::TimerFd;

/// How often a reading that is paired with a counter is taken: the tightest pair is used.
const TRIES: usize = 3;

/// Whether the kernel knows how far TAI is from UTC (adjtimex(2), `tai`): CLOCK_TAI reads
/// CLOCK_REALTIME where it does not.
pub(crate) fn tai_is_known() -> bool {
    // TAI has been 10 s ahead or more since 1972: a test for 1 s works however long this takes.
    tai().is_some_and(|tai| {
        tai.saturating_sub(clock_ticks(ClockId::Realtime, NS_PER_SEC)) > NS_PER_SEC
    })
}

fn tai() -> Option<u64> {
    let time = clock_gettime_dynamic(DynamicClockId::Tai).ok()?;
    Some(ticks_of(time, NS_PER_SEC))
}

/// What a clock of the host reads now, ns. CLOCK_TAI is read only where it is known.
pub(crate) fn read(clock: HostClock, with_tai: bool) -> Option<u64> {
    match clock {
        HostClock::Realtime => Some(clock_ticks(ClockId::Realtime, NS_PER_SEC)),
        HostClock::Tai => with_tai.then(tai).flatten(),
        HostClock::Boottime => Some(clock_ticks(ClockId::Boottime, NS_PER_SEC)),
    }
}

/// What the clocks read now. CLOCK_TAI is read only where it is known.
pub(crate) fn sample(with_tai: bool) -> Sample {
    Sample {
        utc_ns: clock_ticks(ClockId::Realtime, NS_PER_SEC),
        tai_ns: with_tai.then(tai).flatten(),
        monotonic_ns: clock_ticks(ClockId::Boottime, NS_PER_SEC),
        counter: Counter::Withheld,
    }
}

/// What the clocks read now, and a counter at the same instant: the middle of two counts, one
/// before the clocks were read and one after. The third value is by how many ticks the count may be
/// off at most.
pub(crate) fn sample_with(with_tai: bool, mut count: impl FnMut() -> u64) -> (Sample, u64, u64) {
    let mut best: Option<(Sample, u64, u64)> = None;
    for _ in 0..TRIES {
        let before = count();
        let sample = sample(with_tai);
        let window = count().wrapping_sub(before);
        let half = window / 2;
        if best.is_none_or(|(.., error)| window - half < error) {
            best = Some((sample, before.wrapping_add(half), window - half));
        }
    }
    best.unwrap_or_else(|| (sample(with_tai), count(), u64::MAX))
}

/// Becomes readable when the wall clock reaches a value, and whenever the wall clock is set.
#[derive(Debug)]
pub(crate) struct WallAlarm {
    timer: TimerFd,
    /// CLOCK_REALTIME, ns.
    set_for: Option<u64>,
}

impl WallAlarm {
    /// An alarm that is not set.
    ///
    /// # Errors
    ///
    /// Those of timerfd_create(2).
    pub(crate) fn new() -> io::Result<Self> {
        Ok(WallAlarm {
            timer: TimerFd::new(TimerfdClockId::Realtime)?,
            set_for: None,
        })
    }

    /// Sets the alarm; no system call where it is set for that already. True where the wall clock
    /// was set since it was last read: the alarm will not go off for that again.
    ///
    /// # Errors
    ///
    /// Those of timerfd_settime(2).
    pub(crate) fn set(&mut self, utc_ns: Option<u64>) -> io::Result<bool> {
        if utc_ns == self.set_for {
            return Ok(false);
        }
        let clock_was_set = match self.timer.set_at(utc_ns, TimerfdTimerFlags::CANCEL_ON_SET) {
            Ok(()) => false,
            Err(Errno::CANCELED) => true,
            Err(error) => return Err(error.into()),
        };
        self.set_for = utc_ns;
        Ok(clock_was_set)
    }

    /// The alarm went off, or the clock was set: the caller reads the clock in either case. The
    /// alarm is to be set again then.
    pub(crate) fn went_off(&mut self) {
        self.timer.drain();
        self.set_for = None;
    }
}

impl AsRawFd for WallAlarm {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::time::Timespec;

    use super::*;

    #[test]
    fn the_clocks_are_the_hosts() {
        let before = sample(false);
        let now = sample(tai_is_known());
        let after = sample(false);
        assert!((before.utc_ns..=after.utc_ns).contains(&now.utc_ns));
        assert!((before.monotonic_ns..=after.monotonic_ns).contains(&now.monotonic_ns));
        assert_eq!(now.tai_ns.is_some(), tai_is_known());
        assert!(now.tai_ns.is_none_or(|tai| tai > now.utc_ns));
    }

    #[test]
    fn the_count_of_a_pair_is_half_way_and_the_tightest_pair_counts() {
        let mut counts = [100, 120, 200, 206, 300, 330].into_iter();
        let (_, count, error) = sample_with(false, || counts.next().unwrap());
        assert_eq!((count, error), (203, 3));
        let mut counts = [u64::MAX, 2, 10, 90, 100, 190].into_iter();
        let (_, count, error) = sample_with(false, || counts.next().unwrap());
        assert_eq!((count, error), (0, 2));
    }

    #[test]
    fn an_alarm_in_the_past_goes_off_at_once_and_one_to_come_does_not() {
        let readable_within = |alarm: &WallAlarm, tv_sec| {
            let mut fds = [rustix::event::PollFd::new(
                &alarm.timer,
                rustix::event::PollFlags::IN,
            )];
            let limit = Timespec { tv_sec, tv_nsec: 0 };
            rustix::event::poll(&mut fds, Some(&limit)).unwrap() == 1
        };
        let readable = |alarm: &WallAlarm| readable_within(alarm, 0);
        // The interrupt of a timer that has expired may come after the call that set it.
        let goes_off = |alarm: &WallAlarm| readable_within(alarm, 30);
        let mut alarm = WallAlarm::new().unwrap();
        let now = sample(false).utc_ns;
        for past in [0, 1, now] {
            alarm.set(Some(past)).unwrap();
            assert!(goes_off(&alarm), "{past}");
            alarm.went_off();
            assert!(!readable(&alarm));
        }
        alarm.set(Some(now + 3_600 * NS_PER_SEC)).unwrap();
        assert!(!readable(&alarm));
        alarm.set(Some(i64::MAX as u64)).unwrap();
        assert!(!readable(&alarm));
        alarm.set(Some(1)).unwrap();
        assert!(goes_off(&alarm));
        alarm.set(None).unwrap();
        assert!(!readable(&alarm));
    }
}
