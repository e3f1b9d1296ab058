//! A VM's timers at one instant, to be taken elsewhere (device state).

use alloc::vec::Vec;

use vhost_user_timer_protocol::{Abi, Phase, Register, Status, Timeline};

use super::clock::Now;
use super::machine::Machine;
use super::restore::{Staged, Terms};
use super::{Effects, Vm};

/// What a VM is made of, as far as its time goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The VM's ABI.
    pub abi: Abi,
    /// Counter frequency, Hz.
    pub frequency: u64,
    /// The virtual count.
    pub virt_count: u64,
    /// The physical count.
    pub phys_count: u64,
    /// Every vCPU's timers, in index order.
    pub vcpus: Vec<SavedVcpu>,
}

/// One vCPU's timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedVcpu {
    /// TIMER_CTL.
    pub ctl: u64,
    /// TIMER_CVAL.
    pub cval: u64,
    /// PTIMER_CTL.
    pub pctl: u64,
    /// PTIMER_CVAL.
    pub pcval: u64,
}

/// Why a VM cannot be saved now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// There is nothing yet.
    #[error("The VM is NEW: configure it, or migrate it without its timers")]
    New,
    /// The vCPUs' registers are on their way in.
    #[error("A restore is open, {missing} vCPUs are missing: finish or abort it first")]
    Restoring {
        /// How many vCPUs are missing.
        missing: u32,
    },
}

/// Why a saved VM cannot be loaded here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Something runs, or is being restored.
    #[error("The VM is {0}: a state is loaded in NEW and PAUSED")]
    Phase(Phase),
    /// More vCPUs than this backend takes, or none.
    #[error("The saved VM has {vcpus} vCPUs, and this backend takes 1 to {max_vcpus}")]
    Vcpus {
        /// How many the saved VM has.
        vcpus: usize,
        /// The most that this backend takes.
        max_vcpus: u32,
    },
    /// Another frequency than this backend was told to have.
    #[error(
        "The saved VM's counter runs at {saved} Hz, and this backend's at {own} Hz; \
         start it without --counter-frequency to take the saved VM's"
    )]
    Frequency {
        /// The saved VM's, Hz.
        saved: u64,
        /// This backend's, Hz.
        own: u64,
    },
}

impl Vm {
    /// The VM's timers at one instant. It goes on as if nothing had happened.
    ///
    /// # Errors
    ///
    /// [`SaveError`] where there is no such state: in NEW, and in RESTORING.
    pub fn save(&self, now: Now) -> Result<Saved, SaveError> {
        let machine = self.machine.as_ref().ok_or(SaveError::New)?;
        if let Some(restore) = machine.restoring() {
            return Err(SaveError::Restoring {
                missing: restore.remaining(),
            });
        }
        let value = |vcpu, register| machine.register(vcpu, register, now.host);
        let vcpus = 0..machine.vcpus() as usize;
        Ok(Saved {
            abi: machine.abi,
            frequency: machine.frequency,
            virt_count: machine.count(Timeline::Virtual, now.host),
            phys_count: machine.count(Timeline::Physical, now.host),
            vcpus: vcpus
                .map(|vcpu| SavedVcpu {
                    ctl: value(vcpu, Register::TimerCtl),
                    cval: value(vcpu, Register::TimerCval),
                    pctl: value(vcpu, Register::PtimerCtl),
                    pcval: value(vcpu, Register::PtimerCval),
                })
                .collect(),
        })
    }

    /// Configures the VM as it was saved and opens a restore to which every vCPU has brought
    /// its registers. Each of them reads its own, applies them and says RESTORE_DONE.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; the VM is then as it was.
    pub fn load(
        &mut self,
        now: Now,
        saved: &Saved,
        effects: &mut Effects,
    ) -> Result<(), LoadError> {
        let from = self.phase();
        if !matches!(from, Phase::New | Phase::Paused) {
            return Err(LoadError::Phase(from));
        }
        let max_vcpus = self.profile.max_vcpus;
        let vcpus = u32::try_from(saved.vcpus.len())
            .ok()
            .filter(|vcpus| (1..=max_vcpus).contains(vcpus))
            .ok_or(LoadError::Vcpus {
                vcpus: saved.vcpus.len(),
                max_vcpus,
            })?;
        if !self.profile.takes_frequency(saved.frequency) {
            return Err(LoadError::Frequency {
                saved: saved.frequency,
                own: self.profile.frequency,
            });
        }
        let mut machine = Machine::new(vcpus, saved.abi, saved.frequency);
        let before = match self.machine.take() {
            Some(before) => {
                // The anchor is the host's, not the saved VM's.
                machine.anchor = before
                    .anchor
                    .filter(|_| before.frequency == saved.frequency);
                before
            }
            None => machine.clone(),
        };
        let staged = Staged {
            present: saved.abi.present(),
            done: false,
            counts: [saved.virt_count, saved.phys_count],
        };
        let terms = Terms {
            flags: 0,
            saved_realtime_ns: 0,
            began: now.host,
            timeout: None,
        };
        machine.load(before, terms, staged, &saved.vcpus, now.host);
        self.machine = Some(machine);
        self.epoch += 1;
        effects.changed.all = true;
        self.release(effects, Status::Stale, 0, None);
        self.entered(from, now, effects);
        Ok(())
    }
}
