//! The timer device: the VMM's way to the VM's time.
//!
//! [`TimerDevice`] lives as long as the process and has the VM. A `TimerSession` lives as long as one
//! connection.

mod alarm;
mod page;
mod rings;
mod session;

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use session::TimerSession;

use rustix::time::ClockId;
use vhost_user_timer_counter::{HostCounter, clock_ticks};
use vhost_user_timer_protocol::counter::NS_PER_SEC;
use vhost_user_timer_protocol::{Ranges, Status};

use alarm::Alarm;
use page::Page;

use super::DeviceError;
use super::clock::wall;
use crate::state::file::StateFile;
use crate::vhost_user::vring::Memory;
use vhost_user_timer_model::rtc::{BadRecord, Counter as ClockCounter, RtcRecord, Sample};
use vhost_user_timer_model::vm::{
    Anchor, Effects, GuestCounter, Notice, Now, PageOrder, Profile, Vm, ns_of_ticks,
};

/// For how long a restore without a time-out holds the clock device's frontend back.
const LONGEST_HOLD: Duration = Duration::from_secs(60);

/// The VM, its clock and its alarm: what outlives every connection.
#[derive(Debug)]
pub struct TimerDevice {
    profile: Profile,
    /// The alarm's descriptor, for epoll.
    alarm_fd: RawFd,
    core: Mutex<TimerState>,
    /// Told whenever the VM's phase has changed, or a restore has timed out.
    phase_changed: Condvar,
}

#[derive(Debug)]
struct TimerState {
    vm: Vm,
    effects: Effects,
    alarm: Alarm,
    counter: HostCounter,
    /// The last instant, and what the host counter was then.
    last: Option<(CountedBy, u64)>,
    state: Option<StateFile>,
    /// The time page of the present connection.
    page: Page,
}

/// What a host counter is told by: another one may read less.
type CountedBy = (Option<Anchor>, u64);

/// The VM's instant: its host counter, by the anchor where the VMM gave one, and the wall clock
/// where the VM wants it.
fn instant(counter: HostCounter, vm: &Vm) -> Now {
    let frequency = vm.frequency();
    let host = match vm.anchor() {
        Some(anchor) => anchor.host(clock_ticks(ClockId::Monotonic, NS_PER_SEC), frequency),
        None => counter.read(frequency),
    };
    let realtime_ns = if vm.wants_realtime() {
        clock_ticks(ClockId::Realtime, NS_PER_SEC)
    } else {
        0
    };
    Now { host, realtime_ns }
}

impl TimerState {
    /// The present instant. The model takes a step back of the host counter for a wrap, so one
    /// that two CPUs do not agree on stands still instead.
    fn now(&mut self) -> Now {
        let mut now = instant(self.counter, &self.vm);
        let counter = self.counted_by();
        if let Some((same, last)) = self.last
            && same == counter
            && now.host.wrapping_sub(last).cast_signed() < 0
        {
            now.host = last;
        }
        self.last = Some((counter, now.host));
        now
    }

    fn counted_by(&self) -> CountedBy {
        (self.vm.anchor(), self.vm.frequency())
    }

    /// Takes what changed into the state file, and then into the time page, which can be seen at
    /// once. Answers may be seen after that, not before.
    fn persist(&mut self, memory: &Memory<()>) {
        if !self.effects.changed.any() && !self.page.is_open() {
            return;
        }
        match &mut self.state {
            Some(state) => state.commit(&self.vm, &mut self.effects.changed),
            None => self.effects.changed.clear(),
        }
        self.page.follow(&self.vm, memory);
    }

    /// Does what SET_TIME_PAGE asks for, or has it refused.
    fn turn_page(&mut self, order: PageOrder, memory: &Memory<()>) {
        match order {
            PageOrder::Stop => self.page.stop(),
            PageOrder::WriteAt { address, length } => {
                if !self.page.start(address, length, &self.vm, memory) {
                    self.vm.refuse(Status::Invalid, &mut self.effects);
                }
            }
        }
    }

    /// Sets the alarm for what time brings next.
    fn follow_time(&mut self) {
        // Mostly it is set already, and to find that out the last instant will do.
        if let Some((counter, host)) = self.last
            && counter == self.counted_by()
            && self.alarm.follows(&self.vm, Now::at(host))
        {
            return;
        }
        let now = self.now();
        if let Err(error) = self.alarm.follow(&self.vm, now) {
            log::error!("Setting the timerfd for the next deadline failed: {error}");
        }
    }

    /// Logs what there is to say. True where there was anything.
    fn log_notices(&mut self) -> bool {
        let any = !self.effects.notices.is_empty();
        for notice in self.effects.notices.drain(..) {
            match notice {
                Notice::Phase { from, to, epoch } => {
                    log::info!("VM {from} -> {to}, epoch {epoch}");
                }
                Notice::RestoreTimedOut { missing, vcpus } => log::warn!(
                    "Restore timed out: {} of {vcpus} vCPUs missing: {}; it stays open",
                    missing.len(),
                    Ranges(&missing)
                ),
                Notice::RealtimeWentBack { ns } => log::warn!(
                    "Restore with ELAPSED: the state was saved {} ms after this host's present \
                     time; nothing is added to the counts",
                    ns / 1_000_000
                ),
            }
        }
        any
    }
}

impl TimerDevice {
    /// A device whose VM is yet to be configured; or, with a state file in which a former process left
    /// one, goes on.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] where the system refuses, or the state file is not to be used.
    pub fn new(
        mut profile: Profile,
        mut counter: HostCounter,
        state_file: Option<&Path>,
    ) -> Result<Self, DeviceError> {
        let mut vm = Vm::new(profile);
        let mut state = None;
        if let Some(path) = state_file {
            let (file, found) = StateFile::open(path, profile.max_vcpus, |old| {
                if let Some(old) = old {
                    counter = counter.at_rate(old.frequency);
                }
                counter.id()
            })?;
            // A rate that was measured is the VM's for as long as it lives.
            if !profile.frequency_fixed {
                profile.frequency = counter.native_frequency();
            }
            if let Some(found) = found {
                let now = |vm: &Vm| instant(counter, vm);
                vm = Vm::from_records(profile, found.vm(), |index| found.vcpu(index), now)
                    .map_err(|bad| file.damaged(&bad))?;
                log::info!(
                    "Going on with the VM in {}: {}, epoch {}",
                    path.display(),
                    vm.phase(),
                    vm.epoch()
                );
            }
            state = Some(file);
        }
        let alarm = Alarm::new(counter).map_err(DeviceError::Alarm)?;
        let mut core = TimerState {
            vm,
            effects: Effects::default(),
            alarm,
            counter,
            last: None,
            state,
            page: Page::new(),
        };
        core.follow_time();
        Ok(TimerDevice {
            profile,
            alarm_fd: core.alarm.as_raw_fd(),
            core: Mutex::new(core),
            phase_changed: Condvar::new(),
        })
    }

    /// How many queues there are: the event queue and the request queues.
    fn queues(&self) -> u16 {
        1 + self.profile.request_queues
    }

    /// What the host's clocks read, and the guest's virtual counter at the same instant. A VM that
    /// nobody configured has the counter offset that it was `told` to have, or none.
    pub(super) fn sample_with_counter(&self, tai: bool, told: Option<u64>) -> Sample {
        let mut core = self.state();
        let (sample, host, _) = wall::sample_with(tai, || core.now().host);
        let counter = match core.vm.guest_counter(Now::at(host)) {
            GuestCounter::Running(count) => ClockCounter::At(count),
            GuestCounter::Stopped => ClockCounter::Withheld,
            GuestCounter::Unconfigured => told.map_or(ClockCounter::Unknown, |offset| {
                ClockCounter::At(host.wrapping_sub(offset))
            }),
        };
        Sample { counter, ..sample }
    }

    /// What `make` makes of the clock device that the state file has, where it has one.
    pub(super) fn former_clocks<T>(
        &self,
        make: impl FnOnce(&RtcRecord) -> Result<T, BadRecord>,
    ) -> Result<Option<T>, DeviceError> {
        let core = self.state();
        let Some((state, record)) = core.state.as_ref().and_then(|s| Some((s, s.clock()?))) else {
            return Ok(None);
        };
        let made = make(&record).map_err(|bad| state.damaged(&bad))?;
        Ok(Some(made))
    }

    /// Takes the clock device into the state file.
    pub(super) fn persist_clock(&self, record: &RtcRecord) {
        let mut core = self.state();
        let TimerState {
            vm, state, effects, ..
        } = &mut *core;
        if let Some(state) = state {
            state.commit_clock(vm, &mut effects.changed, record);
        }
    }

    /// Waits for as long as a restore is open, so that nobody runs before it is over: until it is,
    /// its time-out has passed, or `given_up` is told. A restore without a time-out is waited for
    /// [`LONGEST_HOLD`].
    pub(super) fn hold_while_restoring(&self, given_up: &AtomicBool) {
        let mut core = self.state();
        let began = Instant::now();
        let mut said = false;
        while !given_up.load(Ordering::Acquire) {
            let now = core.now();
            let Some(restore) = core.vm.open_restore(now) else {
                break;
            };
            if !std::mem::replace(&mut said, true) {
                log::info!(
                    "Holding the clock device's frontend back: a restore is open, and {} vCPUs are \
                     missing",
                    restore.missing
                );
            }
            let left = match restore.ticks_left {
                None => LONGEST_HOLD.saturating_sub(began.elapsed()),
                Some(ticks) => Duration::from_nanos(ns_of_ticks(ticks, core.vm.frequency())),
            };
            if restore.overdue || left.is_zero() {
                log::error!(
                    "The clock device's frontend is let go on, though a restore is open after {} ms \
                     and {} vCPUs are missing: they may see another time than those that run",
                    began.elapsed().as_millis(),
                    restore.missing
                );
                return;
            }
            let waited = self.phase_changed.wait_timeout(core, left);
            core = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if said {
            log::info!(
                "The clock device's frontend was held back for {} ms",
                began.elapsed().as_millis()
            );
        }
    }

    /// Tells whoever holds back to look again.
    pub(super) fn look_again(&self) {
        // Whoever is about to wait has the lock.
        drop(self.state());
        self.phase_changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, TimerState> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
