//! The operations of a restore, and those that write registers. Each checks, and then does
//! everything or nothing.

use alloc::vec;

use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Role, Status};

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
        let mut written = wire::Vcpu {
            vcpu: vcpu.into(),
            ..Default::default()
        };
        let (a_count, valid) = configured.take_in(entries, &mut written);
        let allowed = match repeats {
            true => valid.is_ok() && configured.has_already(index, &written),
            false => configured.may_write(index, a_count),
        };
        if !allowed {
            return Err(busy);
        }
        valid?;
        let values = core::slice::from_ref(&written);
        let settled = match done {
            true => configured.may_be_done(values, |named| named == index)?,
            false => None,
        };
        answer.needs(match done {
            true => size_of::<wire::SetRegsDone>(),
            false => size_of::<wire::SetRegsResult>(),
        })?;
        let ignored = configured.ignored(&written);
        if !repeats {
            configured.write(index, &written);
        }
        let remaining = match done {
            true => Some(configured.done(values, settled, now, &mut effects.notices)),
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
    /// Takes the registers that SET_REGS sets into an entry of SET_VM. Returns whether a count that
    /// is not ignored is among them, and the first thing wrong: the phase is checked before that.
    fn take_in(
        &self,
        entries: &[wire::RegValue],
        values: &mut wire::Vcpu,
    ) -> (bool, Result<(), Refusal>) {
        let mut a_count = false;
        let mut valid = Ok(());
        for (index, entry) in entries.iter().enumerate() {
            let register = match self.register_of(index, entry.id) {
                Ok(register) => register,
                Err(bad) => {
                    valid = valid.and(Err(bad));
                    continue;
                }
            };
            a_count |= register.role() == Role::Count && !self.ignores(register);
            let value = entry.value.get();
            // One value per register: with two, the order of entries would matter.
            let twice = values.has(register);
            if value > register.max_value(self.abi) || twice && values.get(register) != value {
                valid = valid.and(Err(Refusal::invalid(index)));
            }
            values.set(register, value);
        }
        (a_count, valid)
    }

    /// Whether this vCPU's registers, and no others, are in an entry of SET_VM.
    fn is_valid(&self, entry: &wire::Vcpu) -> bool {
        let unknown = entry.present.get() & !self.abi.present();
        let mut present = self.abi.registers().iter().filter(|row| entry.has(row.0));
        unknown == 0 && present.all(|row| entry.get(row.0) <= row.0.max_value(self.abi))
    }
}
