//! Requests and answers as values.

use vhost_user_timer_frontend::{Error, Operation, RawAnswer, RequestQueue, Ticket};
use vhost_user_timer_protocol::wire::{self, PAUSE_KEEP_COUNTING};
use vhost_user_timer_protocol::{Abi, Op, Register, Status, VM_WIDE};
use zerocopy::{FromBytes, IntoBytes};

use crate::watch::HOST_FREQUENCY;

/// A request.
#[derive(Clone, Debug)]
pub enum Ask {
    GetInfo,
    /// Of an arm64 VM at [`HOST_FREQUENCY`].
    Configure {
        vcpus: u32,
    },
    SetRegs {
        vcpu: u32,
        entries: Vec<(Register, u64)>,
    },
    GetVm {
        vcpus: u32,
    },
    SetVm(Vec<wire::Vcpu>),
    SetCounterOffset(u64),
    SetCounterAnchor {
        monotonic_ns: u64,
        count: u64,
    },
    Pause {
        keep_counting: bool,
    },
    Resume,
    RestoreBegin {
        vcpus: u32,
        flags: u32,
        timeout_ns: u64,
    },
    RestoreDone(u32),
    RestoreAbort,
}

/// What it was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Info(wire::Info),
    SetRegs(wire::SetRegsResult),
    Vm(wire::Vm, Vec<wire::Vcpu>),
    Run(wire::Run),
    Remaining(u32),
    Refused(Status, u32),
}

impl Ask {
    /// Puts it on a queue, without a kick.
    ///
    /// # Errors
    ///
    /// As [`RequestQueue::submit`].
    pub fn submit(&self, queue: &RequestQueue) -> Result<Ticket<RawAnswer>, Error> {
        let vm = |op, body: &[u8], room| queue.submit(&Operation::raw(op, VM_WIDE, body, room));
        let vcpu = |op, vcpu, body: &[u8]| queue.submit(&Operation::raw(op, vcpu, body, 8));
        let run = size_of::<wire::Run>();
        match self {
            Ask::GetInfo => vm(Op::GetInfo, &[], size_of::<wire::Info>()),
            Ask::Configure { vcpus } => {
                let body = wire::ConfigureVm {
                    vcpus: (*vcpus).into(),
                    frequency: HOST_FREQUENCY.into(),
                    ..Default::default()
                };
                vm(Op::ConfigureVm, body.as_bytes(), 0)
            }
            Ask::SetRegs {
                vcpu: index,
                entries,
            } => {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|(register, value)| wire::RegValue {
                        id: register.id(Abi::Arm64).into(),
                        value: (*value).into(),
                    })
                    .collect();
                vcpu(Op::SetRegs, *index, entries.as_bytes())
            }
            Ask::GetVm { vcpus } => {
                let range = wire::VcpuRange {
                    first: 0.into(),
                    count: (*vcpus).into(),
                };
                let room = size_of::<wire::Vm>() + size_of::<wire::Vcpu>() * *vcpus as usize;
                vm(Op::GetVm, range.as_bytes(), room)
            }
            Ask::SetVm(vcpus) => vm(Op::SetVm, vcpus.as_bytes(), 0),
            Ask::SetCounterOffset(offset) => {
                let body = wire::CounterOffset {
                    offset: (*offset).into(),
                    ..Default::default()
                };
                vm(Op::SetCounterOffset, body.as_bytes(), 0)
            }
            Ask::SetCounterAnchor {
                monotonic_ns,
                count,
            } => {
                let body = wire::CounterAnchor {
                    monotonic_ns: (*monotonic_ns).into(),
                    count: (*count).into(),
                };
                vm(Op::SetCounterAnchor, body.as_bytes(), 0)
            }
            Ask::Pause { keep_counting } => {
                let flags = if *keep_counting {
                    PAUSE_KEEP_COUNTING
                } else {
                    0
                };
                let body = wire::Pause {
                    flags: flags.into(),
                    ..Default::default()
                };
                vm(Op::Pause, body.as_bytes(), run)
            }
            Ask::Resume => vm(Op::Resume, &[], run),
            Ask::RestoreBegin {
                vcpus,
                flags,
                timeout_ns,
            } => {
                let body = wire::RestoreBegin {
                    vcpus: (*vcpus).into(),
                    flags: (*flags).into(),
                    timeout_ns: (*timeout_ns).into(),
                    ..Default::default()
                };
                vm(Op::RestoreBegin, body.as_bytes(), 0)
            }
            Ask::RestoreDone(index) => vcpu(Op::RestoreDone, *index, &[]),
            Ask::RestoreAbort => vm(Op::RestoreAbort, &[], 0),
        }
    }

    /// The answer to it in what its ticket gave; `None` where it has none, since the backend is
    /// gone.
    ///
    /// # Errors
    ///
    /// Any other failure.
    pub fn answer(&self, given: Result<RawAnswer, Error>) -> Result<Option<Answer>, Error> {
        let bytes = match given {
            Ok(RawAnswer(bytes)) => bytes,
            Err(Error::Refused(refusal)) => {
                return Ok(Some(Answer::Refused(refusal.status, refusal.detail)));
            }
            Err(Error::Disconnected) => return Ok(None),
            Err(error) => return Err(error),
        };
        let answer = match self {
            Ask::GetInfo => wire::Info::read_from_bytes(&bytes).ok().map(Answer::Info),
            Ask::SetRegs { .. } => wire::SetRegsResult::read_from_bytes(&bytes)
                .ok()
                .map(Answer::SetRegs),
            Ask::GetVm { .. } => wire::Vm::read_from_prefix(&bytes)
                .ok()
                .and_then(|(vm, rest)| {
                    let vcpus = <[wire::Vcpu]>::ref_from_bytes(rest).ok()?;
                    Some(Answer::Vm(vm, vcpus.to_vec()))
                }),
            Ask::Pause { .. } | Ask::Resume => {
                wire::Run::read_from_bytes(&bytes).ok().map(Answer::Run)
            }
            Ask::RestoreDone(_) => wire::RestoreDoneResult::read_from_bytes(&bytes)
                .ok()
                .map(|result| Answer::Remaining(result.remaining.get())),
            Ask::Configure { .. }
            | Ask::SetVm(_)
            | Ask::SetCounterOffset(_)
            | Ask::SetCounterAnchor { .. }
            | Ask::RestoreBegin { .. }
            | Ask::RestoreAbort => bytes.is_empty().then_some(Answer::Done),
        };
        let malformed = Error::InvalidArgument("The answer has another length than it should");
        answer.map(Some).ok_or(malformed)
    }
}
