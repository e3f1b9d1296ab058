//! What the threads ask of the device, and its bytes.

use std::fmt;

use vhost_user_timer_kit::reference::Ask as Typed;
use vhost_user_timer_protocol::wire::{self, configure_flags, ctl, request_flags, restore_flags};
use vhost_user_timer_protocol::{Abi, Op, Register, VM_WIDE};

use super::device::Pair;

/// A virtual timer, as a vCPU has it. It is always enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timer {
    /// Not masked.
    pub armed: bool,
    /// Compare value.
    pub cval: u64,
}

impl Timer {
    /// The level of its line.
    pub fn line(self, count: u64) -> bool {
        self.armed && count >= self.cval
    }

    fn control(self) -> u64 {
        if self.armed {
            ctl::ENABLE
        } else {
            ctl::ENABLE | ctl::IMASK
        }
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ask {
    /// SET_REGS of all that RESTORE_DONE needs.
    Bring {
        /// TIMER_CTL and TIMER_CVAL.
        timer: Timer,
        /// TIMER_CNT.
        count: u64,
        /// With the flag DONE.
        done: bool,
    },
    /// SET_REGS of TIMER_CTL and TIMER_CVAL.
    SetTimer(Timer),
    /// SET_REGS of TIMER_CNT.
    SetCount(u64),
    /// RESTORE_DONE.
    Done,
    /// WAIT_RUN.
    WaitRun,
    /// CONFIGURE_VM.
    Configure {
        /// The VM's vCPUs.
        vcpus: u32,
        /// CONFIRM.
        confirm: bool,
        /// ONE_OFFSET.
        one_offset: bool,
    },
    /// PAUSE.
    Pause {
        /// KEEP_COUNTING.
        keep_counting: bool,
    },
    /// RESUME.
    Resume,
    /// RESTORE_BEGIN.
    Begin {
        /// The VM's vCPUs.
        vcpus: u32,
        /// AUTORUN.
        autorun: bool,
        /// In ticks of a nanosecond; 0 forever.
        timeout: u64,
    },
    /// RESTORE_ABORT.
    Abort,
    /// SET_COUNTER_OFFSET.
    SetOffset(u64),
    /// CONFIRM_RUN.
    Confirm(Pair),
}

/// A request of one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// The vCPU, or [`VM_WIDE`].
    pub vcpu: u32,
    /// The epoch meant, or 0.
    pub epoch: u64,
    /// What is asked.
    pub ask: Ask,
}

impl Request {
    /// A request about the VM as a whole.
    pub fn of_vm(ask: Ask) -> Self {
        Request {
            vcpu: VM_WIDE,
            epoch: 0,
            ask,
        }
    }

    /// A request about one vCPU.
    pub fn of_vcpu(vcpu: u32, epoch: u64, ask: Ask) -> Self {
        Request { vcpu, epoch, ask }
    }

    /// The operation.
    pub fn op(&self) -> Op {
        match self.ask {
            Ask::Bring { .. } | Ask::SetTimer(_) | Ask::SetCount(_) => Op::SetRegs,
            Ask::Done => Op::RestoreDone,
            Ask::WaitRun => Op::WaitRun,
            Ask::Configure { .. } => Op::ConfigureVm,
            Ask::Pause { .. } => Op::Pause,
            Ask::Resume => Op::Resume,
            Ask::Begin { .. } => Op::RestoreBegin,
            Ask::Abort => Op::RestoreAbort,
            Ask::SetOffset(_) => Op::SetCounterOffset,
            Ask::Confirm(_) => Op::ConfirmRun,
        }
    }

    /// The device-readable bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let vcpu = self.vcpu;
        let timer = |timer: Timer| {
            [
                (Register::TimerCtl, timer.control()),
                (Register::TimerCval, timer.cval),
            ]
        };
        let count = |count| (Register::TimerCnt, count);
        let request = match self.ask {
            Ask::Bring {
                timer: brought,
                count: at,
                done,
            } => {
                let [control, compare] = timer(brought);
                let bring = Typed::set_regs(vcpu, &[control, compare, count(at)]);
                let flags = if done { request_flags::DONE } else { 0 };
                Typed { flags, ..bring }
            }
            Ask::SetTimer(written) => Typed::set_regs(vcpu, &timer(written)),
            Ask::SetCount(written) => Typed::set_regs(vcpu, &[count(written)]),
            Ask::Done => Typed::restore_done(vcpu),
            Ask::WaitRun => Typed::wait_run(vcpu),
            Ask::Configure {
                vcpus,
                confirm,
                one_offset,
            } => {
                let flag = |set, flag| if set { flag } else { 0 };
                let body = wire::ConfigureVm {
                    vcpus: vcpus.into(),
                    abi: Abi::Arm64.code(),
                    flags: flag(confirm, configure_flags::CONFIRM)
                        | flag(one_offset, configure_flags::ONE_OFFSET),
                    ..Default::default()
                };
                Typed::new(Op::ConfigureVm, vcpu, &body)
            }
            Ask::Pause { keep_counting } if keep_counting => Typed::pause_counting(),
            Ask::Pause { .. } => Typed::pause(),
            Ask::Resume => Typed::resume(),
            Ask::Begin {
                vcpus,
                autorun,
                timeout,
            } => {
                let flags = if autorun { restore_flags::AUTORUN } else { 0 };
                Typed::begin_with(vcpus, flags, 0, timeout)
            }
            Ask::Abort => Typed::abort(),
            Ask::SetOffset(offset) => Typed::set_offset(offset),
            Ask::Confirm([cntvoff, cntpoff]) => Typed::confirm(cntvoff, cntpoff),
        };
        request.in_epoch(self.epoch).bytes()
    }
}

impl fmt::Display for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mask = if self.armed { "armed" } else { "masked" };
        write!(f, "{mask} CVAL={}", self.cval)
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.op())?;
        if self.vcpu != VM_WIDE {
            write!(f, " of vCPU {}", self.vcpu)?;
        }
        match self.ask {
            Ask::Bring { timer, count, done } => {
                write!(f, ": {timer} CNT={count}")?;
                if done {
                    write!(f, " DONE")?;
                }
            }
            Ask::SetTimer(timer) => write!(f, ": {timer}")?,
            Ask::SetCount(count) => write!(f, ": CNT={count}")?,
            Ask::SetOffset(offset) => write!(f, " {offset}")?,
            Ask::Confirm([cntvoff, cntpoff]) => write!(f, " {cntvoff} {cntpoff}")?,
            Ask::Pause { keep_counting } if keep_counting => write!(f, " KEEP_COUNTING")?,
            Ask::Begin {
                autorun, timeout, ..
            } => {
                if autorun {
                    write!(f, " AUTORUN")?;
                }
                if timeout != 0 {
                    write!(f, " time-out {timeout}")?;
                }
            }
            _ => {}
        }
        if self.epoch != 0 {
            write!(f, " (epoch {})", self.epoch)?;
        }
        Ok(())
    }
}
