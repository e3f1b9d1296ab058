//! All timers of a paused VM.

use std::num::NonZeroU64;

use super::{KvmError, OneReg, save_vcpu};
use crate::saved::realtime_ns;
use crate::{Info, Run, SavedVcpu, SavedVm, SavedVmError};
use vhost_user_timer_protocol::{Register, Role, Timeline};

/// Saves a VM after PAUSE: the timers of its vCPUs, read from KVM, and its counts, from `paused`,
/// PAUSE's answer. `vcpus` are all vCPUs in the order of their indices, and `info` is GET_INFO's
/// answer.
///
/// No vCPU may be in KVM_RUN, and none of the VM's registers may wait for the end of an MMIO
/// access.
///
/// # Errors
///
/// As [`save_vcpu`] and [`paused_vm`].
pub fn save_vm<'a, V: OneReg + 'a>(
    vcpus: impl IntoIterator<Item = &'a V>,
    paused: &Run,
    info: &Info,
) -> Result<SavedVm, KvmError> {
    let vcpus = (0..).zip(vcpus);
    let saved = vcpus.map(|(index, vcpu)| save_vcpu(vcpu, index));
    paused_vm(saved.collect::<Result<_, _>>()?, paused, info)
}

/// As [`save_vm`], of vCPUs whose timers were read already, by
/// [`timers_among`](super::timers_among) for example.
///
/// KVM's counts continue over a pause, and each vCPU's was read at another time. They are replaced
/// by those at which the backend stopped the VM's time. The time of the save is now.
///
/// # Errors
///
/// [`KvmError::VcpuCount`], and [`KvmError::Saved`] for vCPUs in another order.
pub fn paused_vm(vcpus: Vec<SavedVcpu>, paused: &Run, info: &Info) -> Result<SavedVm, KvmError> {
    if vcpus.len() != info.vcpus as usize {
        return Err(KvmError::VcpuCount {
            saved: vcpus.len(),
            vm: info.vcpus,
        });
    }
    let frequency = NonZeroU64::new(info.frequency).ok_or(SavedVmError::Frequency)?;
    let counts = [
        (Timeline::Virtual, paused.virt_count),
        (Timeline::Physical, paused.phys_count),
    ];
    let at_the_pause = |mut vcpu: SavedVcpu| {
        for (timeline, count) in counts {
            let register = Register::of(timeline, Role::Count);
            if vcpu.get(register).is_some() {
                vcpu.set(register, count);
            }
        }
        vcpu
    };
    let vcpus = vcpus.into_iter().map(at_the_pause).collect();
    Ok(SavedVm::new(info.abi, frequency, vcpus)?.saved_at(realtime_ns()))
}
