//! What a fake backend answers.

use vhost_user_timer_frontend::SavedVcpu;
use vhost_user_timer_protocol::request::{Body, Request};
use vhost_user_timer_protocol::wire::{self, ResponseHeader, request_flags};
use vhost_user_timer_protocol::{Phase, Register, Status, VERSION};
use zerocopy::IntoBytes;

pub(crate) fn answer(status: Status, detail: u32, body: &[u8]) -> Vec<u8> {
    let header = ResponseHeader {
        status: status.errno().into(),
        detail: detail.into(),
        epoch: 1.into(),
    };
    [header.as_bytes(), body].concat()
}

pub(crate) fn ok(body: &[u8]) -> Vec<u8> {
    answer(Status::Ok, 0, body)
}

pub(crate) fn info() -> wire::Info {
    wire::Info {
        version: VERSION.into(),
        phase: Phase::Paused.code().into(),
        vcpus: 4096.into(),
        restored: 4096.into(),
        frequency: 1_000_000_000.into(),
        epoch: 1.into(),
        max_vcpus: 4096.into(),
        request_queues: 2.into(),
        ..Default::default()
    }
}

/// An answer's body: that many vCPUs are missing.
pub(crate) fn remaining(vcpus: u32) -> Vec<u8> {
    let result = wire::RestoreDoneResult {
        remaining: vcpus.into(),
        reserved: 0.into(),
    };
    result.as_bytes().to_vec()
}

/// A `run` that identifies the vCPU.
pub(crate) fn run_of(vcpu: u32) -> wire::Run {
    wire::Run {
        cntvoff: (1000 + u64::from(vcpu)).into(),
        ..Default::default()
    }
}

pub(crate) fn vcpu(index: u32) -> wire::Vcpu {
    let mut vcpu = wire::Vcpu {
        vcpu: index.into(),
        ..Default::default()
    };
    for (n, register) in (1..).zip(Register::ALL) {
        vcpu.set(register, u64::from(index) * 10 + n);
    }
    vcpu
}

/// The same, as the library has it.
pub(crate) fn saved_vcpu(index: u32) -> SavedVcpu {
    let registers = (1..).zip(Register::ALL);
    registers.fold(SavedVcpu::new(index), |vcpu, (n, register)| {
        vcpu.with(register, u64::from(index) * 10 + n)
    })
}

/// Answers every well-formed request with the values that are in it, WAIT_RUN with
/// [`run_of`] its vCPU.
pub(crate) fn echo(request: &[u8]) -> Vec<u8> {
    let request = match Request::parse(request) {
        Ok(request) => request,
        Err(status) => return answer(status, 0, &[]),
    };
    let done = request.flags & request_flags::DONE != 0;
    match request.body {
        Body::GetInfo => ok(info().as_bytes()),
        Body::GetVm(range) => {
            let vm = wire::Vm {
                virt_count: 7.into(),
                frequency: 1_000_000_000.into(),
                first: range.first,
                count: range.count,
                ..Default::default()
            };
            let first = range.first.get();
            let vcpus: Vec<_> = (first..first + range.count.get()).map(vcpu).collect();
            ok(&[vm.as_bytes(), vcpus.as_bytes()].concat())
        }
        Body::SetVm(vcpus) => {
            let wrong = vcpus.iter().position(|v| *v != vcpu(v.vcpu.get()));
            let body = match done {
                true => remaining(vcpus[0].vcpu.get() + 1),
                false => Vec::new(),
            };
            wrong.map_or(ok(&body), |n| answer(Status::Invalid, n as u32, &[]))
        }
        Body::Pause(pause) => ok(run_of(pause.keeps_counting().into()).as_bytes()),
        Body::Resume => ok(run_of(2).as_bytes()),
        Body::GetRegList => ok([1u64, 2, 3, 4, 5, 6].as_bytes()),
        Body::GetRegs(ids) => {
            let values = ids.iter().map(|&id| wire::RegValue {
                id,
                value: (id.get() + u64::from(request.vcpu)).into(),
            });
            ok(values.collect::<Vec<_>>().as_bytes())
        }
        Body::SetRegs(values) if done => {
            let result = wire::SetRegsDone {
                lines: request.vcpu.into(),
                ignored: (values.len() as u32).into(),
                remaining: (request.vcpu + 1).into(),
            };
            ok(result.as_bytes())
        }
        Body::SetRegs(values) => {
            let result = wire::SetRegsResult {
                lines: request.vcpu.into(),
                ignored: (values.len() as u32).into(),
            };
            ok(result.as_bytes())
        }
        Body::RestoreDone => ok(&remaining(request.vcpu + 1)),
        Body::ConfirmRun(offsets) => {
            let run = wire::Run {
                cntvoff: offsets.cntvoff,
                cntpoff: offsets.cntpoff,
                ..Default::default()
            };
            ok(run.as_bytes())
        }
        Body::WaitRun => ok(run_of(request.vcpu).as_bytes()),
        _ => ok(&[]),
    }
}

/// As [`echo`], with WAIT_RUN held.
pub(crate) fn hold_wait_run(request: &[u8]) -> Option<Vec<u8>> {
    (request[0] != 0x42).then(|| echo(request))
}
