//! Why a request is refused, in words, for the log. The model decides that by status and detail
//! alone, so that a request that is carried out pays nothing for the words.

use std::fmt;

use vhost_user_timer_model::vm::Vm;
use vhost_user_timer_protocol::op::{Body, Op, Scope};
use vhost_user_timer_protocol::wire::{self, request_flags};
use vhost_user_timer_protocol::{Abi, MAX_VCPUS, Phase, Register, Request, Status, VM_WIDE};

use crate::device::timer::asked::{Asked, phase_of};

/// A refusal's reason.
pub(super) struct Reason<'a> {
    pub(super) asked: Asked<'a>,
    pub(super) status: Status,
    pub(super) detail: u32,
    pub(super) vm: &'a Vm,
    /// The VM, which the refusal left as it was.
    pub(super) info: &'a wire::Info,
}

impl fmt::Display for Reason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match &self.asked.incoming.request {
            Err(_) => self.of_bytes(),
            Ok(request) => self.of_request(request),
        };
        f.write_str(&text)
    }
}

impl Reason<'_> {
    /// Why the bytes are no request.
    fn of_bytes(&self) -> String {
        let len = self.asked.bytes.len();
        let Some(header) = self.asked.header() else {
            let header = size_of::<wire::RequestHeader>();
            return format!("the header alone has {header} bytes");
        };
        let op = Op::from(header.op.get());
        let Some(row) = op.row() else {
            return "this version has no such operation".to_owned();
        };
        if !row.body.allows(len.saturating_sub(size_of_val(&header))) {
            let fixed = size_of_val(&header) + row.body.fixed;
            let each = match row.body.each {
                0 => String::new(),
                each => format!(" and {each} for each entry"),
            };
            return format!("{len} bytes; it has {fixed}{each}, header included");
        }
        let (flags, vcpu) = (header.flags.get(), header.vcpu.get());
        if flags & !row.flags != 0 {
            return format!("header flags {flags:#x}; it takes {:#x} at most", row.flags);
        }
        if row.scope == Scope::Vm && vcpu != VM_WIDE {
            return format!("it is about the VM: the header's vcpu is {VM_WIDE:#x}");
        }
        "a reserved field or an unknown flag in its body is not 0".to_owned()
    }

    fn of_request(&self, request: &Request<'_>) -> String {
        let detail = self.detail;
        match self.status {
            Status::NoSuchVcpu => match self.info.vcpus.get().checked_sub(1) {
                Some(last) => format!("the VM has vCPUs 0 to {last}"),
                None => "the VM has no vCPUs yet".to_owned(),
            },
            Status::Stale => format!("the VM is in epoch {}", self.info.epoch),
            Status::Busy => self.busy(request),
            Status::TooBig => {
                let room = self.asked.incoming.room;
                format!("the answer has {detail} bytes, and the chain room for {room}")
            }
            Status::UnknownRegister => match entry(request, detail) {
                Some(id) => format!("entry {detail}: the VM has no register {id:#018x}"),
                None => format!("entry {detail} names no register of this VM"),
            },
            Status::Incomplete => {
                let lacking = Register::ALL.iter();
                let lacking = lacking.filter(|register| detail & register.present_bit() != 0);
                let names: Vec<_> = lacking.map(|register| register.name()).collect();
                format!("the vCPU still lacks {}", names.join(", "))
            }
            Status::Invalid => self.invalid(request),
            status => status.meaning().to_owned(),
        }
    }

    fn busy(&self, request: &Request<'_>) -> String {
        let row = request.row();
        let phase = phase_of(self.info);
        let within = Phase::from_code(self.info.phase.get());
        let accepted: Vec<_> = Phase::ALL
            .iter()
            .filter(|phase| row.phases.contains(**phase))
            .map(ToString::to_string)
            .collect();
        if !within.is_some_and(|phase| row.phases.contains(phase)) {
            let accepted = accepted.join(", ");
            return format!("the VM is {phase}; {} is accepted in {accepted}", row.name);
        }
        let why = match request.body {
            Body::ConfigureVm(_) => {
                "it is configured with other values; RESET_DEVICE starts over".to_owned()
            }
            _ if request.flags & request_flags::DONE != 0 && within != Some(Phase::Restoring) => {
                "DONE needs a restore that is open".to_owned()
            }
            Body::SetVm(_) | Body::SetRegs(_) if within == Some(Phase::Restoring) => {
                "a vCPU that is named is done, and has other values".to_owned()
            }
            Body::SetRegs(_) => "a count is set in PAUSED or RESTORING only".to_owned(),
            _ => "there is no restore that can be given up or completed".to_owned(),
        };
        format!("the VM is {phase}: {why}")
    }

    fn invalid(&self, request: &Request<'_>) -> String {
        let info = self.info;
        match request.body {
            Body::ConfigureVm(configure) => self.invalid_vm(configure),
            Body::RestoreBegin(begin) => {
                format!("vcpus is {}, and the VM has {}", begin.vcpus, info.vcpus)
            }
            Body::ConfirmRun(confirm) => format!(
                "the VM's offsets are CNTVOFF {:#x} and CNTPOFF {:#x}, not {:#x} and {:#x}",
                info.cntvoff.get(),
                info.cntpoff.get(),
                confirm.cntvoff.get(),
                confirm.cntpoff.get()
            ),
            Body::GetVm(range) => format!(
                "first is {} and count {}, and the VM has {} vCPUs",
                range.first, range.count, info.vcpus
            ),
            Body::SetTimePage(page) => format!(
                "{} bytes at {:#x} are not {} bytes, aligned to as many, of one region that is \
                 shared",
                page.length,
                page.address.get(),
                size_of::<wire::Page>()
            ),
            Body::GetRegs(_) => format!("entry {} {OTHER_KIND}", self.detail),
            Body::SetRegs(entries) => self.bad_register(entries).unwrap_or(STRICT.to_owned()),
            Body::SetVm(entries) => self.bad_vcpu(entries).unwrap_or(STRICT.to_owned()),
            Body::RestoreDone => STRICT.to_owned(),
            _ => self.status.meaning().to_owned(),
        }
    }

    /// What is wrong with the entry of SET_REGS that the detail names, if anything is.
    fn bad_register(&self, entries: &[wire::RegValue]) -> Option<String> {
        let (before, rest) = entries.split_at_checked(self.detail as usize)?;
        let entry = rest.first()?;
        let abi = Abi::from_code(self.info.abi)?;
        let what = match Register::from_id(entry.id.get(), abi) {
            Err(_) => OTHER_KIND.to_owned(),
            Ok(register) if entry.value.get() > register.max_value(abi) => format!(
                "sets {register} to {:#x}; its largest value is {:#x}",
                entry.value.get(),
                register.max_value(abi)
            ),
            Ok(register)
                if before
                    .iter()
                    .any(|it| it.id == entry.id && it.value != entry.value) =>
            {
                format!("sets {register} to another value than an earlier entry")
            }
            Ok(_) => return None,
        };
        Some(format!("entry {} {what}", self.detail))
    }

    /// The same, of SET_VM.
    fn bad_vcpu(&self, entries: &[wire::Vcpu]) -> Option<String> {
        let (before, rest) = entries.split_at_checked(self.detail as usize)?;
        let entry = rest.first()?;
        let abi = Abi::from_code(self.info.abi)?;
        let (vcpu, vcpus) = (entry.vcpu.get(), self.info.vcpus.get());
        let unknown = entry.present.get() & !abi.present();
        let too_large = Register::ALL
            .into_iter()
            .find(|it| entry.has(*it) && entry.get(*it) > it.max_value(abi));
        let what = match too_large {
            _ if vcpu >= vcpus => format!("is of vCPU {vcpu}, and the VM has {vcpus}"),
            _ if before.iter().any(|it| it.vcpu == entry.vcpu) => {
                format!("is of vCPU {vcpu}, as an earlier entry is")
            }
            _ if unknown != 0 => format!("has registers {unknown:#x} that the VM has not"),
            Some(register) => format!(
                "sets {register} to {:#x}; its largest value is {:#x}",
                entry.get(register),
                register.max_value(abi)
            ),
            None => return None,
        };
        Some(format!("entry {} {what}", self.detail))
    }

    fn invalid_vm(&self, configure: &wire::ConfigureVm) -> String {
        let profile = self.vm.profile();
        let (vcpus, frequency) = (configure.vcpus.get(), configure.frequency.get());
        if Abi::from_code(configure.abi).is_none() {
            return format!("abi is {}; it is 0 (arm64) or 1 (arm)", configure.abi);
        }
        if !(1..=profile.max_vcpus).contains(&vcpus) {
            let most = profile.max_vcpus;
            return format!(
                "vcpus is {vcpus}; this backend takes 1 to {most} (--max-vcpus, up to {MAX_VCPUS})"
            );
        }
        if profile.frequency_fixed {
            let only = profile.frequency;
            return format!("frequency is {frequency} Hz, and --counter-frequency {only}");
        }
        format!(
            "frequency is {frequency} Hz, or flags {:#x} has an unknown one",
            configure.flags
        )
    }
}

const OTHER_KIND: &str = "names a register of another architecture, or of another size";
const STRICT: &str = "the vCPUs' counts differ, and the restore is STRICT";

/// The id of the register in this entry.
fn entry(request: &Request<'_>, index: u32) -> Option<u64> {
    match request.body {
        Body::GetRegs(ids) => ids.get(index as usize).map(|id| id.get()),
        Body::SetRegs(entries) => entries.get(index as usize).map(|entry| entry.id.get()),
        _ => None,
    }
}
