//! The VM's counts into a KVM that takes no offset.

use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_protocol::{Phase, Register};

use super::apply::{counts_as_kvm_does, has_frequency_of, in_phase};
use super::bracket::Host;
use super::vcpu::{get, get_if_present, refuse_el2, set};
use super::{Bracket, KvmError, OneReg};
use crate::Info;

/// What [`set_counts`] made of KVM's counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BestEffort {
    /// The offset of the virtual count, as near as it can be known: for
    /// [`set_counter_offset`](crate::RequestQueue::set_counter_offset). Host count − guest count,
    /// ticks.
    pub offset: u64,
    /// How far TIMER_CNT is ahead of what `offset` makes it.
    pub virt: Bracket,
    /// How far PTIMER_CNT is ahead of what `offset` makes it; `None` where KVM cannot be given it,
    /// before Linux 6.4. It is the host's own then.
    pub phys: Option<Bracket>,
}

/// Writes the counts of a PAUSED VM into KVM by one KVM_SET_ONE_REG each, for a KVM without
/// KVM_CAP_COUNTER_OFFSET, and finds out which offset that made. **Best effort**: KVM subtracts the
/// count from a reading of its own, some microseconds after anything that this function can read,
/// so the offset is known to within a [`Bracket`] and not to the tick.
///
/// One vCPU is enough, whatever the kernel: each sets the offset of all vCPUs that exist
/// (arch/arm64/kvm/arch_timer.c: update_vtimer_cntvoff, and the VM's own offset since Linux 6.4). A
/// vCPU that is created afterwards resets it.
///
/// For a VM without CONFIRM, whose vCPU threads do not wait by WAIT_RUN but for the thread that
/// does this: restore without AUTORUN by [`bring_all_back`](crate::Restore::bring_all_back),
/// `set_counts`, `set_counter_offset` with the result's [`offset`](BestEffort::offset), `resume`,
/// and only then release the vCPUs. No vCPU may be in KVM_RUN: the ioctl waits for its end.
///
/// # Errors
///
/// [`KvmError::Confirm`]; [`KvmError::NoHostCount`] for the answer of
/// [`Frontend::config`](crate::Frontend::config); [`KvmError::CountDropped`] for a VM to which
/// [`apply`](super::apply) or something else gave an offset before; [`KvmError::Phase`] and the
/// others about the backend's counter, as [`apply`](super::apply); [`KvmError::El2Guest`];
/// [`KvmError::Register`] for what KVM refused.
pub fn set_counts(vcpu: &impl OneReg, info: &Info) -> Result<BestEffort, KvmError> {
    if info.confirm {
        return Err(KvmError::Confirm);
    }
    in_phase(info, Phase::Paused, "pause it, or wait for its restore")?;
    if info.host_count == 0 {
        return Err(KvmError::NoHostCount);
    }
    counts_as_kvm_does(info)?;
    set_counts_by(&HostCounter::open(Source::Cntvct)?, vcpu, info)
}

pub(super) fn set_counts_by(
    host: &impl Host,
    vcpu: &impl OneReg,
    info: &Info,
) -> Result<BestEffort, KvmError> {
    has_frequency_of(host, info)?;
    refuse_el2(vcpu)?;
    let count = info.host_count.wrapping_sub(info.cntvoff);
    let (aimed, virt) = write(host, vcpu, Register::TimerCnt, |_| count)?;
    let offset = aimed.wrapping_sub(virt.middle().cast_unsigned());
    let phys = match get_if_present(vcpu, Register::PtimerCnt)? {
        Some(_) => {
            let counting = |now: u64| now.wrapping_sub(offset);
            Some(write(host, vcpu, Register::PtimerCnt, counting)?.1)
        }
        None => None,
    };
    Ok(BestEffort {
        offset,
        virt: virt.shifted(virt.middle()),
        phys,
    })
}

/// Writes a count. Returns the offset that it would have made if KVM had taken it at once, and how
/// far the count is ahead of that: never ahead, and behind by the time that KVM took.
fn write(
    host: &impl Host,
    vcpu: &impl OneReg,
    register: Register,
    count_at: impl Fn(u64) -> u64,
) -> Result<(u64, Bracket), KvmError> {
    let before = host.count();
    let count = count_at(before);
    set(vcpu, register, count)?;
    let took = host.count().wrapping_sub(before).cast_signed();
    let aimed = before.wrapping_sub(count);
    let bracket = Bracket::observe(host, aimed, || get(vcpu, register))?;
    // KVM took the count at an instant of the ioctl.
    match bracket.and(Bracket::between(-took, 0)) {
        Some(bracket) => Ok((aimed, bracket)),
        None => Err(KvmError::CountDropped {
            register: register.name(),
            bracket,
        }),
    }
}
