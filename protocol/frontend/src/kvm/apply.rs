//! The VM's offset, into KVM.

use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_protocol::{Abi, CounterSource, Phase, Register};

use super::bracket::Host;
use super::vcpu::{get, refuse_el2};
use super::{Bracket, CounterOffset, KvmError, OneReg};
use crate::{Info, OtherCounter};

/// What [`apply`] put into KVM, and what KVM's counts were seen to be then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied {
    /// Host count − guest count, ticks: of both counts.
    pub offset: u64,
    /// How far TIMER_CNT was ahead of that offset's count: contains zero.
    pub virt: Bracket,
    /// How far PTIMER_CNT was ahead of that offset's count: contains zero.
    pub phys: Bracket,
}

/// Puts the offset of an ARMED VM into KVM (KVM_ARM_SET_COUNTER_OFFSET), and reads both counts of
/// one of its vCPUs back to see that it is in effect. It is what the closure of a restore and of a
/// resume calls, with the [`Info`] that the closure gets.
///
/// No vCPU may be in an ioctl: not in KVM_RUN, powered off or not, and no thread reading registers.
/// `vcpu` is any one of the VM's. It makes three kinds of ioctl on the two descriptors and no other
/// system call.
///
/// It may be called again, also with another offset, as after each pause: KVM takes each one. The
/// first call fixes that only this ioctl moves the counts from then on. KVM ignores writes of
/// TIMER_CNT and PTIMER_CNT for the rest of the VM's life, and a vCPU that is created later no
/// longer resets them.
///
/// # Errors
///
/// Any [`KvmError`] but those of saving and restoring a vCPU. Up to
/// [`SetCounterOffset`](KvmError::SetCounterOffset) nothing has changed;
/// [`NotInEffect`](KvmError::NotInEffect) comes after the ioctl.
pub fn apply(
    vm: &impl CounterOffset,
    vcpu: &impl OneReg,
    info: &Info,
) -> Result<Applied, KvmError> {
    let advice = "call apply from the closure that the restore or the resume takes";
    in_phase(info, Phase::Armed, advice)?;
    counts_as_kvm_does(info)?;
    apply_by(&HostCounter::open(Source::Cntvct)?, vm, vcpu, info)
}

pub(super) fn apply_by(
    host: &impl Host,
    vm: &impl CounterOffset,
    vcpu: &impl OneReg,
    info: &Info,
) -> Result<Applied, KvmError> {
    has_frequency_of(host, info)?;
    let &Info {
        cntvoff, cntpoff, ..
    } = info;
    if cntvoff != cntpoff {
        return Err(KvmError::TwoOffsets { cntvoff, cntpoff });
    }
    refuse_el2(vcpu)?;
    if !vm.has_counter_offset().map_err(KvmError::CheckExtension)? {
        return Err(KvmError::NoCounterOffset);
    }
    set_counter_offset(vm, cntvoff)?;
    let in_effect = |register: Register| {
        let bracket = Bracket::observe(host, cntvoff, || get(vcpu, register))?;
        match bracket.contains_zero() {
            true => Ok(bracket),
            false => Err(KvmError::NotInEffect {
                register: register.name(),
                offset: cntvoff,
                bracket,
            }),
        }
    };
    Ok(Applied {
        offset: cntvoff,
        virt: in_effect(Register::TimerCnt)?,
        phys: in_effect(Register::PtimerCnt)?,
    })
}

/// Tells KVM's refusals apart (arch/arm64/kvm/arch_timer.c, kvm_vm_ioctl_set_counter_offset).
fn set_counter_offset(vm: &impl CounterOffset, offset: u64) -> Result<(), KvmError> {
    // asm-generic/errno-base.h
    const EBUSY: i32 = 16;
    const EINVAL: i32 = 22;
    vm.set_counter_offset(offset)
        .map_err(|error| match error.raw_os_error() {
            Some(EBUSY) => KvmError::VcpuBusy,
            Some(EINVAL) => KvmError::ProtectedVm,
            _ => KvmError::SetCounterOffset(error),
        })
}

pub(super) fn in_phase(info: &Info, needed: Phase, advice: &'static str) -> Result<(), KvmError> {
    match info.phase == needed {
        true => Ok(()),
        false => Err(KvmError::Phase {
            found: info.phase,
            needed,
            advice,
        }),
    }
}

/// Whether the backend's offsets are from KVM's counter.
pub(super) fn counts_as_kvm_does(info: &Info) -> Result<(), KvmError> {
    if info.abi != Abi::Arm64 {
        return Err(KvmError::Abi(info.abi));
    }
    Ok(OtherCounter::check(CounterSource::Cntvct, info)?)
}

/// Whether the VM's ticks are KVM's.
pub(super) fn has_frequency_of(host: &impl Host, info: &Info) -> Result<(), KvmError> {
    match info.frequency == host.frequency() {
        true => Ok(()),
        false => Err(KvmError::Frequency {
            vm: info.frequency,
            host: host.frequency(),
        }),
    }
}
