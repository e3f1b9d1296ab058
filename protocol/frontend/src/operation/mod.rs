//! Requests as values: what is asked, and of which type the answer is.
//!
//! [`RequestQueue::perform`](crate::RequestQueue::perform) runs an [`Operation`] and waits;
//! [`submit`](crate::RequestQueue::submit) does not wait. Making one costs nothing.

mod answer;
mod table;

use std::marker::PhantomData;

use zerocopy::{FromBytes, IntoBytes};

use crate::memory::SharedMemory;
use crate::regs::{MAX_REGS, RegIds, RegValue};
use crate::replay::Kind;
use crate::{Error, InvalidArgument, Refusal, SavedVcpu};
use vhost_user_timer_protocol::wire::{
    self, RequestHeader, ResponseHeader, request_flags, restore_flags,
};
use vhost_user_timer_protocol::{MAX_MESSAGE, Op, Status, VM_WIDE, op};

pub(crate) use answer::Rejection;
pub use answer::{Answer, NewEpoch, RawAnswer, Remaining};

/// The bytes of a header, request's and response's alike.
pub(crate) const HEADER: usize = size_of::<RequestHeader>();

const _: () = assert!(HEADER == size_of::<ResponseHeader>());

/// The longest body that is one structure, in bytes.
const STRUCT: usize = 24;

/// A request, not sent yet, that `T` answers.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'a, T> {
    op: Op,
    /// Header flags.
    flags: u16,
    vcpu: u32,
    epoch: u64,
    body: Body<'a>,
    /// Room for the answer's body, in bytes.
    answer: usize,
    answers: PhantomData<fn() -> T>,
}

#[derive(Clone, Copy, Debug)]
enum Body<'a> {
    /// A structure of that many bytes.
    Struct([u8; STRUCT], usize),
    Ids(&'a [u64]),
    Values(&'a [RegValue]),
    Vcpus(&'a [SavedVcpu]),
    Bytes(&'a [u8]),
}

impl Body<'_> {
    const NONE: Self = Body::Struct([0; STRUCT], 0);

    fn structure(body: &(impl IntoBytes + zerocopy::Immutable)) -> Self {
        let body = body.as_bytes();
        let mut bytes = [0; STRUCT];
        bytes[..body.len()].copy_from_slice(body);
        Body::Struct(bytes, body.len())
    }

    fn len(&self) -> usize {
        match self {
            Body::Struct(_, len) => *len,
            Body::Ids(ids) => size_of_val(*ids),
            Body::Values(values) => values.len().saturating_mul(size_of::<wire::RegValue>()),
            Body::Vcpus(vcpus) => vcpus.len().saturating_mul(size_of::<wire::Vcpu>()),
            Body::Bytes(bytes) => bytes.len(),
        }
    }

    fn write(&self, memory: &SharedMemory, offset: usize) {
        match self {
            Body::Struct(bytes, len) => memory.write(offset, &bytes[..*len]),
            Body::Bytes(bytes) => memory.write(offset, bytes),
            Body::Ids(ids) => write_each(memory, offset, ids, |id| id.to_le_bytes()),
            Body::Values(values) => write_each(memory, offset, values, |value| wire::RegValue {
                id: value.id.into(),
                value: value.value.into(),
            }),
            Body::Vcpus(vcpus) => write_each(memory, offset, vcpus, |vcpu| *vcpu.wire()),
        }
    }
}

fn write_each<T, W: IntoBytes + zerocopy::Immutable>(
    memory: &SharedMemory,
    offset: usize,
    items: &[T],
    wire: impl Fn(&T) -> W,
) {
    for (n, item) in items.iter().enumerate() {
        memory.write(offset + n * size_of::<W>(), wire(item).as_bytes());
    }
}

impl<'a, T> Operation<'a, T> {
    fn new(op: Op, vcpu: u32, body: Body<'a>, answer: usize) -> Self {
        Operation {
            op,
            flags: 0,
            vcpu,
            epoch: 0,
            body,
            answer,
            answers: PhantomData,
        }
    }

    /// An operation whose body is one structure, or nothing, and whose answer has a fixed length.
    fn of<O: op::Operation>(vcpu: u32, body: &O::Body) -> Self
    where
        O::Body: Sized,
    {
        Self::many::<O>(vcpu, Body::structure(body), 0)
    }

    /// An operation whose answer has `parts` parts behind its fixed one.
    fn many<O: op::Operation>(vcpu: u32, body: Body<'a>, parts: usize) -> Self {
        debug_assert!(
            O::ROW.body.allows(body.len()),
            "{}: its body's length",
            O::ROW.name
        );
        Self::new(O::ROW.op, vcpu, body, O::ROW.answer.len(parts))
    }

    /// An operation with the header flag DONE.
    fn done<O: op::Operation>(vcpu: u32, body: Body<'a>) -> Self {
        Operation {
            flags: request_flags::DONE,
            ..Self::new(O::ROW.op, vcpu, body, O::ROW.answer_done.len(0))
        }
    }

    /// Means this epoch: in every other one the request is refused with [`Status::Stale`].
    /// Without this, or with 0, it means whatever epoch is current.
    #[must_use]
    pub fn in_epoch(mut self, epoch: u64) -> Self {
        self.epoch = epoch;
        self
    }

    /// Bytes of the request and room for the answer, headers included.
    pub(crate) fn lens(&self) -> Result<(usize, usize), Error> {
        let registers = match self.body {
            Body::Ids(ids) => ids.len(),
            Body::Values(values) => values.len(),
            _ => 0,
        };
        if registers > MAX_REGS {
            return Err(InvalidArgument::Registers(registers).into());
        }
        if self.op == Op::RestoreBegin && self.adds_time_since_1970() {
            return Err(InvalidArgument::ElapsedSince1970.into());
        }
        let request = HEADER.saturating_add(self.body.len());
        let answer = HEADER.saturating_add(self.answer);
        let longer = request.max(answer);
        if longer > MAX_MESSAGE {
            return Err(InvalidArgument::MessageLength(longer).into());
        }
        Ok((request, answer))
    }

    /// Whether this is a typed RESTORE_BEGIN that adds all the time since 1970 to the counts.
    fn adds_time_since_1970(&self) -> bool {
        let Body::Struct(bytes, len) = &self.body else {
            return false;
        };
        let begin = bytes
            .get(..*len)
            .and_then(|bytes| wire::RestoreBegin::ref_from_bytes(bytes).ok());
        begin.is_some_and(|begin| {
            begin.flags.get() & restore_flags::ELAPSED != 0 && begin.saved_realtime_ns.get() == 0
        })
    }

    pub(crate) fn op(&self) -> Op {
        self.op
    }

    /// The epoch in the header.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The vCPU and epoch, if this is a WAIT_RUN.
    pub(crate) fn as_wait_run(&self) -> Option<(u32, u64)> {
        let same =
            self.op == Op::WaitRun && self.body.len() == 0 && self.answer == size_of::<wire::Run>();
        same.then_some((self.vcpu, self.epoch))
    }

    /// Writes the request's bytes.
    pub(crate) fn write(&self, memory: &SharedMemory, offset: usize) {
        let header = RequestHeader {
            op: self.op.code().into(),
            flags: self.flags.into(),
            vcpu: self.vcpu.into(),
            epoch: self.epoch.into(),
        };
        memory.write(offset, header.as_bytes());
        self.body.write(memory, offset + HEADER);
    }

    /// What decides about repeating it.
    pub(crate) fn kind(&self) -> Kind {
        let bytes = match &self.body {
            Body::Struct(bytes, len) => &bytes[..*len],
            Body::Bytes(bytes) => bytes,
            Body::Ids(_) | Body::Values(_) | Body::Vcpus(_) => &[],
        };
        let begin = wire::RestoreBegin::ref_from_bytes(bytes).ok();
        let begin = begin.filter(|_| self.op == Op::RestoreBegin);
        Kind {
            autorun: begin.is_some_and(|begin| begin.flags.get() & restore_flags::AUTORUN != 0),
            done: self.op == Op::RestoreDone || self.flags & request_flags::DONE != 0,
            op: self.op,
        }
    }

    /// What must be known of the operation to judge its answer.
    pub(crate) fn context(&self) -> OperationContext {
        let ids = match self.body {
            Body::Ids(ids) => RegIds::collect(ids.iter().copied()),
            Body::Values(values) => RegIds::collect(values.iter().map(|value| value.id)),
            _ => None,
        };
        OperationContext {
            op: self.op,
            done: self.kind().done,
            vcpu: self.vcpu,
            // `lens` has refused longer lists.
            ids: ids.unwrap_or_default(),
            answer: self.answer,
        }
    }
}

/// What is kept of an operation until its answer comes. The answer is checked against this, and
/// the backend cannot write here.
#[derive(Clone, Copy, Debug)]
pub struct OperationContext {
    pub(crate) op: Op,
    done: bool,
    pub(crate) vcpu: u32,
    ids: RegIds,
    answer: usize,
}

impl OperationContext {
    pub(crate) fn name(&self) -> &'static str {
        self.op.name()
    }

    /// A refusal by this library, in the backend's place.
    pub(crate) fn refused(&self, status: Status, epoch: u64) -> Refusal {
        Refusal {
            op: self.op,
            vcpu: (self.vcpu != VM_WIDE).then_some(self.vcpu),
            status,
            detail: 0,
            epoch,
            register: None,
        }
    }
}
