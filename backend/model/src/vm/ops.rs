//! The operations: each checks, and then does what it says or nothing at all.

use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::op::Scope;
use vhost_user_timer_protocol::request::Body;
use vhost_user_timer_protocol::wire::{self, request_flags};
use vhost_user_timer_protocol::{Abi, Phase, Request, Status, Timeline};
use zerocopy::little_endian::U64;

use super::call::{Answer, Changed, Effects, Handled, PageOrder, Refusal, Token};
use super::clock::Now;
use super::configured::Configured;
use super::flags::VmFlags;
use super::model::Vm;

impl Vm {
    /// Performs a request, or refuses it and changes nothing. The checks come in the order of
    /// SPEC.md: vCPU, epoch, phase, values, room.
    pub(super) fn perform(
        &mut self,
        now: Now,
        request: &Request<'_>,
        token: Token,
        answer: &mut Answer<'_>,
        effects: &mut Effects,
    ) -> Result<Handled, Refusal> {
        let row = request.row();
        if row.scope == Scope::Vcpu
            && let Some(configured) = &self.configured
            && request.vcpu >= configured.vcpus()
        {
            return Err(Status::NoSuchVcpu.into());
        }
        if request.epoch != 0 && request.epoch != self.epoch {
            return Err(Status::Stale.into());
        }
        let from = self.phase();
        let done = request.flags & request_flags::DONE != 0;
        // In RUNNING, the row says all of a request without DONE.
        let may_lack = done || from != Phase::Running;
        if !row.phases.contains(from) || may_lack && self.lacks_restore(request, done) {
            return Err(self.busy());
        }
        let vcpu = request.vcpu as usize;
        match request.body {
            Body::GetInfo => answer.give(&self.info(now))?,
            Body::ConfigureVm(configure) => self.configure(configure)?,
            Body::SetTimePage(page) => effects.page = Some(PageOrder::parse(page)?),
            Body::GetVm(range) => self.get_vm(now, range, answer)?,
            Body::SetVm(vcpus) => self.set_vm(now, vcpus, done, answer, effects)?,
            Body::SetCounterOffset(offset) => {
                self.configured_mut()?.pin_offset(offset.offset.get());
            }
            Body::SetCounterAnchor(anchor) => self.configured_mut()?.set_anchor(Anchor {
                monotonic_ns: anchor.monotonic_ns.get(),
                count: anchor.count.get(),
            }),
            Body::Pause(pause) => {
                let configured = self.configured_mut()?;
                answer.needs(size_of::<wire::Run>())?;
                if from != Phase::Paused {
                    configured.pause(pause.keeps_counting(), now.host);
                }
                answer.push(&configured.run(now.host));
            }
            Body::Resume => {
                let configured = self.configured_mut()?;
                answer.needs(size_of::<wire::Run>())?;
                if from == Phase::Paused {
                    configured.resume(now.host);
                }
                answer.push(&configured.run(now.host));
            }
            Body::RestoreBegin(begin) => self.restore_begin(now, begin, effects)?,
            Body::RestoreAbort => {
                self.configured_mut()?.abort_restore();
                self.release_all(Status::Canceled, None, effects);
            }
            Body::ConfirmRun(confirm) => self.confirm_run(now, confirm, answer)?,
            Body::GetRegList => self.get_reg_list(answer)?,
            Body::GetRegs(ids) => self.get_regs(now, vcpu, ids, answer)?,
            Body::SetRegs(entries) => {
                self.set_regs(now, request.vcpu, entries, done, answer, effects)?;
            }
            Body::RestoreDone => self.restore_done(now, request.vcpu, answer, effects)?,
            Body::WaitRun => {
                let configured = self.configured_mut()?;
                answer.needs(size_of::<wire::Run>())?;
                if from != Phase::Running {
                    self.waiters.push(token);
                    return Ok(Handled::Waiting);
                }
                answer.push(&configured.run(now.host));
            }
        }
        note_changes(request, &mut effects.changed);
        self.phase_changed(from, now, effects);
        Ok(Handled::Answered)
    }

    /// Whether the request needs a restore that can still be aborted, and there is none. SET_VM
    /// without DONE needs one that is open.
    fn lacks_restore(&self, request: &Request<'_>, done: bool) -> bool {
        let configured = self.configured.as_ref();
        match request.body {
            Body::SetVm(_) if !done => configured.and_then(Configured::restoring).is_none(),
            Body::RestoreDone | Body::RestoreAbort => {
                configured.and_then(Configured::restore).is_none()
            }
            _ => done && configured.and_then(Configured::restore).is_none(),
        }
    }

    /// The configured VM. The phases of the operation exclude NEW.
    pub(super) fn configured_mut(&mut self) -> Result<&mut Configured, Refusal> {
        let busy = Refusal::new(Status::Busy, Phase::New.code());
        self.configured.as_mut().ok_or(busy)
    }

    fn configure(&mut self, configure: &wire::ConfigureVm) -> Result<(), Refusal> {
        let vcpus = configure.vcpus.get();
        let frequency = match configure.frequency.get() {
            0 => self.profile.frequency,
            frequency => frequency,
        };
        if let Some(configured) = &self.configured {
            let same = (
                configured.vcpus(),
                configured.abi.code(),
                configured.flags.bits(),
                configured.frequency,
            ) == (vcpus, configure.abi, configure.flags, frequency);
            return if same { Ok(()) } else { Err(self.busy()) };
        }
        let abi = Abi::from_code(configure.abi).ok_or(Status::Invalid)?;
        let flags = VmFlags::from_bits(configure.flags).ok_or(Status::Invalid)?;
        let vcpus_right = (1..=self.profile.max_vcpus).contains(&vcpus);
        let frequency_right = self.profile.accepts_frequency(frequency);
        if !vcpus_right || !frequency_right {
            return Err(Status::Invalid.into());
        }
        self.configured = Some(Configured::new(vcpus, abi, frequency, flags));
        Ok(())
    }

    fn confirm_run(
        &mut self,
        now: Now,
        confirm: &wire::ConfirmRun,
        answer: &mut Answer<'_>,
    ) -> Result<(), Refusal> {
        let configured = self.configured_mut()?;
        let run = configured.run(now.host);
        if (confirm.cntvoff, confirm.cntpoff) != (run.cntvoff, run.cntpoff) {
            return Err(Status::Invalid.into());
        }
        answer.give(&run)?;
        if configured.phase() == Phase::Armed {
            configured.start_running(now.host);
        }
        Ok(())
    }

    fn get_reg_list(&mut self, answer: &mut Answer<'_>) -> Result<(), Refusal> {
        let registers = self.configured_mut()?.abi.registers();
        answer.needs(size_of::<U64>() * registers.len())?;
        for (_, id) in registers {
            answer.push(&U64::new(*id));
        }
        Ok(())
    }

    fn get_regs(
        &mut self,
        now: Now,
        vcpu: usize,
        ids: &[U64],
        answer: &mut Answer<'_>,
    ) -> Result<(), Refusal> {
        let configured = self.configured_mut()?;
        for (entry, &id) in ids.iter().enumerate() {
            configured.register_of(entry, id)?;
        }
        answer.needs(size_of::<wire::RegValue>() * ids.len())?;
        for (entry, &id) in ids.iter().enumerate() {
            let register = configured.register_of(entry, id)?;
            let value = configured.register(vcpu, register, now.host).into();
            configured.report_to_vcpu(vcpu, register, now.host);
            answer.push(&wire::RegValue { id, value });
        }
        Ok(())
    }

    fn get_vm(
        &mut self,
        now: Now,
        range: &wire::VcpuRange,
        answer: &mut Answer<'_>,
    ) -> Result<(), Refusal> {
        let configured = self.configured_mut()?;
        let (first, count) = (range.first.get(), range.count.get());
        let end = first
            .checked_add(count)
            .filter(|end| *end <= configured.vcpus());
        let vcpus = first..end.ok_or(Status::Invalid)?;
        answer.needs(size_of::<wire::Vm>() + size_of::<wire::Vcpu>() * vcpus.len())?;
        configured.report_by_get_vm(vcpus.clone(), now.host);
        answer.push(&wire::Vm {
            virt_count: configured.count(Timeline::Virtual, now.host).into(),
            phys_count: configured.count(Timeline::Physical, now.host).into(),
            host_count: now.host.into(),
            frequency: configured.frequency.into(),
            first: range.first,
            count: range.count,
        });
        for vcpu in vcpus {
            answer.push(&configured.vcpu(vcpu as usize, now.host));
        }
        Ok(())
    }
}

/// Notes what an operation that was performed may have changed.
fn note_changes(request: &Request<'_>, changed: &mut Changed) {
    if !request.row().effect.changes_vm() {
        return;
    }
    changed.vm = true;
    match request.body {
        Body::ConfigureVm(_) | Body::RestoreBegin(_) | Body::RestoreAbort => changed.all = true,
        Body::SetVm(entries) => changed
            .vcpus
            .extend(entries.iter().map(|entry| entry.vcpu.get())),
        Body::SetRegs(_) | Body::RestoreDone => changed.vcpus.push(request.vcpu),
        _ => {}
    }
}
