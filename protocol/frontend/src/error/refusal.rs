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

/// What EBUSY says of the VM's phase. The wire gives the phase, or while RESTORING how many vCPUs
/// are missing, in one number. The operation often tells which of the two it is.
struct Busy(Op, u32);

impl Busy {
    /// Whether the operation can be EBUSY in this phase.
    fn is_possible_in(&self, phase: Phase) -> bool {
        let Some(row) = self.0.row() else {
            return true;
        };
        if !row.phases.contains(phase) {
            return true;
        }
        match self.0 {
            // A VM that is configured otherwise.
            Op::ConfigureVm => phase != Phase::New,
            // A count in RUNNING or ARMED, or a vCPU that is done.
            Op::SetRegs | Op::SetVm => true,
            // No restore has led to ARMED.
            Op::RestoreDone | Op::RestoreAbort => phase == Phase::Armed,
            _ => false,
        }
    }
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Busy(op, detail) = *self;
        let phase = Phase::from_code(detail)
            .filter(|phase| *phase != Phase::Restoring && self.is_possible_in(*phase));
        let restoring = detail != 0 && self.is_possible_in(Phase::Restoring);
        match (phase, restoring) {
            (Some(phase), false) => write!(f, "the VM is {phase}")?,
            (None, true) => write!(f, "the VM is RESTORING, {detail} vCPUs missing")?,
            (Some(phase), true) => write!(
                f,
                "the VM is {phase}, or RESTORING with {detail} vCPUs missing (info tells which)"
            )?,
            (None, false) => write!(f, "detail {detail}")?,
        }
        let Some(row) = op.row() else {
            return Ok(());
        };
        for (n, phase) in Phase::ALL
            .iter()
            .filter(|phase| row.phases.contains(**phase))
            .enumerate()
        {
            let before = if n == 0 { "; it is accepted in " } else { ", " };
            write!(f, "{before}{phase}")?;
        }
        Ok(())
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
            Status::Busy => write!(f, ": {}", Busy(self.op, detail)),
            Status::TooBig => write!(f, ": {detail} bytes needed"),
            Status::TimedOut => write!(f, ": {detail} vCPUs missing (missing_vcpus tells which)"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}
