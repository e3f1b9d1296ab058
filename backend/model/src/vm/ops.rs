//! The operations: each checks, and then does what it says or nothing at all.

use alloc::vec;
use alloc::vec::Vec;

use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::op::Scope;
use vhost_user_timer_protocol::request::Body;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, Phase, Register, Request, Role, Status, Timeline};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::clock::Now;
use super::machine::{Machine, State};
use super::page::PageOrder;
use super::{Changed, Effects, Handled, Notice, Refusal, Token, Vm};

/// Where an answer's body goes, once it is sure to fit.
pub(super) struct Answer<'a> {
    pub(super) out: &'a mut Vec<u8>,
    pub(super) room: usize,
}

pub(super) const HEADER: usize = size_of::<wire::ResponseHeader>();

impl Answer<'_> {
    /// The last check of every operation: that a body of this length fits.
    fn needs(&self, body: usize) -> Result<(), Refusal> {
        let len = HEADER + body;
        if len <= self.room {
            Ok(())
        } else {
            Err(Refusal {
                status: Status::TooBig,
                detail: len as u32,
            })
        }
    }

    fn push(&mut self, part: &(impl IntoBytes + zerocopy::Immutable)) {
        self.out.extend_from_slice(part.as_bytes());
    }

    /// Checks that it fits and gives it as the whole body, in one.
    fn give(&mut self, body: &(impl IntoBytes + zerocopy::Immutable)) -> Result<(), Refusal> {
        self.needs(size_of_val(body))?;
        self.push(body);
        Ok(())
    }
}

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
            && let Some(machine) = &self.machine
            && request.vcpu >= machine.vcpus()
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
            Body::SetCounterOffset(offset) => self.configured()?.pin_offset(offset.offset.get()),
            Body::SetCounterAnchor(anchor) => self.configured()?.set_anchor(Anchor {
                monotonic_ns: anchor.monotonic_ns.get(),
                count: anchor.count.get(),
            }),
            Body::Pause(pause) => {
                let machine = self.configured()?;
                answer.needs(size_of::<wire::Run>())?;
                if from == Phase::Running {
                    machine.pause(pause.keeps_counting(), now.host);
                }
                answer.push(&machine.run(now.host));
            }
            Body::Resume => {
                let machine = self.configured()?;
                answer.needs(size_of::<wire::Run>())?;
                if from == Phase::Paused {
                    machine.resume(now.host);
                }
                answer.push(&machine.run(now.host));
            }
            Body::RestoreBegin(begin) => self.restore_begin(now, begin, effects)?,
            Body::RestoreAbort => {
                self.configured()?.abort_restore();
                self.release(effects, Status::Canceled, 0, None);
            }
            Body::GetRegList => self.get_reg_list(answer)?,
            Body::GetRegs(ids) => self.get_regs(now, vcpu, ids, answer)?,
            Body::SetRegs(entries) => self.set_regs(now, vcpu, entries, answer)?,
            Body::RestoreDone => self.restore_done(now, vcpu, answer, effects)?,
            Body::WaitRun => {
                let machine = self.configured()?;
                answer.needs(size_of::<wire::Run>())?;
                if from != Phase::Running {
                    self.waiters.push(token);
                    return Ok(Handled::Waiting);
                }
                answer.push(&machine.run(now.host));
            }
        }
        note_changes(request, &mut effects.changed);
        self.entered(from, now, effects);
        Ok(Handled::Answered)
    }

    /// Does what a change of phase brings with it, where there was one: the frontend and the
    /// log are told, and whoever waited to run may.
    pub(super) fn entered(&mut self, from: Phase, now: Now, effects: &mut Effects) {
        let to = self.phase();
        if from == to {
            return;
        }
        self.untold_phase = Some(to);
        effects.notices.push(Notice::Phase {
            from,
            to,
            epoch: self.epoch,
        });
        if to == Phase::Running {
            let run = self.machine.as_ref().map(|machine| machine.run(now.host));
            self.release(effects, Status::Ok, 0, run);
        }
    }

    /// The configured VM. The phases of the operation exclude NEW.
    fn configured(&mut self) -> Result<&mut Machine, Refusal> {
        self.machine.as_mut().ok_or(Refusal {
            status: Status::Busy,
            detail: Phase::New.code(),
        })
    }

    fn configure(&mut self, configure: &wire::ConfigureVm) -> Result<(), Refusal> {
        let vcpus = configure.vcpus.get();
        let frequency = match configure.frequency.get() {
            0 => self.profile.frequency,
            frequency => frequency,
        };
        if let Some(machine) = &self.machine {
            let same = (machine.vcpus(), machine.abi.code(), machine.frequency)
                == (vcpus, configure.abi, frequency);
            return if same { Ok(()) } else { Err(self.busy()) };
        }
        let abi = Abi::from_code(configure.abi).ok_or(Status::Invalid)?;
        let vcpus_right = (1..=self.profile.max_vcpus).contains(&vcpus);
        let frequency_right = self.profile.takes_frequency(frequency);
        if !vcpus_right || !frequency_right {
            return Err(Status::Invalid.into());
        }
        self.machine = Some(Machine::new(vcpus, abi, frequency));
        Ok(())
    }

    fn get_reg_list(&mut self, answer: &mut Answer<'_>) -> Result<(), Refusal> {
        let registers = self.configured()?.abi.registers();
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
        let machine = self.configured()?;
        for (entry, &id) in ids.iter().enumerate() {
            machine.register_of(entry, id)?;
        }
        answer.needs(size_of::<wire::RegValue>() * ids.len())?;
        for (entry, &id) in ids.iter().enumerate() {
            let register = machine.register_of(entry, id)?;
            let value = machine.register(vcpu, register, now.host).into();
            machine.tell_vcpu(vcpu, register, now.host);
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
        let machine = self.configured()?;
        let is_count = |entry: &wire::RegValue| {
            let register = Register::from_id(entry.id.get(), machine.abi);
            register.is_ok_and(|register| register.role() == Role::Count)
        };
        if !machine.may_write(vcpu, entries.iter().any(is_count)) {
            return Err(busy);
        }
        // One value per register: with two, the order of entries would matter.
        let mut values = wire::Vcpu::default();
        for (index, entry) in entries.iter().enumerate() {
            let register = machine.register_of(index, entry.id)?;
            let value = entry.value.get();
            let twice = values.has(register);
            if value > register.max_value(machine.abi) || twice && values.get(register) != value {
                return Err(Refusal::invalid(index));
            }
            values.set(register, value);
        }
        answer.needs(size_of::<wire::SetRegsResult>())?;
        let ignored = write_present(machine, vcpu, &values);
        answer.push(&wire::SetRegsResult {
            lines: machine.lines(vcpu, now.host).into(),
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
        let machine = self.configured()?;
        let (first, count) = (range.first.get(), range.count.get());
        let end = first
            .checked_add(count)
            .filter(|end| *end <= machine.vcpus());
        let vcpus = first..end.ok_or(Status::Invalid)?;
        answer.needs(size_of::<wire::Vm>() + size_of::<wire::Vcpu>() * vcpus.len())?;
        machine.tell_vm(vcpus.clone(), now.host);
        answer.push(&wire::Vm {
            virt_count: machine.count(Timeline::Virtual, now.host).into(),
            phys_count: machine.count(Timeline::Physical, now.host).into(),
            host_count: now.host.into(),
            frequency: machine.frequency.into(),
            first: range.first,
            count: range.count,
        });
        for vcpu in vcpus {
            answer.push(&machine.vcpu(vcpu as usize, now.host));
        }
        Ok(())
    }

    fn set_vm(&mut self, vcpus: &[wire::Vcpu]) -> Result<(), Refusal> {
        let busy = self.busy();
        let machine = self.configured()?;
        let is_done = |vcpu: U32| {
            vcpu.get() < machine.vcpus()
                && machine
                    .staged(vcpu.get() as usize)
                    .is_some_and(|staged| staged.done)
        };
        if vcpus.iter().any(|entry| is_done(entry.vcpu)) {
            return Err(busy);
        }
        let mut named = vec![false; machine.vcpus() as usize];
        for (index, entry) in vcpus.iter().enumerate() {
            let twice = named
                .get_mut(entry.vcpu.get() as usize)
                .map(|named| core::mem::replace(named, true));
            let present = entry.present.get();
            let values_right = Register::ALL.into_iter().all(|register| {
                !entry.has(register) || entry.get(register) <= register.max_value(machine.abi)
            });
            if twice != Some(false) || present & !machine.abi.present() != 0 || !values_right {
                return Err(Refusal::invalid(index));
            }
        }
        for entry in vcpus {
            write_present(machine, entry.vcpu.get() as usize, entry);
        }
        Ok(())
    }

    fn restore_begin(
        &mut self,
        now: Now,
        begin: &wire::RestoreBegin,
        effects: &mut Effects,
    ) -> Result<(), Refusal> {
        let machine = self.configured()?;
        if begin.vcpus.get() != machine.vcpus() {
            return Err(Status::Invalid.into());
        }
        machine.begin_restore(begin, now.host);
        self.epoch += 1;
        self.release(effects, Status::Stale, 0, None);
        Ok(())
    }

    fn restore_done(
        &mut self,
        now: Now,
        vcpu: usize,
        answer: &mut Answer<'_>,
        effects: &mut Effects,
    ) -> Result<(), Refusal> {
        let machine = self.configured()?;
        let (abi, pinned) = (machine.abi, machine.pinned);
        let State::Restoring(restore) = &mut machine.state else {
            return Err(Status::Busy.into());
        };
        let missing = restore.lacks(vcpu, abi, pinned);
        if missing != 0 {
            return Err(Refusal {
                status: Status::Incomplete,
                detail: missing,
            });
        }
        let mut settled = None;
        if restore.would_complete(vcpu) {
            settled = Some(if pinned {
                [None; 2]
            } else {
                let settle = |clock| restore.settled_count(clock).map_err(|_| Status::Invalid);
                [settle(Timeline::Virtual)?, settle(Timeline::Physical)?]
            });
        }
        answer.needs(size_of::<wire::RestoreDoneResult>())?;
        restore.set_done(vcpu);
        answer.push(&wire::RestoreDoneResult {
            remaining: restore.remaining().into(),
            reserved: 0.into(),
        });
        if let Some(settled) = settled {
            let completed = machine.complete_restore(settled, now);
            if let Some(ns) = completed.realtime_went_back_ns {
                effects.notices.push(Notice::RealtimeWentBack { ns });
            }
        }
        Ok(())
    }
}

/// Writes the registers of `values` that are present. Returns how many were counts that the
/// pinned offset makes ignored.
fn write_present(machine: &mut Machine, vcpu: usize, values: &wire::Vcpu) -> u32 {
    let mut ignored = 0;
    for register in Register::ALL {
        if values.has(register) {
            ignored += u32::from(machine.write(vcpu, register, values.get(register)));
        }
    }
    machine.rewritten(vcpu);
    ignored
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
