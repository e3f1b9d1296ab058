//! One timerfd for the earliest thing that time will bring.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::{Counter, NS_PER_SEC, Reader, clock_ticks};
use crate::vm::{Now, Vm, ns_of_ticks};

/// Goes off, by becoming readable, when the host counter reaches a value.
#[derive(Debug)]
pub struct Alarm {
    fd: OwnedFd,
    clock: ClockId,
    /// The host count for which it is set.
    set_for: Option<u64>,
    /// The same on its clock, ns.
    goes_off: Option<u64>,
}

impl Alarm {
    /// An alarm on the clock that runs as the counter does.
    ///
    /// # Errors
    ///
    /// What the kernel says where it makes no timerfd.
    pub fn new(counter: Counter) -> io::Result<Self> {
        let (clock, timerfd_clock) = match counter.0 {
            Reader::Boottime => (ClockId::Boottime, TimerfdClockId::Boottime),
            _ => (ClockId::Monotonic, TimerfdClockId::Monotonic),
        };
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Alarm {
            fd: timerfd_create(timerfd_clock, flags)?,
            clock,
            set_for: None,
            goes_off: None,
        })
    }

    /// Sets it for the next instant after `now`, the present one, at which time changes something
    /// in the VM; no system call where it is set for that already.
    ///
    /// # Errors
    ///
    /// What the kernel says where it refuses.
    pub fn follow(&mut self, vm: &Vm, now: Now) -> io::Result<()> {
        let due = vm
            .ticks_to_next(now)
            .map(|ticks| (ticks, now.host.wrapping_add(ticks)));
        let set_for = due.map(|(_, host)| host);
        if set_for == self.set_for {
            return Ok(());
        }
        let value = due.map_or(0, |(ticks, _)| {
            let ns = ns_of_ticks(ticks, vm.frequency());
            // 0 would disarm it.
            clock_ticks(self.clock, NS_PER_SEC)
                .saturating_add(ns)
                .max(1)
        });
        let timer = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                // At most 2^64 ns, so it always fits.
                tv_sec: (value / NS_PER_SEC).try_into().unwrap_or(i64::MAX),
                tv_nsec: (value % NS_PER_SEC).try_into().unwrap_or(0),
            },
        };
        timerfd_settime(&self.fd, TimerfdTimerFlags::ABSTIME, &timer)?;
        self.set_for = set_for;
        self.goes_off = set_for.map(|_| value);
        Ok(())
    }

    /// How long it is until it goes off, ns.
    pub fn ns_left(&self) -> u64 {
        self.goes_off.map_or(u64::MAX, |at| {
            at.saturating_sub(clock_ticks(self.clock, NS_PER_SEC))
        })
    }

    /// Takes in that it went off. It is to be set again then, even for the same count: the
    /// counter may lag behind the kernel's clock.
    pub fn went_off(&mut self) {
        // Not readable any more: somebody else took it in, or it was set anew meanwhile.
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        self.set_for = None;
        self.goes_off = None;
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
