//! The timer device: the VMM's way to the VM's time.
//!
//! [`TimerDevice`] lives as long as the process and has the VM. `requests` is the hot path; what is
//! behind the device's lock is in `state`.

mod alarm;
mod device;
mod guest_time;
mod page;
mod requests;
mod state;

use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard};

use vhost_user_timer_counter::HostCounter;
use vhost_user_timer_model::vm::{Profile, Vm};

use crate::device::DeviceError;
use crate::state::file::StateFile;
use crate::sys::lock;
use alarm::Alarm;
use state::{TimerState, instant};

/// The VM, its clock and its alarm: what outlives every connection.
#[derive(Debug)]
pub struct TimerDevice {
    profile: Profile,
    alarm_fd: RawFd,
    state: Mutex<TimerState>,
    /// Notified whenever the VM's phase has changed, or a restore has timed out.
    phase_changed: Condvar,
}

impl TimerDevice {
    /// A device whose VM is yet to be configured, or the one that a previous process left in the
    /// state file.
    ///
    /// # Errors
    ///
    /// [`DeviceError`] where the system refuses, or the state file cannot be used.
    pub fn new(
        mut profile: Profile,
        mut counter: HostCounter,
        state_file: Option<&Path>,
    ) -> Result<Self, DeviceError> {
        let mut vm = Vm::new(profile);
        let mut file = None;
        if let Some(path) = state_file {
            let (opened, found) = StateFile::open(path, profile.max_vcpus, |old| {
                if let Some(old) = old {
                    counter = counter.at_rate(old.frequency);
                }
                counter.id()
            })?;
            // A measured rate is the VM's for as long as the VM lives.
            if !profile.frequency_fixed {
                profile.frequency = counter.native_frequency();
            }
            if let Some(found) = found {
                let now = |vm: &Vm| instant(counter, vm);
                vm = Vm::from_records(profile, found.vm(), |index| found.vcpu(index), now)
                    .map_err(|bad| opened.damaged(&bad))?;
                log::info!(
                    "Going on with the VM in {}: {}, epoch {}",
                    path.display(),
                    vm.phase(),
                    vm.epoch()
                );
            }
            file = Some(opened);
        }
        let alarm = Alarm::new(counter).map_err(DeviceError::Alarm)?;
        let mut state = TimerState::new(vm, counter, alarm, file);
        state.follow_time();
        Ok(TimerDevice {
            profile,
            alarm_fd: state.alarm.as_raw_fd(),
            state: Mutex::new(state),
            phase_changed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, TimerState> {
        lock(&self.state)
    }
}
