//! The operations, each a row of one table (SPEC.md, "Operations").
//!
//! Everything that is known of an operation beforehand is in its row: its code and name, what it is
//! about, what its request and its answer carry, in which phases it is accepted, which header flags
//! it takes, and what it may change. From the table come [`Op`], [`Body`] and
//! its parsing, the phase check of the VM, the typed calls of the frontend, and what both ends may
//! do in any order or again.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::Status;
use crate::payload::{Payload, Shape};
use crate::phase::{Phase, Phases};
use crate::wire::{
    ConfigureVm, ConfirmRun, CounterAnchor, CounterOffset, Info, Pause, RegValue, RestoreBegin,
    RestoreDoneResult, Run, SetRegsDone, SetRegsResult, TimePage, Vcpu, VcpuRange, Vm,
    request_flags,
};

use Phase::{Armed, Paused, Restoring, Running};

/// Whether an operation is about one vCPU or about the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// About the VM: the header's `vcpu` is [`VM_WIDE`](crate::VM_WIDE).
    Vm,
    /// About one vCPU, named by its index.
    Vcpu,
}

/// The most that an operation can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Nothing. It can be repeated, and reordered with its like.
    Reads,
    /// What belongs to the connection, and nothing of the VM.
    Connection,
    /// The VM.
    Changes,
    /// The VM, and it may freeze a running clock.
    Freezes,
}

impl Effect {
    /// Whether the operation can change anything at all.
    pub const fn changes_anything(self) -> bool {
        !matches!(self, Effect::Reads)
    }

    /// Whether the operation can change the VM.
    pub const fn changes_vm(self) -> bool {
        matches!(self, Effect::Changes | Effect::Freezes)
    }
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Row {
    /// The operation.
    pub op: Op,
    /// The name, as SPEC.md writes it.
    pub name: &'static str,
    /// What the operation is about.
    pub scope: Scope,
    /// How long the request's body can be.
    pub body: Shape,
    /// How long the answer's body can be.
    pub answer: Shape,
    /// How long the answer's body can be if the request has the flag
    /// [`DONE`](request_flags::DONE).
    pub answer_done: Shape,
    /// The phases in which the operation is accepted. Some operations check more: SPEC.md says
    /// which.
    pub phases: Phases,
    /// The header flags that the operation takes.
    pub flags: u16,
    /// What the operation may change.
    pub effect: Effect,
}

/// An operation as a type: the types of its request's body and its answer.
pub trait Operation {
    /// The operation's row.
    const ROW: Row;
    /// The request's body.
    type Body: Payload + IntoBytes + Immutable + ?Sized;
    /// The answer's body.
    type Answer: Payload + ?Sized;
    /// The answer's body if the request has the flag [`DONE`](request_flags::DONE); the same as
    /// [`Answer`](Self::Answer) where the operation does not take the flag.
    type AnswerDone: Payload + ?Sized;
}

impl Row {
    /// How long the body of the answer can be, to a request with these header flags.
    pub const fn answer_to(&self, flags: u16) -> Shape {
        match flags & request_flags::DONE {
            0 => self.answer,
            _ => self.answer_done,
        }
    }
}

/// The second type, or the first where there is none.
macro_rules! or {
    ($or:ty,) => {
        $or
    };
    ($or:ty, $ty:ty) => {
        $ty
    };
}

/// The header flags of an operation: DONE, where an answer's type for it is given.
macro_rules! flags {
    () => {
        0
    };
    ($done:ty) => {
        request_flags::DONE
    };
}

macro_rules! operations {
    ($(
        $(#[$doc:meta])*
        $name:ident $(($body:ty))? = $code:literal, $text:literal,
        $scope:ident, $answer:ty $(| $done:ty)?, $phases:expr, $effect:ident;
    )*) => {
        /// What a request asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Op {
            $($(#[$doc])* $name,)*
            /// A code that this version does not know.
            Unknown(u16),
        }

        /// Each operation as a type.
        pub mod operation {
            $($(#[$doc])* #[derive(Clone, Copy, Debug)] pub enum $name {})*
        }

        $(impl Operation for operation::$name {
            const ROW: Row = Row {
                op: Op::$name,
                name: $text,
                scope: Scope::$scope,
                body: <Self::Body as Payload>::SHAPE,
                answer: <Self::Answer as Payload>::SHAPE,
                answer_done: <Self::AnswerDone as Payload>::SHAPE,
                phases: $phases,
                flags: flags!($($done)?),
                effect: Effect::$effect,
            };
            type Body = or!((), $($body)?);
            type Answer = $answer;
            type AnswerDone = or!($answer, $($done)?);
        })*

        impl Op {
            /// Every operation of this version, in code order.
            pub const ALL: &[Op] = &[$(Op::$name),*];

            /// The code on the wire.
            pub const fn code(self) -> u16 {
                match self {
                    $(Op::$name => $code,)*
                    Op::Unknown(code) => code,
                }
            }

            /// The operation's row; `None` where this version does not know the operation.
            pub const fn row(self) -> Option<&'static Row> {
                match self {
                    $(Op::$name => Some(&<operation::$name as Operation>::ROW),)*
                    Op::Unknown(_) => None,
                }
            }
        }

        impl From<u16> for Op {
            fn from(code: u16) -> Self {
                match code {
                    $($code => Op::$name,)*
                    _ => Op::Unknown(code),
                }
            }
        }

        /// What a request carries.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Body<'a> {
            $($(#[$doc])* $name $((&'a $body))?,)*
        }

        impl<'a> Body<'a> {
            /// The row of its operation.
            pub const fn row(&self) -> &'static Row {
                match self {
                    $(Body::$name { .. } => &<operation::$name as Operation>::ROW,)*
                }
            }

            /// The body of a request of `op`, which has a length that the operation allows.
            pub(crate) fn parse(op: Op, bytes: &'a [u8]) -> Result<Self, Status> {
                match op {
                    $(Op::$name => Ok(Body::$name $((read::<$body>(bytes)?))?),)*
                    Op::Unknown(_) => Err(Status::Unsupported),
                }
            }
        }
    };
}

fn read<T>(bytes: &[u8]) -> Result<&T, Status>
where
    T: Payload + FromBytes + KnownLayout + Immutable + Unaligned + ?Sized,
{
    let body = T::ref_from_bytes(bytes).map_err(|_| Status::Malformed)?;
    match body.reserved_is_zero() {
        true => Ok(body),
        false => Err(Status::Invalid),
    }
}

// Name (body) = code, name in SPEC.md, scope, answer | answer to a request with DONE where the
// operation takes that flag, phases, effect.
operations! {
    /// The VM in brief.
    GetInfo = 0x0001, "GET_INFO",
        Vm, Info, Phases::ANY, Reads;
    /// Fixes the VM's vCPUs, ABI and counter frequency: NEW → PAUSED.
    ConfigureVm(ConfigureVm) = 0x0002, "CONFIGURE_VM",
        Vm, (), Phases::ANY, Changes;
    /// The ids of the vCPU's timer registers.
    GetRegList = 0x0010, "GET_REG_LIST",
        Vcpu, [U64], Phases::NOT_NEW, Reads;
    /// Reads registers of one vCPU, all at one instant.
    GetRegs([U64]) = 0x0011, "GET_REGS",
        Vcpu, [RegValue], Phases::NOT_NEW, Reads;
    /// Writes registers of one vCPU, all together.
    SetRegs([RegValue]) = 0x0012, "SET_REGS",
        Vcpu, SetRegsResult | SetRegsDone, Phases::NOT_NEW, Changes;
    /// The whole VM at one instant.
    GetVm(VcpuRange) = 0x0020, "GET_VM",
        Vm, (Vm, [Vcpu]), Phases::NOT_NEW, Reads;
    /// Stages the registers of many vCPUs in an open restore.
    SetVm([Vcpu]) = 0x0021, "SET_VM",
        Vm, () | RestoreDoneResult, Phases::of(&[Restoring, Armed]), Changes;
    /// Sets and pins the VM's counter offset (as KVM_ARM_SET_COUNTER_OFFSET).
    SetCounterOffset(CounterOffset) = 0x0022, "SET_COUNTER_OFFSET",
        Vm, (), Phases::of(&[Paused, Restoring]), Changes;
    /// Says what the VMM's host counter reads.
    SetCounterAnchor(CounterAnchor) = 0x0023, "SET_COUNTER_ANCHOR",
        Vm, (), Phases::of(&[Paused]), Changes;
    /// Stops the VM's time: RUNNING or ARMED → PAUSED.
    Pause(Pause) = 0x0030, "PAUSE",
        Vm, Run, Phases::of(&[Paused, Running, Armed]), Freezes;
    /// Lets the VM's time go on: PAUSED → RUNNING, or ARMED in a VM that confirms.
    Resume = 0x0031, "RESUME",
        Vm, Run, Phases::of(&[Paused, Running, Armed]), Changes;
    /// Opens a restore, and with it a new epoch: → RESTORING.
    RestoreBegin(RestoreBegin) = 0x0040, "RESTORE_BEGIN",
        Vm, (), Phases::of(&[Paused, Restoring, Armed]), Freezes;
    /// Says that one vCPU has all its timer registers.
    RestoreDone = 0x0041, "RESTORE_DONE",
        Vcpu, RestoreDoneResult, Phases::of(&[Restoring, Armed]), Changes;
    /// Answered when, and only when, the vCPU may run.
    WaitRun = 0x0042, "WAIT_RUN",
        Vcpu, Run, Phases::NOT_NEW, Reads;
    /// Gives a restore up: RESTORING or ARMED → PAUSED.
    RestoreAbort = 0x0043, "RESTORE_ABORT",
        Vm, (), Phases::of(&[Restoring, Armed]), Changes;
    /// Confirms that the VM's offsets are where the guest's counter is made: ARMED → RUNNING.
    ConfirmRun(ConfirmRun) = 0x0044, "CONFIRM_RUN",
        Vm, Run, Phases::of(&[Armed, Running]), Changes;
    /// Shares a page through which the count is read without a request.
    SetTimePage(TimePage) = 0x0050, "SET_TIME_PAGE",
        Vm, (), Phases::ANY, Connection;
}

impl Op {
    /// The name, as SPEC.md writes it.
    pub const fn name(self) -> &'static str {
        match self.row() {
            Some(row) => row.name,
            None => "unknown operation",
        }
    }
}

impl core::fmt::Display for Op {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Op::Unknown(code) => write!(f, "unknown operation {code:#06x}"),
            op => f.write_str(op.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_its_own_operation_and_the_rest_are_unknown() {
        for code in 0..=u16::MAX {
            assert_eq!(Op::from(code).code(), code);
        }
        assert_eq!(Op::ALL.len(), 17);
        assert!(Op::ALL.iter().all(|op| Op::from(op.code()) == *op));
        assert_eq!(Op::from(0x0003), Op::Unknown(0x0003));
    }

    #[test]
    fn every_operation_finds_its_own_row() {
        for &op in Op::ALL {
            assert_eq!(op.row().map(|row| row.op), Some(op));
        }
        assert_eq!(Op::Unknown(7).row(), None);
    }
}
