//! What several modules ask of the operating system.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vhost_user_timer_protocol::counter::NS_PER_SEC;

/// Locks, whatever became of the thread that held the lock before: released builds abort on a
/// panic, so no state is ever left half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes reads and writes of this descriptor return at once.
///
/// # Errors
///
/// Those of fcntl(2).
pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    Ok(fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

/// What an error says, and its causes, each after a colon.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// A timerfd: readable once its clock has reached a value.
#[derive(Debug)]
pub(crate) struct TimerFd(OwnedFd);

impl TimerFd {
    /// A disarmed timer.
    ///
    /// # Errors
    ///
    /// Those of timerfd_create(2).
    pub(crate) fn new(clock: TimerfdClockId) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(TimerFd(timerfd_create(clock, flags)?))
    }

    /// Sets the timer for a reading of its clock, ns, or disarms it. A reading that is past makes
    /// it readable at once.
    ///
    /// # Errors
    ///
    /// Those of timerfd_settime(2). After `ECANCELED` the timer is set all the same
    /// (timerfd_create(2)).
    pub(crate) fn set_at(&self, ns: Option<u64>, flags: TimerfdTimerFlags) -> Result<(), Errno> {
        // 0 would disarm it.
        let value = ns.map_or(0, |ns| ns.max(1));
        let timer = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                // At most 2^64 ns, so both fit.
                tv_sec: (value / NS_PER_SEC).try_into().unwrap_or(i64::MAX),
                tv_nsec: (value % NS_PER_SEC).try_into().unwrap_or(0),
            },
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME | flags, &timer)?;
        Ok(())
    }

    /// Makes the timer unreadable until it expires again.
    pub(crate) fn drain(&self) {
        // Fails where another thread has read it or it was set again since, which does as well,
        // and with ECANCELED where the clock was set.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for TimerFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for TimerFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
