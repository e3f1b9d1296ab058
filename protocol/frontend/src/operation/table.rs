//! A constructor for each operation. Its code, and the types of its body and its answer, are those
//! of its row in the protocol's table.

use std::num::NonZeroU64;

use super::{Body, NewEpoch, Operation, RawAnswer, Remaining};
use crate::answers::{Info, Run, SetRegs, SetRegsDone, Vm};
use crate::regs::{MAX_REGS, RegIds, RegValue, RegValues};
use crate::{RestoreOptions, SavedVcpu, VmOptions};
use vhost_user_timer_protocol::op::operation as table;
use vhost_user_timer_protocol::wire::{self, restore_flags};
use vhost_user_timer_protocol::{Abi, Op, VM_WIDE};

impl Operation<'static, Info> {
    /// GET_INFO: the VM; in any phase.
    pub fn get_info() -> Self {
        Operation::of::<table::GetInfo>(VM_WIDE, &())
    }
}

impl Operation<'static, ()> {
    /// CONFIGURE_VM: fixes the VM's vCPUs (1 to [`Info::max_vcpus`]), ABI and counter frequency
    /// in Hz (`None`: the backend's). NEW → PAUSED; the same values again are accepted in every
    /// phase.
    pub fn configure(vcpus: u32, abi: Abi, frequency: Option<NonZeroU64>) -> Self {
        Self::configure_with(vcpus, abi, frequency, VmOptions::default())
    }

    /// As [`configure`](Self::configure), with the VM's options, which are among the values.
    pub fn configure_with(
        vcpus: u32,
        abi: Abi,
        frequency: Option<NonZeroU64>,
        options: VmOptions,
    ) -> Self {
        let body = wire::ConfigureVm {
            vcpus: vcpus.into(),
            abi: abi.code(),
            flags: options.flags(),
            reserved: [0; 2],
            frequency: frequency.map_or(0, NonZeroU64::get).into(),
        };
        Operation::of::<table::ConfigureVm>(VM_WIDE, &body)
    }

    /// SET_COUNTER_OFFSET: sets and pins cntvoff = cntpoff = `offset` (as
    /// KVM_ARM_SET_COUNTER_OFFSET). In PAUSED and RESTORING.
    pub fn set_counter_offset(offset: u64) -> Self {
        let body = wire::CounterOffset {
            offset: offset.into(),
            reserved: 0.into(),
        };
        Operation::of::<table::SetCounterOffset>(VM_WIDE, &body)
    }

    /// SET_COUNTER_ANCHOR: the VMM's host counter read `count` when CLOCK_MONOTONIC read
    /// `monotonic_ns`. In PAUSED.
    pub fn set_counter_anchor(monotonic_ns: u64, count: u64) -> Self {
        let body = wire::CounterAnchor {
            monotonic_ns: monotonic_ns.into(),
            count: count.into(),
        };
        Operation::of::<table::SetCounterAnchor>(VM_WIDE, &body)
    }

    /// RESTORE_ABORT: drops the open restore; the VM is PAUSED, as it was before.
    pub fn restore_abort() -> Self {
        Operation::of::<table::RestoreAbort>(VM_WIDE, &())
    }

    /// SET_TIME_PAGE: an address in the memory shared on this connection, and its length (0:
    /// stop). See [`TimePage`](crate::TimePage), which knows the address.
    pub fn set_time_page(address: u64, length: u64) -> Self {
        let body = wire::TimePage {
            address: address.into(),
            length: length.into(),
        };
        Operation::of::<table::SetTimePage>(VM_WIDE, &body)
    }
}

impl Operation<'static, NewEpoch> {
    /// RESTORE_BEGIN: opens a restore of all `vcpus` vCPUs, and with it a new epoch. In PAUSED,
    /// RESTORING and ARMED.
    pub fn restore_begin(vcpus: u32, options: RestoreOptions) -> Self {
        let flag = |set: bool, bit| if set { bit } else { 0 };
        let flags = flag(options.autorun, restore_flags::AUTORUN)
            | flag(options.strict, restore_flags::STRICT)
            | flag(options.elapsed_since.is_some(), restore_flags::ELAPSED);
        let timeout_ns = options.timeout.map_or(0, |timeout| {
            // 0 on the wire means never.
            u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX).max(1)
        });
        let body = wire::RestoreBegin {
            vcpus: vcpus.into(),
            flags: flags.into(),
            saved_realtime_ns: options.elapsed_since.unwrap_or(0).into(),
            timeout_ns: timeout_ns.into(),
        };
        Operation::of::<table::RestoreBegin>(VM_WIDE, &body)
    }
}

impl<'a> Operation<'a, ()> {
    /// SET_VM: stages the registers of many vCPUs in an open restore. In RESTORING.
    pub fn set_vm(vcpus: &'a [SavedVcpu]) -> Self {
        Operation::many::<table::SetVm>(VM_WIDE, Body::Vcpus(vcpus), 0)
    }
}

impl Operation<'static, RegIds> {
    /// GET_REG_LIST: the KVM ids of the vCPU's timer registers. Not in NEW.
    pub fn reg_list(vcpu: u32) -> Self {
        Operation::many::<table::GetRegList>(vcpu, Body::NONE, MAX_REGS)
    }
}

impl<'a> Operation<'a, RegValues> {
    /// GET_REGS: reads up to [`MAX_REGS`] registers by their KVM ids, all at one instant. Not in
    /// NEW.
    pub fn get_regs(vcpu: u32, ids: &'a [u64]) -> Self {
        Operation::many::<table::GetRegs>(vcpu, Body::Ids(ids), ids.len())
    }
}

impl<'a> Operation<'a, SetRegs> {
    /// SET_REGS: writes up to [`MAX_REGS`] registers, all together: their order does not matter.
    /// Not in NEW; counts in PAUSED and RESTORING only.
    pub fn set_regs(vcpu: u32, values: &'a [RegValue]) -> Self {
        Operation::many::<table::SetRegs>(vcpu, Body::Values(values), 0)
    }
}

impl<'a> Operation<'a, SetRegsDone> {
    /// SET_REGS with DONE: SET_REGS and RESTORE_DONE at one instant, both or neither. In
    /// RESTORING and a restore's ARMED.
    pub fn set_regs_done(vcpu: u32, values: &'a [RegValue]) -> Self {
        Operation::done::<table::SetRegs>(vcpu, Body::Values(values))
    }
}

impl<'a> Operation<'a, Remaining> {
    /// SET_VM with DONE: SET_VM, and RESTORE_DONE for every vCPU in it, at one instant, all or
    /// nothing. In RESTORING and a restore's ARMED.
    pub fn set_vm_done(vcpus: &'a [SavedVcpu]) -> Self {
        Operation::done::<table::SetVm>(VM_WIDE, Body::Vcpus(vcpus))
    }
}

impl Operation<'static, Vm> {
    /// GET_VM: `count` vCPUs from `first` on, all at one instant. Not in NEW.
    pub fn get_vm(first: u32, count: u32) -> Self {
        let range = wire::VcpuRange {
            first: first.into(),
            count: count.into(),
        };
        let vcpus = usize::try_from(count).unwrap_or(usize::MAX);
        let body = Body::structure(&range);
        Operation::many::<table::GetVm>(VM_WIDE, body, vcpus)
    }
}

impl Operation<'static, Run> {
    /// PAUSE: stops the VM's time. RUNNING or ARMED → PAUSED; in PAUSED it changes nothing.
    pub fn pause() -> Self {
        Self::pause_with(0)
    }

    /// PAUSE with KEEP_COUNTING: stops the VM and lets its time go on. RUNNING or ARMED → PAUSED;
    /// in PAUSED it changes nothing.
    pub fn pause_vm_only() -> Self {
        Self::pause_with(wire::PAUSE_KEEP_COUNTING)
    }

    fn pause_with(flags: u32) -> Self {
        let body = wire::Pause {
            flags: flags.into(),
            reserved: 0.into(),
        };
        Operation::of::<table::Pause>(VM_WIDE, &body)
    }

    /// RESUME: lets the VM's time go on. PAUSED → RUNNING, or ARMED in a VM with
    /// [`confirm`](VmOptions::confirm); in RUNNING and ARMED it changes nothing.
    pub fn resume() -> Self {
        Operation::of::<table::Resume>(VM_WIDE, &())
    }

    /// CONFIRM_RUN: these offsets, which are the VM's, are where the guest's counter is made.
    /// ARMED → RUNNING; in RUNNING it changes nothing.
    pub fn confirm_run(cntvoff: u64, cntpoff: u64) -> Self {
        let body = wire::ConfirmRun {
            cntvoff: cntvoff.into(),
            cntpoff: cntpoff.into(),
        };
        Operation::of::<table::ConfirmRun>(VM_WIDE, &body)
    }

    /// WAIT_RUN: answered when, and only when, the vCPU may run. Not in NEW.
    pub fn wait_run(vcpu: u32) -> Self {
        Operation::of::<table::WaitRun>(vcpu, &())
    }
}

impl Operation<'static, Remaining> {
    /// RESTORE_DONE: the vCPU has all its timer registers. In RESTORING.
    pub fn restore_done(vcpu: u32) -> Self {
        Operation::of::<table::RestoreDone>(vcpu, &())
    }
}

impl<'a> Operation<'a, RawAnswer> {
    /// Any request at all, with room for an answer's body of `answer` bytes: for tests, and for
    /// operations that this version does not know.
    pub fn raw(op: Op, vcpu: u32, body: &'a [u8], answer: usize) -> Self {
        Operation::new(op, vcpu, Body::Bytes(body), answer)
    }

    /// The same request with these header flags
    /// ([`request_flags`](vhost_user_timer_protocol::wire::request_flags)).
    #[must_use]
    pub fn with_flags(mut self, flags: u16) -> Self {
        self.flags = flags;
        self
    }
}
