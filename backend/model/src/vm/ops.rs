//! The operations: each checks, and then does what it says or nothing at all.

use alloc::vec;

use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::op::Scope;
use vhost_user_timer_protocol::request::Body;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, Phase, Register, Request, Role, Status, Timeline};
use zerocopy::little_endian::U64;

use super::call::{Answer, Changed, Effects, Handled, Notice, PageOrder, Refusal, Token};
use super::clock::Now;
use super::configured::Configured;
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
        // What DONE and the flags of CONFIGURE_VM ask for is refused until the model does it.
        if request.flags != 0
            || matches!(request.body, Body::ConfigureVm(configure) if configure.flags != 0)
        {
            return Err(Status::Invalid.into());
        }
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
        if !row.phases.contains(from) {
            return Err(self.busy());
        }
        let vcpu = request.vcpu as usize;
        match request.body {
            Body::GetInfo => answer.give(&self.info(now))?,
            Body::ConfigureVm(configure) => self.configure(configure)?,
            Body::SetTimePage(page) => effects.page = Some(PageOrder::parse(page)?),
            Body::GetVm(range) => self.get_vm(now, range, answer)?,
            Body::SetVm(vcpus) => self.set_vm(vcpus)?,
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
                if from == Phase::Running {
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
            Body::SetRegs(entries) => self.set_regs(now, vcpu, entries, answer)?,
            Body::RestoreDone => self.restore_done(now, vcpu, answer, effects)?,
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

    /// The configured VM. The phases of the operation exclude NEW.
    fn configured_mut(&mut self) -> Result<&mut Configured, Refusal> {
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
                configured.frequency,
            ) == (vcpus, configure.abi, frequency);
            return if same { Ok(()) } else { Err(self.busy()) };
        }
        let abi = Abi::from_code(configure.abi).ok_or(Status::Invalid)?;
        let vcpus_right = (1..=self.profile.max_vcpus).contains(&vcpus);
        let frequency_right = self.profile.accepts_frequency(frequency);
        if !vcpus_right || !frequency_right {
            return Err(Status::Invalid.into());
        }
        self.configured = Some(Configured::new(vcpus, abi, frequency));
        Ok(())
    }

    fn confirm_run(
        &mut self,
        now: Now,
        confirm: &wire::ConfirmRun,
        answer: &mut Answer<'_>,
    ) -> Result<(), Refusal> {
        let run = self.configured_mut()?.run(now.host);
        if (confirm.cntvoff, confirm.cntpoff) != (run.cntvoff, run.cntpoff) {
            return Err(Status::Invalid.into());
        }
        answer.give(&run)
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

    fn set_regs(
        &mut self,
        now: Now,
        vcpu: usize,
        entries: &[wire::RegValue],
        answer: &mut Answer<'_>,
    ) -> Result<(), Refusal> {
        let busy = self.busy();
        let configured = self.configured_mut()?;
        let is_count = |entry: &wire::RegValue| {
            let register = Register::from_id(entry.id.get(), configured.abi);
            register.is_ok_and(|register| register.role() == Role::Count)
        };
        if !configured.may_write(vcpu, entries.iter().any(is_count)) {
            return Err(busy);
        }
        // One value per register: with two, the order of entries would matter.
        let mut values = wire::Vcpu::default();
        for (index, entry) in entries.iter().enumerate() {
            let register = configured.register_of(index, entry.id)?;
            let value = entry.value.get();
            let twice = values.has(register);
            if value > register.max_value(configured.abi) || twice && values.get(register) != value
            {
                return Err(Refusal::invalid(index));
            }
            values.set(register, value);
        }
        answer.needs(size_of::<wire::SetRegsResult>())?;
        let ignored = configured.write(vcpu, &values);
        answer.push(&wire::SetRegsResult {
            lines: configured.lines(vcpu, now.host).into(),
            ignored: ignored.into(),
        });
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

    fn set_vm(&mut self, vcpus: &[wire::Vcpu]) -> Result<(), Refusal> {
        let busy = self.busy();
        let configured = self.configured_mut()?;
        let restore = configured.restoring().ok_or(Status::Busy)?;
        let is_done = |entry: &wire::Vcpu| {
            let staged = restore.staged.get(entry.vcpu.get() as usize);
            staged.is_some_and(|staged| staged.done)
        };
        if vcpus.iter().any(is_done) {
            return Err(busy);
        }
        let mut named = vec![false; configured.vcpus() as usize];
        for (index, entry) in vcpus.iter().enumerate() {
            let twice = named
                .get_mut(entry.vcpu.get() as usize)
                .map(|named| core::mem::replace(named, true));
            let present = entry.present.get();
            let values_right = configured.abi.registers().iter().all(|&(register, _)| {
                !entry.has(register) || entry.get(register) <= register.max_value(configured.abi)
            });
            if twice != Some(false) || present & !configured.abi.present() != 0 || !values_right {
                return Err(Refusal::invalid(index));
            }
        }
        for entry in vcpus {
            configured.write(entry.vcpu.get() as usize, entry);
        }
        Ok(())
    }

    fn restore_begin(
        &mut self,
        now: Now,
        begin: &wire::RestoreBegin,
        effects: &mut Effects,
    ) -> Result<(), Refusal> {
        let configured = self.configured_mut()?;
        if begin.vcpus.get() != configured.vcpus() {
            return Err(Status::Invalid.into());
        }
        configured.begin_restore(begin, now.host);
        self.epoch += 1;
        self.release_all(Status::Stale, None, effects);
        Ok(())
    }

    fn restore_done(
        &mut self,
        now: Now,
        vcpu: usize,
        answer: &mut Answer<'_>,
        effects: &mut Effects,
    ) -> Result<(), Refusal> {
        let configured = self.configured_mut()?;
        let (abi, pinned) = (configured.abi, configured.pinned);
        let restore = configured.restoring_mut().ok_or(Status::Busy)?;
        let missing = restore.lacks(vcpu, abi, pinned);
        if missing != 0 {
            return Err(Refusal::new(Status::Incomplete, missing));
        }
        let mut settled = None;
        if restore.would_complete(vcpu) {
            let mut counts = [None; Timeline::COUNT];
            for timeline in Timeline::ALL.into_iter().filter(|_| !pinned) {
                let count = restore.settled_count(timeline);
                counts[timeline.index()] = count.map_err(|_| Status::Invalid)?;
            }
            settled = Some(counts);
        }
        answer.needs(size_of::<wire::RestoreDoneResult>())?;
        restore.set_done(vcpu);
        answer.push(&wire::RestoreDoneResult {
            remaining: restore.remaining().into(),
            reserved: 0.into(),
        });
        if let Some(settled) = settled {
            let completed = configured.complete_restore(settled, now);
            if let Some(ns) = completed.realtime_went_back_ns {
                effects.notices.push(Notice::RealtimeWentBack { ns });
            }
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
