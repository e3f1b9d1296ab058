//! The timer device: the VMM's way to the VM's time.
//!
//! [`TimerDevice`] lives as long as the process and has the VM. `requests` is the hot path; what is
//! behind the device's lock is in `state`.

mod alarm;
mod asked;
mod config;
mod device;
mod guest_time;
mod instant;
mod page;
pub(crate) mod persist;
mod refused;
mod requests;
mod state;
mod supervised;
mod told;
mod watch;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};

use vhost_user_timer_model::vm::{Profile, Vm};

use crate::device::DeviceError;
use crate::state::Store;
use crate::state::file::Opening;
use crate::sys::{Turnstile, lock};
use alarm::Alarm;
pub use config::{SourceChoice, TimerConfig};
use state::TimerState;
pub use watch::VmStatus;
use watch::Watch;

/// The VM, its clock and its alarm: what outlives every connection.
#[derive(Debug)]
pub struct TimerDevice {
    profile: Profile,
    alarm_fd: RawFd,
    state: Mutex<TimerState>,
    store: Option<Arc<Store>>,
    /// Notified whenever the VM's phase has changed, or a restore has timed out.
    phase_changed: Condvar,
    /// Lets the clock device's threads go before the worker, which takes the VM again and again.
    turnstile: Turnstile,
    /// Set where something supervises this process.
    watch: OnceLock<Watch>,
}

impl TimerDevice {
    /// A device whose VM is yet to be configured, or the one that a previous process left in the
    /// state file.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] where the system refuses, this host has no such counter, or the state file
    /// cannot be used.
    pub fn new(config: &TimerConfig) -> Result<Self, DeviceError> {
        let opening = config.state_file.as_deref().map(Opening::new).transpose()?;
        let counter = config.counter(opening.as_ref())?;
        let profile = config.profile(counter);
        let (store, vm) = match opening {
            None => (None, Vm::new(profile)),
            Some(opening) => {
                let (store, vm) = persist::resume(opening, profile, counter)?;
                (Some(Arc::new(store)), vm)
            }
        };
        let alarm = Alarm::new(counter).map_err(DeviceError::Alarm)?;
        let mut state = TimerState::new(vm, counter, alarm, store.clone());
        state.follow_time();
        Ok(TimerDevice {
            profile,
            alarm_fd: state.alarm.as_raw_fd(),
            state: Mutex::new(state),
            store,
            phase_changed: Condvar::new(),
            turnstile: Turnstile::default(),
            watch: OnceLock::new(),
        })
    }

    /// The host counter, as the log says it: its source and its frequency, Hz.
    pub fn host_counter(&self) -> String {
        let counter = self.state().counter();
        let source = counter.source().name();
        format!("{source} at {} Hz", counter.native_frequency())
    }

    /// The state file that the VM is kept in, for another device to keep its records there too.
    pub fn store(&self) -> Option<Arc<Store>> {
        self.store.clone()
    }

    fn state(&self) -> MutexGuard<'_, TimerState> {
        lock(&self.state)
    }
}
