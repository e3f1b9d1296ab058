//! The VM in brief, which a supervisor of this process can read without the device's lock.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;

use vhost_user_timer_protocol::Phase;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::timer::state::TimerState;
use crate::sys::lock;

/// The VM as it was at the last change of its phase, or when its restore was last asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmStatus {
    phase: Phase,
    vcpus: u32,
    epoch: u64,
    restored: u32,
}

impl VmStatus {
    /// Whether it changes without a report: vCPUs are being restored.
    pub fn is_progressing(&self) -> bool {
        self.phase == Phase::Restoring
    }
}

impl fmt::Display for VmStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let VmStatus {
            phase,
            vcpus,
            epoch,
            restored,
        } = self;
        if *phase == Phase::New {
            return f.write_str("No VM yet");
        }
        let plural = if *vcpus == 1 { "" } else { "s" };
        write!(f, "VM {phase}, ")?;
        if *phase == Phase::Restoring {
            write!(f, "{restored} of {vcpus} vCPU{plural} restored")?;
        } else {
            write!(f, "{vcpus} vCPU{plural}")?;
        }
        write!(f, ", epoch {epoch}")
    }
}

/// What one who watches the VM has.
#[derive(Debug)]
pub(super) struct Watch {
    /// Written after each change of the status.
    changed: EventFd,
    status: Mutex<VmStatus>,
}

impl Watch {
    /// Watches the VM from now on.
    ///
    /// # Errors
    ///
    /// Those of eventfd(2).
    pub(super) fn new(state: &mut TimerState) -> io::Result<Self> {
        Ok(Watch {
            changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            status: Mutex::new(brief(state)),
        })
    }

    /// Counts the vCPUs that are restored by now. They are not reported one by one: a restore does
    /// not wait for those who watch it.
    pub(super) fn renew(&self, state: &mut TimerState) {
        *lock(&self.status) = brief(state);
    }

    /// The status has changed.
    pub(super) fn update(&self, state: &mut TimerState) {
        self.renew(state);
        // Fails only where the counter is full, and then it is readable as well.
        let _ = self.changed.write(1);
    }

    /// The status. The descriptor is unreadable until the next change.
    pub(super) fn status(&self) -> VmStatus {
        // Before the status is read: a change in between is reported again.
        let _ = self.changed.read();
        *lock(&self.status)
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.changed.as_raw_fd()
    }
}

fn brief(state: &mut TimerState) -> VmStatus {
    let now = state.now();
    let info = state.vm.info(now);
    VmStatus {
        phase: state.vm.phase(),
        vcpus: info.vcpus.get(),
        epoch: state.vm.epoch(),
        restored: info.restored.get(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_names_the_phase_the_vcpus_and_how_many_are_restored() {
        let status = |phase, vcpus, restored| {
            let epoch = 3;
            VmStatus {
                phase,
                vcpus,
                epoch,
                restored,
            }
            .to_string()
        };
        assert_eq!(status(Phase::New, 0, 0), "No VM yet");
        assert_eq!(status(Phase::Running, 4, 4), "VM RUNNING, 4 vCPUs, epoch 3");
        assert_eq!(status(Phase::Armed, 1, 1), "VM ARMED, 1 vCPU, epoch 3");
        assert_eq!(
            status(Phase::Restoring, 4, 0),
            "VM RESTORING, 0 of 4 vCPUs restored, epoch 3"
        );
        assert_eq!(
            status(Phase::Restoring, 1, 0),
            "VM RESTORING, 0 of 1 vCPU restored, epoch 3"
        );
    }
}
