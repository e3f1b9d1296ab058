//! Why KVM's part of a VM's time was not saved, restored or applied.

use std::io;

use vhost_user_timer_counter::SourceError;
use vhost_user_timer_protocol::{Abi, Phase};

use super::Bracket;
use crate::{OtherCounter, SavedVmError};

/// Why a VM's timers could not be read from KVM or put into it.
///
/// From [`apply`](super::apply) it means that no vCPU may run: returned from the closure it keeps
/// the VM ARMED. Unless noted otherwise nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// KVM refused to read or write a register. ENOEXEC: before KVM_ARM_VCPU_INIT; EPERM: before
    /// KVM_ARM_VCPU_FINALIZE; EIO: from another process than the one that made the VM.
    #[error("cannot {action} {register} of a vCPU{}", hint(.source))]
    Register {
        /// "read" or "write".
        action: &'static str,
        /// The register's name.
        register: &'static str,
        /// KVM's error.
        source: io::Error,
    },
    /// The guest has EL2, so that it is a hypervisor: the VM's virtual count is not one count,
    /// since each vCPU has a CNTVOFF_EL2 of its own that the guest changes; and each vCPU has four
    /// timers.
    #[error(
        "the vCPU has {register}: a guest with EL2 (KVM_ARM_VCPU_HAS_EL2) has four timers and a \
         virtual count of its own on each vCPU, and the backend keeps two timers and one count for \
         the VM; create the vCPUs without that feature"
    )]
    El2Guest {
        /// The register that shows it.
        register: &'static str,
    },
    /// A physical timer is to be restored that KVM cannot be given.
    #[error(
        "the physical timer of vCPU {vcpu} is on, and KVM has no PTIMER registers: restore on Linux \
         6.4 or newer"
    )]
    NoPhysicalTimer {
        /// The vCPU's index.
        vcpu: u32,
    },
    /// The registers of a vCPU are no saved vCPU.
    #[error(transparent)]
    Saved(#[from] SavedVmError),
    /// These are more or fewer vCPUs than the backend's VM has.
    #[error("cannot save {saved} vCPUs: the backend's VM has {vm}, and all are saved together")]
    VcpuCount {
        /// How many were given.
        saved: usize,
        /// How many the VM has.
        vm: u32,
    },
    /// The VM is in a phase in which these offsets are not what its vCPUs will run with.
    #[error("the VM is {found}, and offsets are put into KVM in {needed}: {advice}")]
    Phase {
        /// The phase that the VM is in.
        found: Phase,
        /// The phase that it must be in.
        needed: Phase,
        /// What to do.
        advice: &'static str,
    },
    /// The VM's registers are not AArch64's.
    #[error("the VM's registers are those of {0}, and KVM has counter offsets for arm64 alone")]
    Abi(Abi),
    /// This host has no CNTVCT_EL0.
    #[error(transparent)]
    Host(#[from] SourceError),
    /// The backend counts by another source than KVM does.
    #[error(transparent)]
    OtherCounter(#[from] OtherCounter),
    /// The VM's frequency is not the host counter's. The backend scales the counter then, and an
    /// offset of the scaled one is in no ioctl's ticks.
    #[error(
        "the VM counts at {vm} Hz and CNTFRQ_EL0 is {host} Hz, and KVM does not scale the counter: \
         a VM moves only between hosts of one counter frequency"
    )]
    Frequency {
        /// The VM's, Hz.
        vm: u64,
        /// The host's, Hz.
        host: u64,
    },
    /// The VM's two offsets differ, and KVM's ioctl sets both to one value.
    #[error(
        "the VM's offsets differ (cntvoff {cntvoff:#x}, cntpoff {cntpoff:#x}), and \
         KVM_ARM_SET_COUNTER_OFFSET sets both to one value: configure the VM with ONE_OFFSET"
    )]
    TwoOffsets {
        /// Of the virtual count, ticks.
        cntvoff: u64,
        /// Of the physical count, ticks.
        cntpoff: u64,
    },
    /// KVM was not to be asked whether the VM's offset can be set.
    #[error("cannot check the VM for KVM_CAP_COUNTER_OFFSET")]
    CheckExtension(#[source] io::Error),
    /// The VM has no KVM_CAP_COUNTER_OFFSET.
    #[error(
        "the VM has no KVM_CAP_COUNTER_OFFSET: the kernel is older than Linux 6.4, or the VM is \
         protected (pKVM) or a realm, whose time its host cannot move; on an older kernel use a VM \
         without CONFIRM and set_counts"
    )]
    NoCounterOffset,
    /// KVM_ARM_SET_COUNTER_OFFSET was refused because a vCPU is in an ioctl: in KVM_RUN, where a
    /// vCPU that waits for an interrupt or is powered off stays, or for a moment in another one.
    #[error(
        "KVM_ARM_SET_COUNTER_OFFSET was refused (EBUSY): a vCPU is in an ioctl; get every vCPU out \
         of KVM_RUN, those that are powered off included, and apply again"
    )]
    VcpuBusy,
    /// KVM_ARM_SET_COUNTER_OFFSET was refused though the VM has the capability.
    #[error(
        "KVM_ARM_SET_COUNTER_OFFSET was refused (EINVAL): the VM is protected (pKVM) or a realm, \
         and its host cannot move its time"
    )]
    ProtectedVm,
    /// KVM_ARM_SET_COUNTER_OFFSET failed in another way.
    #[error("KVM_ARM_SET_COUNTER_OFFSET failed{}", hint(.0))]
    SetCounterOffset(#[source] io::Error),
    /// The offset is set, and a count does not follow from it: the vCPU is not of that VM, or
    /// something else moves the VM's counts.
    #[error(
        "{register} is {bracket} ahead of what offset {offset:#x} makes it, though KVM took the \
         offset: check that the vCPU is one of this VM and that nothing else sets its counts"
    )]
    NotInEffect {
        /// TIMER_CNT or PTIMER_CNT.
        register: &'static str,
        /// The offset that KVM took, ticks.
        offset: u64,
        /// Where the count is.
        bracket: Bracket,
    },
    /// The VM's count is not known, because this is the config space's `info`, without a host
    /// count.
    #[error(
        "the VM's count is not known: the config space has no host count; ask with \
         RequestQueue::info"
    )]
    NoHostCount,
    /// The VM is configured with CONFIRM, and counts that are written one by one are not its
    /// offsets.
    #[error(
        "the VM is configured with CONFIRM, which states exact offsets, and set_counts only comes \
         near them: use apply, or configure the VM without CONFIRM"
    )]
    Confirm,
    /// KVM dropped a count that was written: the VM's offset was set by KVM_ARM_SET_COUNTER_OFFSET
    /// before, after which KVM ignores counts for the life of the VM.
    #[error(
        "KVM dropped the write of {register}, which is {bracket} ahead of it: the VM's offset was \
         set by KVM_ARM_SET_COUNTER_OFFSET before, and KVM ignores counts from then on; use apply"
    )]
    CountDropped {
        /// TIMER_CNT or PTIMER_CNT.
        register: &'static str,
        /// Where the count is, of what was written.
        bracket: Bracket,
    },
}

impl KvmError {
    pub(super) fn register(
        action: &'static str,
        register: &'static str,
        source: io::Error,
    ) -> Self {
        KvmError::Register {
            action,
            register,
            source,
        }
    }

    /// Whether the same call may succeed later, without another VM, kernel or backend.
    pub fn is_transient(&self) -> bool {
        matches!(self, KvmError::VcpuBusy)
    }
}

/// What to do about KVM's error, where that is known (Documentation/virt/kvm/api.rst).
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(ENOEXEC) => ": the vCPU needs KVM_ARM_VCPU_INIT first",
        Some(EPERM) => ": the vCPU needs KVM_ARM_VCPU_FINALIZE first",
        Some(EIO) => ": only the process that made the VM may use it",
        _ => "",
    }
}

// asm-generic/errno-base.h
const EPERM: i32 = 1;
const EIO: i32 = 5;
const ENOEXEC: i32 = 8;
