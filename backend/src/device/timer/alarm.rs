//! The alarm for the VM's next event: one timerfd.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use rustix::time::{ClockId, TimerfdClockId, TimerfdTimerFlags};
use vhost_user_timer_counter::{HostCounter, clock_ticks};
use vhost_user_timer_model::vm::{Now, Vm, ns_of_ticks};
use vhost_user_timer_protocol::counter::NS_PER_SEC;

use crate::sys::TimerFd;

/// Becomes readable when the host counter reaches a value.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: TimerFd,
    clock: ClockId,
    /// The host count for which it is set.
    set_for: Option<u64>,
    /// The same instant, ns of CLOCK_MONOTONIC; `u64::MAX` where it is not set.
    goes_off: u64,
}

impl Alarm {
    /// An alarm on the kernel clock that runs as the counter does.
    ///
    /// # Errors
    ///
    /// Those of timerfd_create(2).
    pub(super) fn new(counter: HostCounter) -> io::Result<Self> {
        let clock = counter.source().kernel_clock();
        let timerfd_clock = match clock {
            ClockId::Boottime => TimerfdClockId::Boottime,
            _ => TimerfdClockId::Monotonic,
        };
        Ok(Alarm {
            timer: TimerFd::new(timerfd_clock)?,
            clock,
            set_for: None,
            goes_off: u64::MAX,
        })
    }

    /// Whether the alarm is already set for the VM's next event. `now` may be an earlier reading,
    /// provided nothing has fallen due since.
    pub(super) fn follows(&self, vm: &Vm, now: Now) -> bool {
        self.set_for == next_event(vm, now).map(|(_, host)| host)
    }

    /// Sets the alarm for the VM's next event after `now`, the present instant. No system call
    /// where it is set for that already.
    ///
    /// # Errors
    ///
    /// Those of timerfd_settime(2).
    pub(super) fn follow(&mut self, vm: &Vm, now: Now) -> io::Result<()> {
        let next = next_event(vm, now);
        let set_for = next.map(|(_, host)| host);
        if set_for == self.set_for {
            return Ok(());
        }
        let ns = next.map(|(ticks, _)| ns_of_ticks(ticks, vm.frequency()));
        let after = |clock, ns| clock_ticks(clock, NS_PER_SEC).saturating_add(ns);
        let expiry = ns.map(|ns| after(self.clock, ns));
        self.timer.set_at(expiry, TimerfdTimerFlags::empty())?;
        self.set_for = set_for;
        self.goes_off = ns.map_or(u64::MAX, |ns| after(ClockId::Monotonic, ns));
        Ok(())
    }

    /// When the alarm goes off, ns of CLOCK_MONOTONIC; `u64::MAX` where it does not.
    pub(super) fn goes_off(&self) -> u64 {
        self.goes_off
    }

    /// The alarm went off. It is to be set again then, even for the same count: the counter may lag
    /// behind the kernel's clock.
    pub(super) fn went_off(&mut self) {
        self.timer.drain();
        self.set_for = None;
        self.goes_off = u64::MAX;
    }
}

/// The next instant at which time changes something in the VM: in how many ticks, and at which host
/// count.
fn next_event(vm: &Vm, now: Now) -> Option<(u64, u64)> {
    let ticks = vm.ticks_to_next(now)?;
    Some((ticks, now.host.wrapping_add(ticks)))
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
