//! A vCPU's timer registers, from KVM and back.

use std::io;

use super::{KvmError, OneReg};
use crate::{RegValue, SavedVcpu};
use vhost_user_timer_protocol::wire::ctl;
use vhost_user_timer_protocol::{Abi, Register, Role, Timeline};

/// Each vCPU's own part of its virtual count, where the guest has EL2.
const CNTVOFF_EL2: (&str, u64) = ("CNTVOFF_EL2", 0x6030_0000_0013_e703);

/// The time of a guest that is a hypervisor (KVM_ARM_VCPU_HAS_EL2; arch/arm64/kvm/sys_regs.c).
const EL2_REGISTERS: [(&str, u64); 5] = [
    CNTVOFF_EL2,
    ("CNTHP_CTL_EL2", 0x6030_0000_0013_e711),
    ("CNTHP_CVAL_EL2", 0x6030_0000_0013_e712),
    ("CNTHV_CTL_EL2", 0x6030_0000_0013_e719),
    ("CNTHV_CVAL_EL2", 0x6030_0000_0013_e71a),
];

/// The timer register of a KVM id; `None` for every other register.
///
/// A VMM that saves and restores all registers of KVM_GET_REG_LIST leaves these out of its loop, on
/// the way back at least, and gives them to [`restore_vcpu`].
pub fn timer_register(id: u64) -> Option<Register> {
    Register::from_id(id, Abi::Arm64).ok()
}

/// Reads a vCPU's timer registers by KVM_GET_ONE_REG. The vCPU must not be in KVM_RUN: the ioctl
/// waits for its end.
///
/// A vCPU without PTIMER registers, as before Linux 6.4, is saved without them.
///
/// # Errors
///
/// [`KvmError::El2Guest`], and [`KvmError::Register`] for what KVM refused.
pub fn save_vcpu(vcpu: &impl OneReg, index: u32) -> Result<SavedVcpu, KvmError> {
    refuse_el2(vcpu)?;
    let mut saved = SavedVcpu::new(index);
    for register in Register::ALL {
        if let Some(value) = get_if_present(vcpu, register)? {
            saved.set(register, value);
        }
    }
    Ok(saved)
}

/// The timer registers among all the registers that a VMM has read of a vCPU, in any order. The
/// other registers are ignored.
///
/// # Errors
///
/// [`KvmError::El2Guest`], and [`KvmError::Saved`] for a register that is given twice.
pub fn timers_among(
    regs: impl IntoIterator<Item = RegValue>,
    index: u32,
) -> Result<SavedVcpu, KvmError> {
    let mut timers = Vec::with_capacity(Register::COUNT);
    for reg in regs {
        if let Some((register, _)) = EL2_REGISTERS.iter().find(|(_, id)| *id == reg.id) {
            return Err(KvmError::El2Guest { register });
        }
        if timer_register(reg.id).is_some() {
            timers.push(reg);
        }
    }
    Ok(SavedVcpu::from_regs(Abi::Arm64, index, &timers)?)
}

/// Writes a vCPU's timers back by KVM_SET_ONE_REG: of each timer CVAL before CTL, so that it is
/// never on with a compare value that is not its own. The counts are not written: they are the
/// VM's, and [`apply`](super::apply) sets them. Of CTL only ENABLE and IMASK are written.
///
/// Registers that are not known are left alone. A physical timer that is off needs no PTIMER
/// registers, which Linux before 6.4 does not have.
///
/// # Errors
///
/// [`KvmError::NoPhysicalTimer`] for a physical timer that is on where KVM has none,
/// [`KvmError::El2Guest`], and [`KvmError::Register`] for what KVM refused.
pub fn restore_vcpu(vcpu: &impl OneReg, saved: &SavedVcpu) -> Result<(), KvmError> {
    refuse_el2(vcpu)?;
    let index = saved.index();
    for timeline in Timeline::ALL {
        let saved = |role| saved.get(Register::of(timeline, role));
        let control = saved(Role::Control).map(|value| value & (ctl::ENABLE | ctl::IMASK));
        let control_of = Register::of(timeline, Role::Control);
        if get_if_present(vcpu, control_of)?.is_none() {
            match control.unwrap_or(0) & ctl::ENABLE {
                0 => continue,
                _ => return Err(KvmError::NoPhysicalTimer { vcpu: index }),
            }
        }
        if let Some(compare) = saved(Role::Compare) {
            set(vcpu, Register::of(timeline, Role::Compare), compare)?;
        }
        if let Some(control) = control {
            set(vcpu, control_of, control)?;
        }
    }
    Ok(())
}

/// Refuses a vCPU that has EL2. Its virtual count is the VM's count less its own CNTVOFF_EL2, which
/// its guest changes at will, and it has four timers; the backend keeps one virtual count of the VM
/// and two timers.
pub(super) fn refuse_el2(vcpu: &impl OneReg) -> Result<(), KvmError> {
    let (register, id) = CNTVOFF_EL2;
    match vcpu.get_one_reg(id) {
        Ok(_) => Err(KvmError::El2Guest { register }),
        Err(error) if is_absent(&error) => Ok(()),
        Err(source) => Err(KvmError::register("read", register, source)),
    }
}

/// A register's value.
pub(super) fn get(vcpu: &impl OneReg, register: Register) -> Result<u64, KvmError> {
    let value = vcpu.get_one_reg(register.id(Abi::Arm64));
    value.map_err(|source| KvmError::register("read", register.name(), source))
}

pub(super) fn set(vcpu: &impl OneReg, register: Register, value: u64) -> Result<(), KvmError> {
    let set = vcpu.set_one_reg(register.id(Abi::Arm64), value);
    set.map_err(|source| KvmError::register("write", register.name(), source))
}

/// A register's value; `None` where KVM gives the vCPU no registers of the physical timer, as
/// before Linux 6.4.
pub(super) fn get_if_present(
    vcpu: &impl OneReg,
    register: Register,
) -> Result<Option<u64>, KvmError> {
    match get(vcpu, register) {
        Ok(value) => Ok(Some(value)),
        Err(KvmError::Register { source, .. })
            if register.timeline() == Timeline::Physical && is_absent(&source) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether KVM's error says that the vCPU has no such register.
fn is_absent(error: &io::Error) -> bool {
    // asm-generic/errno-base.h
    const ENOENT: i32 = 2;
    error.raw_os_error() == Some(ENOENT)
}
