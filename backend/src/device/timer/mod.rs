//! The timer device: the VMM's way to the VM's time.
//!
//! [`TimerDevice`] lives as long as the process and has the VM. A `TimerSession` lives as long as one
//! connection.

mod rings;
mod session;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

pub(crate) use session::TimerSession;

use vhost_user_timer_protocol::Ranges;

use crate::counter::{Alarm, Counter};
use crate::state::file::{Found, StateFile, StateFileError};
use crate::vm::{Anchor, Effects, Notice, Now, Profile, Vm};

/// The VM, its clock and its alarm: what outlives every connection.
#[derive(Debug)]
pub struct TimerDevice {
    profile: Profile,
    /// The alarm's descriptor, for epoll.
    alarm_fd: RawFd,
    core: Mutex<Core>,
    /// Told whenever the VM's phase has changed, or a restore has timed out.
    phase_changed: Condvar,
}

#[derive(Debug)]
struct Core {
    vm: Vm,
    effects: Effects,
    alarm: Alarm,
    counter: Counter,
    /// The last instant, and what the host counter was then.
    last: Option<(HostCounter, u64)>,
    state: Option<StateFile>,
}

/// What a host counter is told by: another one may read less.
type HostCounter = (Option<Anchor>, u64);

impl Core {
    /// The present instant. The model takes a step back of the host counter for a wrap, so one
    /// that two CPUs do not agree on stands still instead.
    fn now(&mut self) -> Now {
        let mut now = self.counter.now(&self.vm);
        let counter = (self.vm.anchor(), self.vm.frequency());
        if let Some((same, last)) = self.last
            && same == counter
            && now.host.wrapping_sub(last).cast_signed() < 0
        {
            now.host = last;
        }
        self.last = Some((counter, now.host));
        now
    }

    /// Takes what changed into the state file. Answers may be seen after that, not before.
    fn persist(&mut self) {
        match &mut self.state {
            Some(state) => state.commit(&self.vm, &mut self.effects.changed),
            None => self.effects.changed.clear(),
        }
    }

    /// Sets the alarm for what time brings next.
    fn follow_time(&mut self) {
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

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel makes no timerfd.
    #[error("Making a timerfd for the VM's deadlines failed")]
    Alarm(#[source] io::Error),
    /// The state file cannot be used.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
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
        mut counter: Counter,
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
                let now = |vm: &Vm| counter.now(vm);
                vm = Vm::from_records(profile, found.vm(), |index| found.vcpu(index), now)
                    .map_err(|bad| Found::damaged(path, bad))?;
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
        let mut core = Core {
            vm,
            effects: Effects::default(),
            alarm,
            counter,
            last: None,
            state,
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

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
