//! The operations of a restore, and those that write registers. Each checks, and then does
//! everything or nothing.

use alloc::vec;

use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Register, Role, Status};

use super::call::{Answer, Effects, Refusal};
use super::clock::Now;
use super::configured::Configured;
use super::model::Vm;

impl Vm {
    pub(super) fn restore_begin(
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

    /// SET_REGS. With `done` it is RESTORE_DONE as well.
    pub(super) fn set_regs(
        &mut self,
        now: Now,
        vcpu: u32,
        entries: &[wire::RegValue],
        done: bool,
        answer: &mut Answer<'_>,
        effects: &mut Effects,
    ) -> Result<(), Refusal> {
        let busy = self.busy();
        let configured = self.configured_mut()?;
        let index = vcpu as usize;
        // Of a vCPU that is done, a request that was carried out can be repeated, and no other.
        let repeats = done && configured.is_done(index);
        let a_count = entries.iter().any(|entry| configured.writes_count(entry));
        if !repeats && !configured.may_write(index, a_count) {
            return Err(busy);
        }
        let values = configured.values_of(vcpu, entries);
        if repeats && !values.is_ok_and(|values| configured.has_already(index, &values)) {
            return Err(busy);
        }
        let values = [values?];
        let settled = match done {
            true => configured.may_be_done(&values, |named| named == index)?,
            false => None,
        };
        answer.needs(match done {
            true => size_of::<wire::SetRegsDone>(),
            false => size_of::<wire::SetRegsResult>(),
        })?;
        let [written] = &values;
        let ignored = configured.ignored(written);
        if !repeats {
            configured.write(index, written);
        }
        let remaining = match done {
            true => Some(configured.done(&values, settled, now, &mut effects.notices)),
            false => None,
        };
        let (lines, ignored) = (configured.lines(index, now.host).into(), ignored.into());
        match remaining.map(Into::into) {
            None => answer.push(&wire::SetRegsResult { lines, ignored }),
            Some(remaining) => answer.push(&wire::SetRegsDone {
                lines,
                ignored,
                remaining,
            }),
        }
        Ok(())
    }

    /// SET_VM. With `done` it is RESTORE_DONE of every vCPU named as well.
    pub(super) fn set_vm(
        &mut self,
        now: Now,
        entries: &[wire::Vcpu],
        done: bool,
        answer: &mut Answer<'_>,
        effects: &mut Effects,
    ) -> Result<(), Refusal> {
        let busy = self.busy();
        let configured = self.configured_mut()?;
        let refused = |entry: &wire::Vcpu| {
            let vcpu = entry.vcpu.get() as usize;
            let repeats = || configured.is_valid(entry) && configured.has_already(vcpu, entry);
            configured.is_done(vcpu) && !(done && repeats())
        };
        if entries.iter().any(refused) {
            return Err(busy);
        }
        let mut named = vec![false; configured.vcpus() as usize];
        for (index, entry) in entries.iter().enumerate() {
            let twice = named
                .get_mut(entry.vcpu.get() as usize)
                .map(|named| core::mem::replace(named, true));
            if twice != Some(false) || !configured.is_valid(entry) {
                return Err(Refusal::invalid(index));
            }
        }
        let mut settled = None;
        if done {
            settled = configured.may_be_done(entries, |vcpu| named[vcpu])?;
            answer.needs(size_of::<wire::RestoreDoneResult>())?;
        }
        for entry in entries {
            let vcpu = entry.vcpu.get() as usize;
            if !configured.is_done(vcpu) {
                configured.write(vcpu, entry);
            }
        }
        if done {
            let remaining = configured.done(entries, settled, now, &mut effects.notices);
            answer.push(&restore_done_result(remaining));
        }
        Ok(())
    }

    pub(super) fn restore_done(
        &mut self,
        now: Now,
        vcpu: u32,
        answer: &mut Answer<'_>,
        effects: &mut Effects,
    ) -> Result<(), Refusal> {
        let configured = self.configured_mut()?;
        let nothing = [wire::Vcpu {
            vcpu: vcpu.into(),
            ..Default::default()
        }];
        let settled = configured.may_be_done(&nothing, |named| named == vcpu as usize)?;
        answer.needs(size_of::<wire::RestoreDoneResult>())?;
        let remaining = configured.done(&nothing, settled, now, &mut effects.notices);
        answer.push(&restore_done_result(remaining));
        Ok(())
    }
}

fn restore_done_result(remaining: u32) -> wire::RestoreDoneResult {
    wire::RestoreDoneResult {
        remaining: remaining.into(),
        reserved: 0.into(),
    }
}

impl Configured {
    /// The registers that SET_REGS sets, as an entry of SET_VM.
    fn values_of(&self, vcpu: u32, entries: &[wire::RegValue]) -> Result<wire::Vcpu, Refusal> {
        // One value per register: with two, the order of entries would matter.
        let mut values = wire::Vcpu {
            vcpu: vcpu.into(),
            ..Default::default()
        };
        for (index, entry) in entries.iter().enumerate() {
            let register = self.register_of(index, entry.id)?;
            let value = entry.value.get();
            let twice = values.has(register);
            if value > register.max_value(self.abi) || twice && values.get(register) != value {
                return Err(Refusal::invalid(index));
            }
            values.set(register, value);
        }
        Ok(values)
    }

    /// Whether an entry of SET_REGS writes a count that is not ignored.
    fn writes_count(&self, entry: &wire::RegValue) -> bool {
        let register = Register::from_id(entry.id.get(), self.abi);
        register.is_ok_and(|it| it.role() == Role::Count && !self.ignores(it))
    }

    /// Whether this vCPU's registers, and no others, are in an entry of SET_VM.
    fn is_valid(&self, entry: &wire::Vcpu) -> bool {
        let unknown = entry.present.get() & !self.abi.present();
        let mut present = self.abi.registers().iter().filter(|row| entry.has(row.0));
        unknown == 0 && present.all(|row| entry.get(row.0) <= row.0.max_value(self.abi))
    }
}
