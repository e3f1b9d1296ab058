//! A request that the backend refused.

use std::fmt;

use vhost_user_timer_protocol::{Abi, Op, Phase, Register, Status};

/// A request that the backend refused. It has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// The operation.
    pub op: Op,
    /// The vCPU it was about; `None` for a VM-wide operation.
    pub vcpu: Option<u32>,
    /// Why.
    pub status: Status,
    /// More about it; the meaning depends on the status.
    pub detail: u32,
    /// The VM's epoch at that time.
    pub epoch: u64,
    /// For GET_REGS and SET_REGS with [`Status::UnknownRegister`] or [`Status::Invalid`]: the
    /// KVM id of the register that was refused.
    pub register: Option<u64>,
}

impl Refusal {
    /// For [`Status::Incomplete`]: the registers that the vCPU still lacks.
    pub fn missing_registers(&self) -> impl Iterator<Item = Register> + use<> {
        let detail = match self.status {
            Status::Incomplete => self.detail,
            _ => 0,
        };
        Register::ALL
            .into_iter()
            .filter(move |register| detail & register.present_bit() != 0)
    }
}

/// The register of an id in either ABI: a refused id may well be the wrong one's.
fn register_of(id: u64) -> Option<Register> {
    [Abi::Arm64, Abi::Arm]
        .into_iter()
        .find_map(|abi| Register::from_id(id, abi).ok())
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.op)?;
        if let Some(vcpu) = self.vcpu {
            write!(f, " of vCPU {vcpu}")?;
        }
        write!(f, " was refused: {}", self.status)?;
        let detail = self.detail;
        match self.status {
            Status::UnknownRegister | Status::Invalid => match self.register {
                Some(id) => {
                    write!(f, ", entry {detail}: ")?;
                    match register_of(id) {
                        Some(register) => write!(f, "{register}"),
                        None => write!(f, "register {id:#018x}"),
                    }
                }
                None if detail != 0 => write!(f, ", entry {detail}"),
                None => Ok(()),
            },
            Status::Incomplete => {
                for (n, register) in self.missing_registers().enumerate() {
                    write!(f, "{}{register}", if n == 0 { ": " } else { ", " })?;
                }
                Ok(())
            }
            Status::Busy => match Phase::from_code(detail) {
                Some(Phase::New) => write!(f, ": {}", Phase::New),
                // The wire gives the phase and a restore's missing vCPUs in one number.
                Some(phase @ (Phase::Paused | Phase::Running)) => {
                    write!(f, ": {phase}, or RESTORING with {detail} vCPUs missing")
                }
                _ => write!(f, ": RESTORING, {detail} vCPUs missing"),
            },
            Status::TooBig => write!(f, ": {detail} bytes needed"),
            Status::TimedOut => write!(f, ": {detail} vCPUs missing (missing_vcpus tells which)"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}
