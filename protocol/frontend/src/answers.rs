//! What the backend answers, parsed: a value of these types cannot be wrong in form.

use crate::error::ContentFault;
use crate::{Error, SavedVcpu};
use vhost_user_timer_protocol::wire::{self, info_flags};
use vhost_user_timer_protocol::{Abi, CounterSource, Phase, VERSION};

/// The VM, as GET_INFO and the device's config space tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// Where the VM is in its life.
    pub phase: Phase,
    /// How many vCPUs it has; 0 in NEW.
    pub vcpus: u32,
    /// vCPUs done in the open restore; equals `vcpus` outside RESTORING.
    pub restored: u32,
    /// Counter frequency, Hz.
    pub frequency: u64,
    /// Host count − virtual count, modulo 2^64.
    pub cntvoff: u64,
    /// Host count − physical count, modulo 2^64.
    pub cntpoff: u64,
    /// Starts at 1; grows by one at every RESTORE_BEGIN and device-state load.
    pub epoch: u64,
    /// The most vCPUs that this backend takes.
    pub max_vcpus: u32,
    /// How many request queues the backend serves.
    pub request_queues: u16,
    /// The ABI of the VM's registers.
    pub abi: Abi,
    /// SET_COUNTER_OFFSET fixed the offset; count writes are ignored.
    pub offset_pinned: bool,
    /// SET_COUNTER_ANCHOR says what the host counter reads.
    pub anchored: bool,
    /// The physical count is the VM's own, not the host counter's.
    pub phys_virtualised: bool,
    /// The VM was configured with [`VmOptions::confirm`](crate::VmOptions::confirm).
    pub confirm: bool,
    /// The VM was configured with [`VmOptions::one_offset`](crate::VmOptions::one_offset).
    pub one_offset: bool,
    /// What the host counter counts by; [`Monotonic`](CounterSource::Monotonic) where
    /// [`anchored`](Self::anchored).
    pub source: CounterSource,
    /// The host counter; 0 in config space.
    pub host_count: u64,
}

impl Info {
    /// Parses all but the version.
    pub(crate) fn parse(info: &wire::Info) -> Result<Self, ContentFault> {
        let flag = |bit| info.flags & bit != 0;
        Ok(Info {
            phase: Phase::from_code(info.phase.get())
                .ok_or(ContentFault::Phase(info.phase.get()))?,
            vcpus: info.vcpus.get(),
            restored: info.restored.get(),
            frequency: info.frequency.get(),
            cntvoff: info.cntvoff.get(),
            cntpoff: info.cntpoff.get(),
            epoch: info.epoch.get(),
            max_vcpus: info.max_vcpus.get(),
            request_queues: info.request_queues.get(),
            abi: Abi::from_code(info.abi).ok_or(ContentFault::Abi(info.abi))?,
            offset_pinned: flag(info_flags::OFFSET_PINNED),
            anchored: flag(info_flags::ANCHORED),
            phys_virtualised: flag(info_flags::PHYS_VIRTUALISED),
            confirm: flag(info_flags::CONFIRM),
            one_offset: flag(info_flags::ONE_OFFSET),
            source: CounterSource::from_info_flags(info.flags),
            host_count: info.host_count.get(),
        })
    }

    pub(crate) fn from_config(info: &wire::Info) -> Result<Self, Error> {
        match info.version.get() {
            VERSION => Info::parse(info).map_err(Error::Config),
            version => Err(Error::Version(version)),
        }
    }
}

/// Both counts and offsets, all of one instant: what PAUSE, RESUME, WAIT_RUN and CONFIRM_RUN
/// answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Run {
    /// Host count − virtual count, modulo 2^64.
    pub cntvoff: u64,
    /// Host count − physical count, modulo 2^64.
    pub cntpoff: u64,
    /// The virtual count.
    pub virt_count: u64,
    /// The physical count.
    pub phys_count: u64,
    /// The host counter.
    pub host_count: u64,
}

impl Run {
    pub(crate) fn parse(run: &wire::Run) -> Self {
        Run {
            cntvoff: run.cntvoff.get(),
            cntpoff: run.cntpoff.get(),
            virt_count: run.virt_count.get(),
            phys_count: run.phys_count.get(),
            host_count: run.host_count.get(),
        }
    }
}

/// One of a vCPU's two timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Timer {
    /// The virtual timer (CNTV_*).
    Virtual,
    /// The physical timer (CNTP_*).
    Physical,
}

/// What SET_REGS led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SetRegs {
    /// The virtual timer's line stands high.
    pub virtual_line: bool,
    /// The physical timer's line stands high.
    pub physical_line: bool,
    /// Count writes that were ignored, because the offset is pinned or because the physical count
    /// follows the virtual one.
    pub ignored: u32,
}

impl SetRegs {
    pub(crate) fn parse(lines: u32, ignored: u32) -> Self {
        SetRegs {
            virtual_line: lines & wire::LINE_VIRTUAL != 0,
            physical_line: lines & wire::LINE_PHYSICAL != 0,
            ignored,
        }
    }
}

/// What SET_REGS with DONE led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SetRegsDone {
    /// How many vCPUs are still missing.
    pub remaining: u32,
    /// As SET_REGS; the lines are those after the restore's end if this request was the last one.
    /// `None` where a connection was lost with the answer, and the restore was complete by then: an
    /// empty SET_REGS reads the lines. [`set_regs_done`](crate::RequestQueue::set_regs_done) asks
    /// for them itself.
    pub set: Option<SetRegs>,
}

/// The VM or a part of it at one instant: GET_VM's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Vm {
    /// The virtual count.
    pub virt_count: u64,
    /// The physical count.
    pub phys_count: u64,
    /// The host counter.
    pub host_count: u64,
    /// Counter frequency, Hz.
    pub frequency: u64,
    /// The vCPUs asked for.
    pub vcpus: Vec<SavedVcpu>,
}
