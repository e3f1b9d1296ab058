//! Answers: bytes that a backend wrote → values that cannot be wrong in form.

use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::{HEADER, OperationContext};
use crate::answers::{Info, Run, SetRegs, SetRegsDone, Vm};
use crate::error::{ContentFault, Fault};
use crate::regs::{RegIds, RegValue, RegValues};
use crate::{Refusal, SavedVcpu};
use vhost_user_timer_protocol::wire::{self, ResponseHeader};
use vhost_user_timer_protocol::{Op, Status, VERSION};

/// What a request can be answered with: the types of this library that implement it.
pub trait Answer: Parse {}

mod sealed {
    use super::{AnswerError, OperationContext};

    /// An answer with status OK.
    #[derive(Clone, Copy)]
    pub struct Parts<'a> {
        /// The epoch in its header.
        pub(super) epoch: u64,
        pub(super) body: &'a [u8],
        /// The answer was lost: this one says only that the request was carried out.
        pub(super) lost: bool,
    }

    pub trait Parse: Sized {
        fn parse(answer: Parts<'_>, context: &OperationContext) -> Result<Self, AnswerError>;
    }
}

use sealed::{Parse, Parts};

/// Why bytes are no answer.
#[derive(Debug)]
pub enum AnswerError {
    /// Their number.
    Length,
    /// Their content.
    Content(ContentFault),
    /// They are of another version.
    Version(u32),
}

/// An answer other than OK.
pub(crate) enum Rejection {
    Refused(Refusal),
    Version(u32),
    Fault(Fault),
}

/// The longest answer, in bytes, to a request that is known to be carried out.
const LONGEST_DONE: usize = size_of::<wire::SetRegsDone>();

impl OperationContext {
    /// The answer to a request that was carried out on a previous connection.
    pub(crate) fn parse_done<T: Answer>(&self) -> Result<T, Rejection> {
        // OK, and for RESTORE_DONE and DONE that no vCPU is missing.
        let body = match self.op {
            Op::SetRegs if self.done => LONGEST_DONE,
            _ if self.done => size_of::<wire::RestoreDoneResult>(),
            _ => 0,
        };
        self.parse_as(&[0; HEADER + LONGEST_DONE][..HEADER + body], true)
    }

    /// The answer in `bytes`, header included.
    pub(crate) fn parse<T: Answer>(&self, bytes: &[u8]) -> Result<T, Rejection> {
        self.parse_as(bytes, false)
    }

    fn parse_as<T: Answer>(&self, bytes: &[u8], lost: bool) -> Result<T, Rejection> {
        let fault = Fault::AnswerLength {
            op: self.op,
            len: bytes.len(),
        };
        let Ok((header, body)) = ResponseHeader::ref_from_prefix(bytes) else {
            return Err(Rejection::Fault(fault));
        };
        let (status, epoch) = (Status::from(header.status.get()), header.epoch.get());
        if status != Status::Ok {
            let detail = header.detail.get();
            let of_entry = matches!(status, Status::UnknownRegister | Status::Invalid);
            let entry = usize::try_from(detail).ok().filter(|_| of_entry);
            return Err(Rejection::Refused(Refusal {
                detail,
                register: entry.and_then(|entry| self.ids.get(entry).copied()),
                ..self.refused(status, epoch)
            }));
        }
        T::parse(Parts { epoch, body, lost }, self).map_err(|error| match error {
            AnswerError::Length => Rejection::Fault(fault),
            AnswerError::Content(fault) => {
                let op = self.op;
                Rejection::Fault(Fault::AnswerContent { op, fault })
            }
            AnswerError::Version(version) => Rejection::Version(version),
        })
    }
}

fn exactly<T>(body: &[u8]) -> Result<&T, AnswerError>
where
    T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
{
    T::ref_from_bytes(body).map_err(|_| AnswerError::Length)
}

fn empty(body: &[u8]) -> Result<(), AnswerError> {
    body.is_empty().then_some(()).ok_or(AnswerError::Length)
}

impl Answer for () {}

impl Parse for () {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        empty(answer.body)
    }
}

impl Answer for Info {}

impl Parse for Info {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        let info: &wire::Info = exactly(answer.body)?;
        if info.version.get() != VERSION {
            return Err(AnswerError::Version(info.version.get()));
        }
        Info::parse(info).map_err(AnswerError::Content)
    }
}

impl Answer for Run {}

impl Parse for Run {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        Ok(Run::parse(exactly(answer.body)?))
    }
}

impl Answer for SetRegs {}

impl Parse for SetRegs {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        let result: &wire::SetRegsResult = exactly(answer.body)?;
        Ok(SetRegs::parse(result.lines.get(), result.ignored.get()))
    }
}

impl Answer for SetRegsDone {}

impl Parse for SetRegsDone {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        let result: &wire::SetRegsDone = exactly(answer.body)?;
        let set = SetRegs::parse(result.lines.get(), result.ignored.get());
        Ok(SetRegsDone {
            remaining: result.remaining.get(),
            set: (!answer.lost).then_some(set),
        })
    }
}

impl Answer for RegIds {}

impl Parse for RegIds {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        let ids = <[U64]>::ref_from_bytes(answer.body).map_err(|_| AnswerError::Length)?;
        RegIds::collect(ids.iter().map(|id| id.get())).ok_or(AnswerError::Length)
    }
}

impl Answer for RegValues {}

impl Parse for RegValues {
    fn parse(answer: Parts<'_>, context: &OperationContext) -> Result<Self, AnswerError> {
        let values = <[wire::RegValue]>::ref_from_bytes(answer.body);
        let values = values.map_err(|_| AnswerError::Length)?;
        if values.len() != context.ids.len() {
            return Err(AnswerError::Length);
        }
        // A VMM hands these to KVM_SET_ONE_REG: the backend must not get to choose the register.
        let ids = values.iter().map(|value| value.id.get());
        if !ids.eq(context.ids.iter().copied()) {
            return Err(AnswerError::Content(ContentFault::UnaskedRegister));
        }
        let values = values
            .iter()
            .map(|value| RegValue::new(value.id.get(), value.value.get()));
        RegValues::collect(values).ok_or(AnswerError::Length)
    }
}

impl Answer for Vm {}

impl Parse for Vm {
    fn parse(answer: Parts<'_>, context: &OperationContext) -> Result<Self, AnswerError> {
        let body = answer.body;
        let (vm, rest) = wire::Vm::ref_from_prefix(body).map_err(|_| AnswerError::Length)?;
        let vcpus = <[wire::Vcpu]>::ref_from_bytes(rest).map_err(|_| AnswerError::Length)?;
        let count = usize::try_from(vm.count.get()).ok();
        if body.len() != context.answer || count != Some(vcpus.len()) {
            return Err(AnswerError::Length);
        }
        let indices = (0..vm.count.get()).map(|n| vm.first.get().wrapping_add(n));
        if !indices.eq(vcpus.iter().map(|vcpu| vcpu.vcpu.get())) {
            return Err(AnswerError::Content(ContentFault::VcpuOrder));
        }
        Ok(Vm {
            virt_count: vm.virt_count.get(),
            phys_count: vm.phys_count.get(),
            host_count: vm.host_count.get(),
            frequency: vm.frequency.get(),
            vcpus: vcpus.iter().map(SavedVcpu::from_wire).collect(),
        })
    }
}

/// RESTORE_BEGIN's answer: the epoch that it opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewEpoch(pub u64);

impl Answer for NewEpoch {}

impl Parse for NewEpoch {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        empty(answer.body)?;
        Ok(NewEpoch(answer.epoch))
    }
}

/// The answer to RESTORE_DONE, and to SET_VM with DONE: how many vCPUs are still missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining(pub u32);

impl Answer for Remaining {}

impl Parse for Remaining {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        let result: &wire::RestoreDoneResult = exactly(answer.body)?;
        Ok(Remaining(result.remaining.get()))
    }
}

/// The answer to an [`Operation::raw`](super::Operation::raw): its body as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawAnswer(pub Vec<u8>);

impl Answer for RawAnswer {}

impl Parse for RawAnswer {
    fn parse(answer: Parts<'_>, _: &OperationContext) -> Result<Self, AnswerError> {
        Ok(RawAnswer(answer.body.to_vec()))
    }
}
