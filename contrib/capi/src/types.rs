//! What C sees of the VM: structures and constants.

use vhost_user_timer_frontend::{CounterSource, Deadline, Info, Run, VmOptions};

use crate::border::Failure;

/// As a time limit: no limit. The call ends when the backend answers or dies, or by
/// vut_shut_down().
pub const VUT_FOREVER: u64 = u64::MAX;

/// The VM is not configured yet.
pub const VUT_PHASE_NEW: u32 = 0;
/// Configured; no vCPU may run.
pub const VUT_PHASE_PAUSED: u32 = 1;
/// The vCPUs may run.
pub const VUT_PHASE_RUNNING: u32 = 2;
/// A restore is open; no vCPU may run until every one of them is done.
pub const VUT_PHASE_RESTORING: u32 = 3;
/// The offsets are decided; no vCPU may run until they are confirmed.
pub const VUT_PHASE_ARMED: u32 = 4;

/// Any host counter, or one that the backend does not report.
pub const VUT_COUNTER_ANY: u8 = 0;
/// CLOCK_MONOTONIC, or an anchor to it (vut_set_anchor()).
pub const VUT_COUNTER_MONOTONIC: u8 = 1;
/// CLOCK_BOOTTIME.
pub const VUT_COUNTER_BOOTTIME: u8 = 2;
/// The time-stamp counter of x86-64.
pub const VUT_COUNTER_TSC: u8 = 3;
/// CNTVCT_EL0 of AArch64.
pub const VUT_COUNTER_CNTVCT: u8 = 4;

/// Registers with the ids of KVM on AArch64.
pub const VUT_ABI_ARM64: u8 = 0;
/// Registers with the ids of KVM on 32-bit Arm.
pub const VUT_ABI_ARM: u8 = 1;

/// Flag of a VM: it becomes ARMED where it would run, and runs once its offsets are applied to the
/// hypervisor and confirmed (vut_resume_with(), vut_restore_apply()).
pub const VUT_CONFIRM: u32 = 1;
/// Flag of a VM: the physical count always has the virtual count's offset, as
/// KVM_ARM_SET_COUNTER_OFFSET makes it.
pub const VUT_ONE_OFFSET: u32 = 2;

/// The VM, as vut_info() tells it and as an apply callback gets it.
#[repr(C)]
pub struct vut_info {
    /// Host count - virtual count, modulo 2^64, ticks.
    pub cntvoff: u64,
    /// Host count - physical count, modulo 2^64, ticks.
    pub cntpoff: u64,
    /// Counter frequency, Hz.
    pub frequency: u64,
    /// Starts at 1; grows by one whenever a restore begins or a device state is loaded.
    pub epoch: u64,
    /// The host counter at the instant of the answer, ticks.
    pub host_count: u64,
    /// VUT_PHASE_*.
    pub phase: u32,
    /// How many vCPUs the VM has; 0 in NEW.
    pub vcpus: u32,
    /// vCPUs done in the open restore; equals `vcpus` outside RESTORING. So `vcpus - restored` are
    /// missing.
    pub restored: u32,
    /// The most vCPUs that this backend takes.
    pub max_vcpus: u32,
    /// The VM's options: VUT_CONFIRM, VUT_ONE_OFFSET.
    pub vm_flags: u32,
    /// How many request queues the backend serves.
    pub request_queues: u16,
    /// VUT_ABI_*.
    pub abi: u8,
    /// What the host counter counts by: VUT_COUNTER_*.
    pub host_counter: u8,
    /// vut_set_counter_offset() fixed the offset; writes of counts are ignored.
    pub offset_pinned: bool,
    /// vut_set_anchor() says what the host counter reads.
    pub anchored: bool,
    /// The physical count is the VM's own, not the host counter's.
    pub phys_virtualised: bool,
}

/// Both counts and both offsets, all of one instant.
#[repr(C)]
pub struct vut_run {
    /// Host count - virtual count, modulo 2^64, ticks.
    pub cntvoff: u64,
    /// Host count - physical count, modulo 2^64, ticks.
    pub cntpoff: u64,
    /// The virtual count (CNTVCT), ticks.
    pub virt_count: u64,
    /// The physical count (CNTPCT), ticks.
    pub phys_count: u64,
    /// The host counter, ticks.
    pub host_count: u64,
}

impl From<&Info> for vut_info {
    fn from(info: &Info) -> Self {
        let flag = |set: bool, bit| if set { bit } else { 0 };
        vut_info {
            cntvoff: info.cntvoff,
            cntpoff: info.cntpoff,
            frequency: info.frequency,
            epoch: info.epoch,
            host_count: info.host_count,
            phase: info.phase.code(),
            vcpus: info.vcpus,
            restored: info.restored,
            max_vcpus: info.max_vcpus,
            vm_flags: flag(info.confirm, VUT_CONFIRM) | flag(info.one_offset, VUT_ONE_OFFSET),
            request_queues: info.request_queues,
            abi: info.abi.code(),
            host_counter: info.source.code(),
            offset_pinned: info.offset_pinned,
            anchored: info.anchored,
            phys_virtualised: info.phys_virtualised,
        }
    }
}

impl From<Run> for vut_run {
    fn from(run: Run) -> Self {
        vut_run {
            cntvoff: run.cntvoff,
            cntpoff: run.cntpoff,
            virt_count: run.virt_count,
            phys_count: run.phys_count,
            host_count: run.host_count,
        }
    }
}

/// A time limit that counts from now.
pub(crate) fn deadline(timeout_ns: u64) -> Deadline {
    match timeout_ns {
        VUT_FOREVER => Deadline::NEVER,
        ns => std::time::Duration::from_nanos(ns).into(),
    }
}

/// Refuses bits that have no meaning.
pub(crate) fn flags(flags: u32, known: u32) -> Result<u32, Failure> {
    match flags & !known {
        0 => Ok(flags),
        unknown => Err(Failure::argument(format!(
            "flags {flags:#x}: {unknown:#x} has no meaning for this call"
        ))),
    }
}

pub(crate) fn vm_options(vm_flags: u32) -> Result<VmOptions, Failure> {
    let vm_flags = flags(vm_flags, VUT_CONFIRM | VUT_ONE_OFFSET)?;
    Ok(VmOptions::default()
        .confirm(vm_flags & VUT_CONFIRM != 0)
        .one_offset(vm_flags & VUT_ONE_OFFSET != 0))
}

/// The host counter that the caller needs; `None` for any.
pub(crate) fn host_counter(code: u8) -> Result<Option<CounterSource>, Failure> {
    match code {
        VUT_COUNTER_ANY => Ok(None),
        VUT_COUNTER_MONOTONIC..=VUT_COUNTER_CNTVCT => Ok(Some(CounterSource::from_code(code))),
        _ => Err(Failure::argument(format!(
            "host_counter {code}: must be one of VUT_COUNTER_*, 0 to {VUT_COUNTER_CNTVCT}"
        ))),
    }
}
