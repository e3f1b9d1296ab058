//! Requests as values: what is asked, and of which type the answer is.
//!
//! A [`Operation`] is run by [`RequestQueue::call`](super::RequestQueue::call), which waits, or by
//! [`submit`](super::RequestQueue::submit), which does not. Making one costs nothing.

use std::marker::PhantomData;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

use super::error::Fault;
use super::memory::SharedMemory;
use super::types::{Info, List, RegIds, RegValues, RestoreOptions, Run, SetRegs, Vm};
use super::{Error, Refusal};
use vhost_user_timer_protocol::wire::{self, RequestHeader, ResponseHeader, restore_flags};
use vhost_user_timer_protocol::{Abi, MAX_MESSAGE, Op, Status, VERSION, VM_WIDE};

/// The most registers of one GET_REGS or SET_REGS. A vCPU has six.
pub const MAX_REGS: usize = 16;

/// The bytes of a header, request's and response's alike.
pub(super) const HEADER: usize = size_of::<RequestHeader>();

const _: () = assert!(HEADER == size_of::<ResponseHeader>());

/// A request, not sent yet, that `T` answers.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'a, T> {
    op: Op,
    vcpu: u32,
    epoch: u64,
    body: Body<'a>,
    /// Room for the answer's body.
    answer: usize,
    answers: PhantomData<fn() -> T>,
}

#[derive(Clone, Copy, Debug)]
enum Body<'a> {
    /// A structure of at most 24 bytes.
    Struct([u8; 24], usize),
    Ids(&'a [u64]),
    Values(&'a [(u64, u64)]),
    Bytes(&'a [u8]),
}

impl Body<'_> {
    fn len(&self) -> usize {
        match self {
            Body::Struct(_, len) => *len,
            Body::Ids(ids) => size_of_val(*ids),
            Body::Values(values) => values.len().saturating_mul(size_of::<wire::RegValue>()),
            Body::Bytes(bytes) => bytes.len(),
        }
    }
}

impl<'a, T> Operation<'a, T> {
    fn new(op: Op, vcpu: u32, body: Body<'a>, answer: usize) -> Self {
        Operation {
            op,
            vcpu,
            epoch: 0,
            body,
            answer,
            answers: PhantomData,
        }
    }

    fn with_struct(op: Op, vcpu: u32, body: &[u8], answer: usize) -> Self {
        let mut bytes = [0; 24];
        bytes[..body.len()].copy_from_slice(body);
        Self::new(op, vcpu, Body::Struct(bytes, body.len()), answer)
    }

    /// Means this epoch, and is refused with [`Status::Stale`] in every other one. Without
    /// this, or with 0, the call means whatever is current.
    #[must_use]
    pub fn in_epoch(mut self, epoch: u64) -> Self {
        self.epoch = epoch;
        self
    }

    /// Bytes of the request and room for the answer, headers included.
    pub(super) fn lens(&self) -> Result<(usize, usize), Error> {
        let too_many = match self.body {
            Body::Ids(ids) => ids.len() > MAX_REGS,
            Body::Values(values) => values.len() > MAX_REGS,
            _ => false,
        };
        if too_many {
            return Err(Error::InvalidArgument(
                "A request takes at most 16 registers",
            ));
        }
        let request = HEADER.saturating_add(self.body.len());
        let answer = HEADER.saturating_add(self.answer);
        if request.max(answer) > MAX_MESSAGE {
            return Err(Error::InvalidArgument("A message takes at most 256 KiB"));
        }
        Ok((request, answer))
    }

    pub(super) fn op(&self) -> Op {
        self.op
    }

    /// The epoch in the header.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The vCPU and epoch, if this is a WAIT_RUN.
    pub(super) fn as_wait_run(&self) -> Option<(u32, u64)> {
        let same =
            self.op == Op::WaitRun && self.body.len() == 0 && self.answer == size_of::<wire::Run>();
        same.then_some((self.vcpu, self.epoch))
    }

    /// Writes the request's bytes.
    pub(super) fn write(&self, memory: &SharedMemory, offset: usize) {
        let header = RequestHeader {
            op: self.op.code().into(),
            flags: 0.into(),
            vcpu: self.vcpu.into(),
            epoch: self.epoch.into(),
        };
        memory.write(offset, header.as_bytes());
        let offset = offset + HEADER;
        match self.body {
            Body::Struct(bytes, len) => memory.write(offset, &bytes[..len]),
            Body::Bytes(bytes) => memory.write(offset, bytes),
            Body::Ids(ids) => {
                for (n, id) in ids.iter().enumerate() {
                    memory.write(offset + 8 * n, &id.to_le_bytes());
                }
            }
            Body::Values(values) => {
                for (n, (id, value)) in values.iter().enumerate() {
                    memory.write(offset + 16 * n, &id.to_le_bytes());
                    memory.write(offset + 16 * n + 8, &value.to_le_bytes());
                }
            }
        }
    }

    /// What must be known of the call to judge its answer.
    pub(super) fn context(&self) -> OperationContext {
        let ids = match self.body {
            Body::Ids(ids) => List::collect(ids.iter().copied()),
            Body::Values(values) => List::collect(values.iter().map(|(id, _)| *id)),
            _ => None,
        };
        OperationContext {
            op: self.op,
            vcpu: self.vcpu,
            // `lens` has refused longer lists.
            ids: ids.unwrap_or_default(),
            answer: self.answer,
        }
    }
}

/// What is kept of a call until its answer comes. Being private memory, it is what the answer
/// is checked with.
#[derive(Clone, Copy, Debug)]
pub struct OperationContext {
    pub(super) op: Op,
    pub(super) vcpu: u32,
    ids: RegIds,
    answer: usize,
}

impl OperationContext {
    pub(super) fn name(&self) -> &'static str {
        self.op.name()
    }

    /// A refusal that is not the backend's.
    pub(super) fn refused(&self, status: Status, epoch: u64) -> Refusal {
        Refusal {
            op: self.op,
            vcpu: (self.vcpu != VM_WIDE).then_some(self.vcpu),
            status,
            detail: 0,
            epoch,
            register: None,
        }
    }

    /// The answer that a request gets that was done before.
    pub(super) fn parse_done<T: Answer>(&self) -> Result<T, Rejection> {
        // OK, and for RESTORE_DONE that no vCPU is missing.
        let body = match self.op {
            Op::RestoreDone => size_of::<wire::RestoreDoneResult>(),
            _ => 0,
        };
        self.parse(&[0; HEADER + size_of::<wire::RestoreDoneResult>()][..HEADER + body])
    }

    /// The answer in `bytes`, header included.
    pub(super) fn parse<T: Answer>(&self, bytes: &[u8]) -> Result<T, Rejection> {
        let fault = Fault::AnswerLength {
            op: self.op,
            len: bytes.len(),
        };
        let Ok((header, body)) = ResponseHeader::ref_from_prefix(bytes) else {
            return Err(Rejection::Fault(fault));
        };
        let (status, detail) = (Status::from(header.status.get()), header.detail.get());
        if status != Status::Ok {
            let about_entry = matches!(status, Status::UnknownRegister | Status::Invalid);
            return Err(Rejection::Refused(Refusal {
                op: self.op,
                vcpu: (self.vcpu != VM_WIDE).then_some(self.vcpu),
                status,
                detail,
                epoch: header.epoch.get(),
                register: usize::try_from(detail)
                    .ok()
                    .and_then(|entry| self.ids.get(entry).copied())
                    .filter(|_| about_entry),
            }));
        }
        T::parse(body, self).map_err(|bad| match bad {
            AnswerError::Length => Rejection::Fault(fault),
            AnswerError::Content(what) => {
                Rejection::Fault(Fault::AnswerContent { op: self.op, what })
            }
            AnswerError::Version(version) => Rejection::Version(version),
        })
    }
}

/// An answer that is not what was hoped for.
pub(super) enum Rejection {
    Refused(Refusal),
    Version(u32),
    Fault(Fault),
}

/// Why bytes are no answer.
#[derive(Debug)]
pub enum AnswerError {
    /// Their number.
    Length,
    /// Their content.
    Content(&'static str),
    /// They are of another version.
    Version(u32),
}

/// What a request can be answered with. This library implements it; others need not.
pub trait Answer: Sized {
    #[doc(hidden)]
    fn parse(body: &[u8], context: &OperationContext) -> Result<Self, AnswerError>;
}

fn exactly<T>(body: &[u8]) -> Result<&T, AnswerError>
where
    T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
{
    T::ref_from_bytes(body).map_err(|_| AnswerError::Length)
}

impl Answer for () {
    fn parse(body: &[u8], _: &OperationContext) -> Result<Self, AnswerError> {
        body.is_empty().then_some(()).ok_or(AnswerError::Length)
    }
}

impl Answer for Info {
    fn parse(body: &[u8], _: &OperationContext) -> Result<Self, AnswerError> {
        let info: &wire::Info = exactly(body)?;
        if info.version.get() != VERSION {
            return Err(AnswerError::Version(info.version.get()));
        }
        Info::parse(info).map_err(AnswerError::Content)
    }
}

impl Answer for Run {
    fn parse(body: &[u8], _: &OperationContext) -> Result<Self, AnswerError> {
        Ok(exactly::<wire::Run>(body)?.into())
    }
}

impl Answer for SetRegs {
    fn parse(body: &[u8], _: &OperationContext) -> Result<Self, AnswerError> {
        let result: &wire::SetRegsResult = exactly(body)?;
        let lines = result.lines.get();
        Ok(SetRegs {
            virtual_line: lines & wire::LINE_VIRTUAL != 0,
            physical_line: lines & wire::LINE_PHYSICAL != 0,
            ignored: result.ignored.get(),
        })
    }
}

impl Answer for RegIds {
    fn parse(body: &[u8], _: &OperationContext) -> Result<Self, AnswerError> {
        let ids = <[U64]>::ref_from_bytes(body).map_err(|_| AnswerError::Length)?;
        List::collect(ids.iter().map(|id| id.get())).ok_or(AnswerError::Length)
    }
}

impl Answer for RegValues {
    fn parse(body: &[u8], context: &OperationContext) -> Result<Self, AnswerError> {
        let values = <[wire::RegValue]>::ref_from_bytes(body).map_err(|_| AnswerError::Length)?;
        if values.len() != context.ids.len() {
            return Err(AnswerError::Length);
        }
        // A VMM hands these to KVM_SET_ONE_REG: the backend must not get to choose the register.
        if !values
            .iter()
            .map(|v| v.id.get())
            .eq(context.ids.iter().copied())
        {
            return Err(AnswerError::Content("a register that was not asked for"));
        }
        List::collect(values.iter().map(|v| (v.id.get(), v.value.get()))).ok_or(AnswerError::Length)
    }
}

impl Answer for Vm {
    fn parse(body: &[u8], context: &OperationContext) -> Result<Self, AnswerError> {
        let (vm, rest) = wire::Vm::ref_from_prefix(body).map_err(|_| AnswerError::Length)?;
        let vcpus = <[wire::Vcpu]>::ref_from_bytes(rest).map_err(|_| AnswerError::Length)?;
        let count = usize::try_from(vm.count.get()).ok();
        if body.len() != context.answer || count != Some(vcpus.len()) {
            return Err(AnswerError::Length);
        }
        let indices = (0..vm.count.get()).map(|n| vm.first.get().wrapping_add(n));
        if !indices.eq(vcpus.iter().map(|vcpu| vcpu.vcpu.get())) {
            return Err(AnswerError::Content("vCPUs out of order"));
        }
        Ok(Vm {
            virt_count: vm.virt_count.get(),
            phys_count: vm.phys_count.get(),
            host_count: vm.host_count.get(),
            frequency: vm.frequency.get(),
            vcpus: vcpus.to_vec(),
        })
    }
}

/// RESTORE_DONE's answer: how many vCPUs are still missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining(pub u32);

impl Answer for Remaining {
    fn parse(body: &[u8], _: &OperationContext) -> Result<Self, AnswerError> {
        let result: &wire::RestoreDoneResult = exactly(body)?;
        Ok(Remaining(result.remaining.get()))
    }
}

/// The answer to a [`Operation::raw`]: its body as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawAnswer(pub Vec<u8>);

impl Answer for RawAnswer {
    fn parse(body: &[u8], _: &OperationContext) -> Result<Self, AnswerError> {
        Ok(RawAnswer(body.to_vec()))
    }
}

impl Operation<'static, Info> {
    /// GET_INFO: the VM; in any phase.
    pub fn get_info() -> Self {
        let answer = size_of::<wire::Info>();
        Operation::with_struct(Op::GetInfo, VM_WIDE, &[], answer)
    }
}

impl Operation<'static, ()> {
    /// CONFIGURE_VM: fixes the VM's vCPUs (1 to [`Info::max_vcpus`]), ABI and counter frequency
    /// in Hz (0: the backend's). NEW → PAUSED; the same values again are taken in every phase.
    pub fn configure(vcpus: u32, abi: Abi, frequency: u64) -> Self {
        let body = wire::ConfigureVm {
            vcpus: vcpus.into(),
            abi: abi.code(),
            reserved: [0; 3],
            frequency: frequency.into(),
        };
        Operation::with_struct(Op::ConfigureVm, VM_WIDE, body.as_bytes(), 0)
    }

    /// SET_COUNTER_OFFSET: sets and pins cntvoff = cntpoff = `offset` (as
    /// KVM_ARM_SET_COUNTER_OFFSET). In PAUSED and RESTORING.
    pub fn set_counter_offset(offset: u64) -> Self {
        let body = wire::CounterOffset {
            offset: offset.into(),
            reserved: 0.into(),
        };
        Operation::with_struct(Op::SetCounterOffset, VM_WIDE, body.as_bytes(), 0)
    }

    /// SET_COUNTER_ANCHOR: the VMM's host counter read `count` when CLOCK_MONOTONIC read
    /// `monotonic_ns`. In PAUSED.
    pub fn set_counter_anchor(monotonic_ns: u64, count: u64) -> Self {
        let body = wire::CounterAnchor {
            monotonic_ns: monotonic_ns.into(),
            count: count.into(),
        };
        Operation::with_struct(Op::SetCounterAnchor, VM_WIDE, body.as_bytes(), 0)
    }

    /// RESTORE_BEGIN: opens a restore of all `vcpus` vCPUs, and with it a new epoch. In PAUSED
    /// and RESTORING.
    pub fn restore_begin(vcpus: u32, options: RestoreOptions) -> Self {
        let flag = |set: bool, bit| if set { bit } else { 0 };
        let flags = flag(options.autorun, restore_flags::AUTORUN)
            | flag(options.strict, restore_flags::STRICT)
            | flag(options.elapsed_since.is_some(), restore_flags::ELAPSED);
        let timeout_ns = options.timeout.map_or(0, |timeout| {
            // 0 on the wire means never.
            u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX).max(1)
        });
        let body = wire::RestoreBegin {
            vcpus: vcpus.into(),
            flags: flags.into(),
            saved_realtime_ns: options.elapsed_since.unwrap_or(0).into(),
            timeout_ns: timeout_ns.into(),
        };
        Operation::with_struct(Op::RestoreBegin, VM_WIDE, body.as_bytes(), 0)
    }

    /// RESTORE_ABORT: gives the open restore up; the VM is PAUSED as it was before it.
    pub fn restore_abort() -> Self {
        Operation::with_struct(Op::RestoreAbort, VM_WIDE, &[], 0)
    }

    /// SET_TIME_PAGE: an address in the memory shared on this connection, and its length (0:
    /// stop). See [`TimePage`](super::TimePage), which knows the address.
    pub fn set_time_page(address: u64, length: u64) -> Self {
        let body = wire::TimePage {
            address: address.into(),
            length: length.into(),
        };
        Operation::with_struct(Op::SetTimePage, VM_WIDE, body.as_bytes(), 0)
    }
}

impl<'a> Operation<'a, ()> {
    /// SET_VM: stages the registers of many vCPUs in an open restore. In RESTORING.
    pub fn set_vm(vcpus: &'a [wire::Vcpu]) -> Self {
        Operation::new(Op::SetVm, VM_WIDE, Body::Bytes(vcpus.as_bytes()), 0)
    }
}

impl Operation<'static, RegIds> {
    /// GET_REG_LIST: the KVM ids of the vCPU's timer registers. Not in NEW.
    pub fn reg_list(vcpu: u32) -> Self {
        Operation::with_struct(Op::GetRegList, vcpu, &[], 8 * MAX_REGS)
    }
}

impl<'a> Operation<'a, RegValues> {
    /// GET_REGS: reads up to [`MAX_REGS`] registers by their KVM ids, all at one instant. Not in
    /// NEW.
    pub fn get_regs(vcpu: u32, ids: &'a [u64]) -> Self {
        let answer = ids.len().saturating_mul(size_of::<wire::RegValue>());
        Operation::new(Op::GetRegs, vcpu, Body::Ids(ids), answer)
    }
}

impl<'a> Operation<'a, SetRegs> {
    /// SET_REGS: writes up to [`MAX_REGS`] registers, given as KVM id and value, all together:
    /// their order does not matter. Not in NEW; counts in PAUSED and RESTORING only.
    pub fn set_regs(vcpu: u32, values: &'a [(u64, u64)]) -> Self {
        let answer = size_of::<wire::SetRegsResult>();
        Operation::new(Op::SetRegs, vcpu, Body::Values(values), answer)
    }
}

impl Operation<'static, Vm> {
    /// GET_VM: `count` vCPUs from `first` on, all at one instant. Not in NEW.
    pub fn get_vm(first: u32, count: u32) -> Self {
        let body = wire::VcpuRange {
            first: first.into(),
            count: count.into(),
        };
        let vcpus = usize::try_from(count).unwrap_or(usize::MAX);
        let answer = vcpus
            .saturating_mul(size_of::<wire::Vcpu>())
            .saturating_add(size_of::<wire::Vm>());
        Operation::with_struct(Op::GetVm, VM_WIDE, body.as_bytes(), answer)
    }
}

impl Operation<'static, Run> {
    /// PAUSE: stops the VM's time, or with `keep_counting` only the VM. RUNNING → PAUSED; in
    /// PAUSED it changes nothing.
    pub fn pause(keep_counting: bool) -> Self {
        let flags = if keep_counting {
            wire::PAUSE_KEEP_COUNTING
        } else {
            0
        };
        let body = wire::Pause {
            flags: flags.into(),
            reserved: 0.into(),
        };
        let answer = size_of::<wire::Run>();
        Operation::with_struct(Op::Pause, VM_WIDE, body.as_bytes(), answer)
    }

    /// RESUME: lets the VM's time go on. PAUSED → RUNNING; in RUNNING it changes nothing.
    pub fn resume() -> Self {
        Operation::with_struct(Op::Resume, VM_WIDE, &[], size_of::<wire::Run>())
    }

    /// WAIT_RUN: answered when, and only when, the vCPU may run. Not in NEW.
    pub fn wait_run(vcpu: u32) -> Self {
        Operation::with_struct(Op::WaitRun, vcpu, &[], size_of::<wire::Run>())
    }
}

impl Operation<'static, Remaining> {
    /// RESTORE_DONE: the vCPU has all its timer registers. In RESTORING.
    pub fn restore_done(vcpu: u32) -> Self {
        let answer = size_of::<wire::RestoreDoneResult>();
        Operation::with_struct(Op::RestoreDone, vcpu, &[], answer)
    }
}

impl<'a> Operation<'a, RawAnswer> {
    /// Any request at all, with room for an answer's body of `answer` bytes: for tests, and for
    /// operations that this version does not know.
    pub fn raw(op: Op, vcpu: u32, body: &'a [u8], answer: usize) -> Self {
        Operation::new(op, vcpu, Body::Bytes(body), answer)
    }
}
