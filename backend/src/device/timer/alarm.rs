//! One timerfd for the earliest thing that time will bring.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use vhost_user_timer_counter::{HostCounter, clock_ticks};
use vhost_user_timer_model::vm::{Now, Vm, ns_of_ticks};
use vhost_user_timer_protocol::counter::NS_PER_SEC;

/// Goes off, by becoming readable, when the host counter reaches a value.
#[derive(Debug)]
pub(crate) struct Alarm {
    fd: OwnedFd,
    clock: ClockId,
    /// The host count for which it is set.
    set_for: Option<u64>,
    /// The same, ns of CLOCK_MONOTONIC.
    goes_off: u64,
}

impl Alarm {
    /// An alarm on the clock that runs as the counter does.
    ///
    /// # Errors
    ///
    /// What the kernel says where it makes no timerfd.
    pub(crate) fn new(counter: HostCounter) -> io::Result<Self> {
        let clock = counter.source().kernel_clock();
        let timerfd_clock = match clock {
            ClockId::Boottime => TimerfdClockId::Boottime,
            _ => TimerfdClockId::Monotonic,
        };
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Alarm {
            fd: timerfd_create(timerfd_clock, flags)?,
            clock,
            set_for: None,
            goes_off: u64::MAX,
        })
    }

    /// Whether it is set for the next instant after `now` at which time changes something in the VM. Any
    /// instant before the present one will do for `now`, as long as nothing was due since.
    pub(crate) fn follows(&self, vm: &Vm, now: Now) -> bool {
        self.set_for == due(vm, now).map(|(_, host)| host)
    }

    /// Sets it for the next instant after `now`, the present one, at which time changes something
    /// in the VM; no system call where it is set for that already.
    ///
    /// # Errors
    ///
    /// What the kernel says where it refuses.
    pub(crate) fn follow(&mut self, vm: &Vm, now: Now) -> io::Result<()> {
        let due = due(vm, now);
        let set_for = due.map(|(_, host)| host);
        if set_for == self.set_for {
            return Ok(());
        }
        let ns = due.map(|(ticks, _)| ns_of_ticks(ticks, vm.frequency()));
        let at = |clock, ns| clock_ticks(clock, NS_PER_SEC).saturating_add(ns);
        // 0 would disarm it.
        let value = ns.map_or(0, |ns| at(self.clock, ns).max(1));
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
        self.goes_off = ns.map_or(u64::MAX, |ns| at(ClockId::Monotonic, ns));
        Ok(())
    }

    /// When it goes off, ns of CLOCK_MONOTONIC; `u64::MAX` where it does not.
    pub(crate) fn goes_off(&self) -> u64 {
        self.goes_off
    }

    /// Takes in that it went off. It is to be set again then, even for the same count: the
    /// counter may lag behind the kernel's clock.
    pub(crate) fn went_off(&mut self) {
        // Not readable any more: somebody else took it in, or it was set anew meanwhile.
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
        self.set_for = None;
        self.goes_off = u64::MAX;
    }
}

/// When time changes something in the VM next: in so many ticks, at that host count.
fn due(vm: &Vm, now: Now) -> Option<(u64, u64)> {
    let ticks = vm.ticks_to_next(now)?;
    Some((ticks, now.host.wrapping_add(ticks)))
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
