//! Operation codes (SPEC.md, "Operations").

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// The VM's [`Info`](crate::wire::Info); in any phase.
    GetInfo,
    /// Fixes the VM's vCPUs, ABI and counter frequency: NEW → PAUSED.
    ConfigureVm,
    /// The ids of the vCPU's six timer registers.
    GetRegList,
    /// Reads registers of one vCPU, all at one instant.
    GetRegs,
    /// Writes registers of one vCPU, all together.
    SetRegs,
    /// The whole VM at one instant.
    GetVm,
    /// Stages the registers of many vCPUs in an open restore.
    SetVm,
    /// Sets and pins the VM's counter offset (as KVM_ARM_SET_COUNTER_OFFSET).
    SetCounterOffset,
    /// Says what the VMM's host counter reads.
    SetCounterAnchor,
    /// Stops the VM's time: RUNNING → PAUSED.
    Pause,
    /// Lets the VM's time go on: PAUSED → RUNNING.
    Resume,
    /// Opens a restore, and with it a new epoch: → RESTORING.
    RestoreBegin,
    /// Says that one vCPU has all its timer registers.
    RestoreDone,
    /// Answered when, and only when, the vCPU may run.
    WaitRun,
    /// Gives an open restore up: RESTORING → PAUSED.
    RestoreAbort,
    /// Shares a page through which the count is read without a request.
    SetTimePage,
    /// A code that this version does not know.
    Unknown(u16),
}

/// Whether an operation is about one vCPU or about the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// About the VM: the header's `vcpu` is [`VM_WIDE`](crate::VM_WIDE).
    Vm,
    /// About one vCPU, named by its index.
    Vcpu,
}

/// The length that an operation's request body must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum BodyLen {
    Exactly(usize),
    MultipleOf(usize),
}

impl BodyLen {
    pub(crate) fn allows(self, len: usize) -> bool {
        match self {
            BodyLen::Exactly(want) => len == want,
            BodyLen::MultipleOf(unit) => len.is_multiple_of(unit),
        }
    }
}

macro_rules! ops {
    ($($name:ident = $code:literal, $text:literal, $scope:ident, $len:expr;)*) => {
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

            /// The name, as SPEC.md writes it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Op::$name => $text,)*
                    Op::Unknown(_) => "unknown operation",
                }
            }

            /// What the operation is about; `None` where that is not known.
            pub const fn scope(self) -> Option<Scope> {
                match self {
                    $(Op::$name => Some(Scope::$scope),)*
                    Op::Unknown(_) => None,
                }
            }

            /// The request body's length; `None` where that is not known.
            pub(crate) const fn body_len(self) -> Option<BodyLen> {
                use BodyLen::*;
                match self {
                    $(Op::$name => Some($len),)*
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
    };
}

ops! {
    GetInfo = 0x0001, "GET_INFO", Vm, Exactly(0);
    ConfigureVm = 0x0002, "CONFIGURE_VM", Vm, Exactly(16);
    GetRegList = 0x0010, "GET_REG_LIST", Vcpu, Exactly(0);
    GetRegs = 0x0011, "GET_REGS", Vcpu, MultipleOf(8);
    SetRegs = 0x0012, "SET_REGS", Vcpu, MultipleOf(16);
    GetVm = 0x0020, "GET_VM", Vm, Exactly(8);
    SetVm = 0x0021, "SET_VM", Vm, MultipleOf(56);
    SetCounterOffset = 0x0022, "SET_COUNTER_OFFSET", Vm, Exactly(16);
    SetCounterAnchor = 0x0023, "SET_COUNTER_ANCHOR", Vm, Exactly(16);
    Pause = 0x0030, "PAUSE", Vm, Exactly(8);
    Resume = 0x0031, "RESUME", Vm, Exactly(0);
    RestoreBegin = 0x0040, "RESTORE_BEGIN", Vm, Exactly(24);
    RestoreDone = 0x0041, "RESTORE_DONE", Vcpu, Exactly(0);
    WaitRun = 0x0042, "WAIT_RUN", Vcpu, Exactly(0);
    RestoreAbort = 0x0043, "RESTORE_ABORT", Vm, Exactly(0);
    SetTimePage = 0x0050, "SET_TIME_PAGE", Vm, Exactly(16);
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
        assert_eq!(Op::ALL.len(), 16);
        assert!(Op::ALL.iter().all(|op| Op::from(op.code()) == *op));
        assert_eq!(Op::from(0x0003), Op::Unknown(0x0003));
    }
}
