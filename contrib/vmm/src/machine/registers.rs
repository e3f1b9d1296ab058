//! A vCPU's registers, by KVM_GET_REG_LIST, and its power state.

use kvm_bindings::{KVM_REG_SIZE_MASK, KVM_REG_SIZE_SHIFT, RegList, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vhost_user_timer_frontend::{Abi, Register};

use super::error::{Context, Error};
use super::vcpu::Vcpu;

/// KVM_REG_ARM_CORE_REG(regs.regs[0]) and KVM_REG_ARM_CORE_REG(regs.pc), as 64-bit registers.
const X0: u64 = 0x6030_0000_0010_0000;
const PC: u64 = 0x6030_0000_0010_0040;

/// The most that kvm-bindings takes.
const MOST_REGISTERS: usize = 500;

/// A vCPU, but for its timer.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct State {
    /// Every register, in the order of KVM_GET_REG_LIST, the timer's included.
    registers: Vec<(u64, Vec<u8>)>,
    mp_state: u32,
}

/// The timer's registers, which the backend keeps.
fn is_of_the_timer(id: u64) -> bool {
    Register::from_id(id, Abi::Arm64).is_ok()
}

pub(crate) fn save(vcpu: &Vcpu) -> Result<State, Error> {
    let registers = list(&vcpu.fd)?
        .into_iter()
        .map(|id| {
            let size = 1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT);
            let mut value = vec![0; size];
            vcpu.fd
                .get_one_reg(id, &mut value)
                .context("KVM_GET_ONE_REG")?;
            Ok((id, value))
        })
        .collect::<Result<_, Error>>()?;
    let mp_state = vcpu.fd.get_mp_state().context("KVM_GET_MP_STATE")?.mp_state;
    Ok(State {
        registers,
        mp_state,
    })
}

/// Loads all registers but the timer's.
pub(crate) fn load(vcpu: &Vcpu, state: &State) -> Result<(), Error> {
    load_some(vcpu, state, |id| !is_of_the_timer(id))
}

/// Loads all registers, the timer's among them, in the order of KVM_GET_REG_LIST: what a VMM does
/// that leaves the counter to KVM.
pub(crate) fn load_with_timer(vcpu: &Vcpu, state: &State) -> Result<(), Error> {
    load_some(vcpu, state, |_| true)
}

fn load_some(vcpu: &Vcpu, state: &State, takes: impl Fn(u64) -> bool) -> Result<(), Error> {
    for (id, value) in &state.registers {
        if takes(*id) {
            vcpu.fd
                .set_one_reg(*id, value)
                .map_err(|error| Error::new(format!("KVM_SET_ONE_REG of {id:#018x}: {error}")))?;
        }
    }
    let mp_state = kvm_mp_state {
        mp_state: state.mp_state,
    };
    vcpu.fd.set_mp_state(mp_state).context("KVM_SET_MP_STATE")
}

/// Where a vCPU begins, with its index in X0.
pub(crate) fn set_entry(vcpu: &Vcpu, address: u64) -> Result<(), Error> {
    for (id, value) in [(X0, vcpu.index.into()), (PC, address)] {
        vcpu.fd
            .set_one_reg(id, &u64::to_le_bytes(value))
            .context("KVM_SET_ONE_REG")?;
    }
    Ok(())
}

fn list(vcpu: &VcpuFd) -> Result<Vec<u64>, Error> {
    let mut list = RegList::new(MOST_REGISTERS).context("make a register list")?;
    vcpu.get_reg_list(&mut list).context("KVM_GET_REG_LIST")?;
    Ok(list.as_slice().to_vec())
}
