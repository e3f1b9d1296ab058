//! A VM's timers at one instant, to move them elsewhere (device state).

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use vhost_user_timer_protocol::{Abi, Phase, Register, Role, Status, Timeline};

use super::call::Effects;
use super::clock::Now;
use super::configured::Configured;
use super::flags::VmFlags;
use super::model::Vm;
use super::restore::{Restore, Staged, Terms};
use super::timer::Timer;

/// All that is saved of a VM's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The VM's ABI.
    pub abi: Abi,
    /// Counter frequency, Hz.
    pub frequency: u64,
    /// What CONFIGURE_VM asked for.
    pub flags: VmFlags,
    /// The counts, by timeline.
    pub counts: [u64; Timeline::COUNT],
    /// Every vCPU's timers, in index order.
    pub vcpus: Vec<SavedVcpu>,
}

/// One vCPU's timers, by timeline.
pub type SavedVcpu = [SavedTimer; Timeline::COUNT];

/// One timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedTimer {
    /// The control register ([`wire::ctl`](vhost_user_timer_protocol::wire::ctl)).
    pub control: u64,
    /// The compare value.
    pub compare: u64,
}

/// Why a VM cannot be saved now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// The VM is not configured yet.
    #[error("the VM is NEW: configure it, or migrate it without its timers")]
    New,
    /// A restore is open.
    #[error("a restore is open, {missing} vCPUs are missing: finish or abort it first")]
    Restoring {
        /// How many vCPUs are missing.
        missing: u32,
    },
}

/// Why a saved VM cannot be loaded here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The VM runs, or a restore is open.
    #[error("the VM is {0}: a state is loaded in NEW and PAUSED")]
    Phase(Phase),
    /// More vCPUs than this backend accepts, or none.
    #[error("the saved VM has {vcpus} vCPUs, and this backend takes 1 to {max_vcpus}")]
    Vcpus {
        /// How many the saved VM has.
        vcpus: usize,
        /// The most that this backend accepts.
        max_vcpus: u32,
    },
    /// Another frequency than the one that was given to this backend.
    #[error(
        "the saved VM's counter runs at {saved} Hz, and this backend's at {own} Hz; \
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
    /// The VM's timers at one instant. The VM is not changed.
    ///
    /// # Errors
    ///
    /// [`SaveError`] in NEW and in RESTORING.
    pub fn save(&self, now: Now) -> Result<Saved, SaveError> {
        let configured = self.configured.as_ref().ok_or(SaveError::New)?;
        if let Some(restore) = configured.restoring() {
            return Err(SaveError::Restoring {
                missing: restore.remaining(),
            });
        }
        let timer = |vcpu, timeline| {
            let value = |role| configured.register(vcpu, Register::of(timeline, role), now.host);
            SavedTimer {
                control: value(Role::Control),
                compare: value(Role::Compare),
            }
        };
        let vcpus = 0..configured.vcpus() as usize;
        Ok(Saved {
            abi: configured.abi,
            frequency: configured.frequency,
            flags: configured.flags,
            counts: Timeline::ALL.map(|timeline| configured.count(timeline, now.host)),
            vcpus: vcpus
                .map(|vcpu| Timeline::ALL.map(|timeline| timer(vcpu, timeline)))
                .collect(),
        })
    }

    /// Configures the VM as it was saved and opens a restore in which every vCPU has its registers
    /// already. Each vCPU thread reads them, applies them and says RESTORE_DONE. A VM that was
    /// configured before keeps its own flags.
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
        if !self.profile.accepts_frequency(saved.frequency) {
            return Err(LoadError::Frequency {
                saved: saved.frequency,
                own: self.profile.frequency,
            });
        }
        let own = self.configured.as_ref().map(|configured| configured.flags);
        let flags = own.unwrap_or(saved.flags);
        let mut configured = Configured::new(vcpus, saved.abi, saved.frequency, flags);
        let before = match self.configured.take() {
            Some(before) => {
                // The anchor is the host's, not the saved VM's.
                configured.anchor = before
                    .anchor
                    .filter(|_| before.frequency == saved.frequency);
                before
            }
            None => configured.clone(),
        };
        let staged = Staged {
            present: saved.abi.present(),
            done: false,
            counts: saved.counts,
        };
        let terms = Terms {
            flags: 0,
            saved_realtime_ns: 0,
            began: now.host,
            timeout: None,
        };
        for (vcpu, timers) in configured.vcpus.iter_mut().zip(&saved.vcpus) {
            vcpu.timers = timers.map(|timer| Timer::new(timer.control, timer.compare));
        }
        let restore = Restore::open(terms, vec![staged; saved.vcpus.len()]);
        configured.open_restore(restore, Box::new(before), now.host);
        self.configured = Some(configured);
        self.epoch += 1;
        effects.changed.all = true;
        self.release_all(Status::Stale, None, effects);
        self.phase_changed(from, now, effects);
        Ok(())
    }
}
