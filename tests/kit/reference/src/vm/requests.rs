//! Requests (SPEC.md, sections 2 and 5): bytes in, bytes out.

use std::ops::Range;

use super::{Clock, PHYSICAL, Reference, Refusal, Vcpu, Waiter};
use crate::contract::phase::{ARMED, NEW, PAUSED, RESTORING, RUNNING};
use crate::contract::{
    self, VM, configure, info_flag, info_source, op, restore, status, u16_at, u32_at, u64_at, words,
};

/// The bytes of a header, of requests and of answers.
const HEADER: usize = 16;
/// The highest frequency of a VM, Hz.
const MAX_FREQUENCY: u64 = 10_000_000_000;
/// The bytes of `run`.
const RUN: usize = 40;
const TIME_PAGE: u64 = 64;

/// A request that is well-formed.
struct Parsed<'a> {
    op: u16,
    vcpu: u32,
    epoch: u64,
    /// The flag DONE.
    done: bool,
    body: &'a [u8],
}

/// Whether the operation names one vCPU; `None` if there is no such operation.
fn names_a_vcpu(op: u16) -> Option<bool> {
    let known = op::ALL.iter().find(|(code, ..)| *code == op);
    known.map(|(_, names_a_vcpu, _)| *names_a_vcpu)
}

/// Whether a body of `len` bytes is one of the operation.
fn has_length(op: u16, len: usize) -> bool {
    let one = op::ALL.iter().find(|(code, ..)| *code == op);
    let one = one.map_or(0, |(.., len)| *len);
    match op {
        op::GET_REGS | op::SET_REGS | op::SET_VM => len.is_multiple_of(one),
        _ => len == one,
    }
}

/// Whether a reserved field of the body is not zero, or a flag has no name.
fn reserved_is_set(op: u16, body: &[u8]) -> bool {
    match op {
        op::CONFIGURE_VM => body[5] > 3 || body[6..8] != [0; 2],
        op::SET_COUNTER_OFFSET => u64_at(body, 8) != 0,
        op::PAUSE => u64_at(body, 0) > 1,
        op::RESTORE_BEGIN => {
            u32_at(body, 4) & !(restore::AUTORUN | restore::STRICT | restore::ELAPSED) != 0
        }
        _ => false,
    }
}

impl<'a> Parsed<'a> {
    fn of(request: &'a [u8]) -> Result<Self, u32> {
        let Some((header, body)) = request.split_at_checked(HEADER) else {
            return Err(status::EPROTO);
        };
        let op = u16_at(header, 0);
        let flags = u16_at(header, 2);
        let vcpu = u32_at(header, 4);
        let Some(names_a_vcpu) = names_a_vcpu(op) else {
            return Err(status::EOPNOTSUPP);
        };
        if !has_length(op, body.len()) {
            return Err(status::EPROTO);
        }
        let known = match op {
            op::SET_REGS | op::SET_VM => contract::DONE,
            _ => 0,
        };
        if flags & !known != 0 || !names_a_vcpu && vcpu != VM || reserved_is_set(op, body) {
            return Err(status::EINVAL);
        }
        Ok(Parsed {
            op,
            vcpu,
            epoch: u64_at(header, 8),
            done: flags == contract::DONE,
            body,
        })
    }
}

impl Reference {
    /// Serves a request's device-readable bytes, with `room` for the answer: at least a header's.
    /// Returns the answer; `None` for a WAIT_RUN that is held.
    pub fn handle(&mut self, request: &[u8], room: usize, waiter: Waiter) -> Option<Vec<u8>> {
        self.notice_time();
        let parsed = match Parsed::of(request) {
            Ok(parsed) => parsed,
            Err(status) => return Some(self.header(status, 0)),
        };
        let mut after = self.clone();
        let performed = after.perform(&parsed, waiter);
        let needed = match &performed {
            Ok(body) => HEADER + body.as_ref().map_or(RUN, Vec::len),
            Err((status, detail)) => return Some(self.header(*status, *detail)),
        };
        if needed > room {
            return Some(self.header(status::E2BIG, needed as u32));
        }
        *self = after;
        let body = performed.ok().flatten()?;
        Some([self.header(status::OK, 0), body].concat())
    }

    /// EBUSY, with its detail.
    fn busy(&self) -> Refusal {
        let detail = match self.phase {
            RESTORING => self.missing().len() as u32,
            phase => phase,
        };
        (status::EBUSY, detail)
    }

    fn only_in(&self, phases: &[u32]) -> Result<(), Refusal> {
        match phases.contains(&self.phase) {
            true => Ok(()),
            false => Err(self.busy()),
        }
    }

    /// Performs a request, whether there is room or not. Returns the answer's body; `None` for a
    /// WAIT_RUN that is held.
    fn perform(
        &mut self,
        request: &Parsed<'_>,
        waiter: Waiter,
    ) -> Result<Option<Vec<u8>>, Refusal> {
        let Parsed {
            op,
            vcpu,
            epoch,
            done,
            body,
        } = *request;
        if names_a_vcpu(op) == Some(true) && self.phase != NEW && vcpu >= self.vcpus() {
            return Err((status::ENXIO, 0));
        }
        if epoch != 0 && epoch != self.epoch {
            return Err((status::ESTALE, 0));
        }
        let one = vcpu as usize;
        // ARMED by a restore, which is still there.
        let restores: &[u32] = match self.restore {
            Some(_) => &[RESTORING, ARMED],
            None => &[],
        };
        self.only_in(match op {
            op::GET_INFO | op::CONFIGURE_VM | op::SET_TIME_PAGE => {
                &[NEW, PAUSED, RUNNING, RESTORING, ARMED]
            }
            op::SET_REGS if done => restores,
            op::GET_REG_LIST | op::GET_REGS | op::SET_REGS | op::GET_VM | op::WAIT_RUN => {
                &[PAUSED, RUNNING, RESTORING, ARMED]
            }
            op::SET_COUNTER_OFFSET => &[PAUSED, RESTORING],
            op::RESTORE_BEGIN => &[PAUSED, RESTORING, ARMED],
            op::SET_COUNTER_ANCHOR => &[PAUSED],
            op::PAUSE | op::RESUME => &[PAUSED, RUNNING, ARMED],
            op::CONFIRM_RUN => &[ARMED, RUNNING],
            op::SET_VM if !done => &[RESTORING],
            _ => restores,
        })?;
        let mut answer = Vec::new();
        match op {
            op::GET_INFO => answer = self.info(),
            op::CONFIGURE_VM => {
                self.configure(u32_at(body, 0), body[4], body[5], u64_at(body, 8))?;
            }
            op::GET_REG_LIST => answer = words(&self.ids()),
            op::GET_REGS => answer = self.get_regs(one, body)?,
            op::SET_REGS => answer = self.set_regs(one, body, done)?,
            op::GET_VM => answer = self.get_vm(u32_at(body, 0), u32_at(body, 4))?,
            op::SET_VM => answer = self.set_vm(body, done)?,
            op::SET_COUNTER_OFFSET => self.set_offset(u64_at(body, 0)),
            op::SET_COUNTER_ANCHOR => {
                self.anchor = Some((u64_at(body, 0), u64_at(body, 8)));
                self.forget_readings();
            }
            op::PAUSE => {
                let keep_counting = u32_at(body, 0) == 1;
                if self.phase != PAUSED && !keep_counting {
                    self.freeze();
                }
                self.restore = None;
                self.enter(PAUSED);
                answer = self.run();
            }
            op::RESUME => {
                if self.phase == PAUSED {
                    self.enter(self.running_or_armed());
                }
                answer = self.run();
            }
            op::RESTORE_BEGIN => {
                if u32_at(body, 0) != self.vcpus() {
                    return Err((status::EINVAL, 0));
                }
                self.restore_begin(u32_at(body, 4), u64_at(body, 8), u64_at(body, 16));
            }
            op::RESTORE_DONE => answer = words(&[self.restore_done(&[vcpu])?.into()]),
            op::WAIT_RUN if self.phase != RUNNING => {
                self.waiters.push(waiter);
                return Ok(None);
            }
            op::WAIT_RUN => answer = self.run(),
            op::RESTORE_ABORT => self.restore_abort(),
            op::CONFIRM_RUN => {
                answer = self.run();
                if answer[..16] != *body {
                    return Err((status::EINVAL, 0));
                }
                self.restore = None;
                self.enter(RUNNING);
            }
            _ => {
                // Where the memory is, only the device around the VM knows.
                let (address, length) = (u64_at(body, 0), u64_at(body, 8));
                let fits = length >= TIME_PAGE && address.is_multiple_of(TIME_PAGE);
                if length != 0 && !fits {
                    return Err((status::EINVAL, 0));
                }
            }
        }
        Ok(Some(answer))
    }

    fn info(&self) -> Vec<u8> {
        let restored = self.vcpus() - self.missing().len() as u32;
        let offset = |count: u64| match self.phase {
            NEW => 0,
            _ => self.host.wrapping_sub(count),
        };
        let [virt, phys] = self.counts().map(offset);
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let flags = flag(self.pinned, info_flag::OFFSET_PINNED)
            | flag(self.anchor.is_some(), info_flag::ANCHORED)
            | flag(self.physical_is_own, info_flag::PHYS_VIRTUALISED)
            | flag(self.confirms, info_flag::CONFIRM)
            | flag(self.one_offset, info_flag::ONE_OFFSET);
        let source = match self.anchor {
            Some(_) => info_source::MONOTONIC,
            None => self.profile.source,
        };
        let version = 1;
        words(&[
            version | u64::from(self.phase) << 32,
            u64::from(self.vcpus()) | u64::from(restored) << 32,
            self.frequency,
            virt,
            phys,
            self.epoch,
            u64::from(self.profile.max_vcpus)
                | u64::from(self.profile.request_queues) << 32
                | (self.abi as u64) << 48
                | u64::from(flags | source << 5) << 56,
            self.host,
        ])
    }

    /// PAUSE without KEEP_COUNTING.
    pub(super) fn freeze(&mut self) {
        self.clocks[0].counting = false;
        self.clocks[PHYSICAL].counting = !self.physical_is_own;
    }

    fn configure(&mut self, vcpus: u32, abi: u8, flags: u8, frequency: u64) -> Result<(), Refusal> {
        let confirms = flags & configure::CONFIRM != 0;
        let one_offset = flags & configure::ONE_OFFSET != 0;
        let own = self.profile.frequency;
        let frequency = if frequency == 0 { own } else { frequency };
        if self.phase != NEW {
            let same = vcpus == self.vcpus()
                && usize::from(abi) == self.abi
                && (confirms, one_offset) == (self.confirms, self.one_offset)
                && frequency == self.frequency;
            return if same { Ok(()) } else { Err(self.busy()) };
        }
        if abi > 1
            || vcpus == 0
            || vcpus > self.profile.max_vcpus
            || frequency > MAX_FREQUENCY
            || self.profile.frequency_fixed && frequency != own
        {
            return Err((status::EINVAL, 0));
        }
        self.abi = abi.into();
        self.frequency = frequency;
        self.vcpus = vec![Vcpu::default(); vcpus as usize];
        self.confirms = confirms;
        self.one_offset = one_offset;
        self.physical_is_own = one_offset;
        if !one_offset {
            self.clocks[PHYSICAL] = Clock {
                count: self.host,
                counting: true,
            };
        }
        self.enter(PAUSED);
        Ok(())
    }

    fn set_offset(&mut self, offset: u64) {
        let clock = Clock {
            count: self.host.wrapping_sub(offset),
            counting: true,
        };
        self.clocks = [clock; 2];
        self.pinned = true;
        self.physical_is_own = true;
    }

    fn get_regs(&mut self, vcpu: usize, body: &[u8]) -> Result<Vec<u8>, Refusal> {
        let mut answer = Vec::new();
        for (n, id) in (0..).zip(body.chunks(8)) {
            let id = u64_at(id, 0);
            let register = self.register(id).map_err(|status| (status, n))?;
            answer.extend(words(&[id, self.registers(vcpu)[register]]));
            let clock = register / 3;
            if register % 3 == 1 && self.clocks[clock].counting {
                self.vcpus[vcpu].told_by_get_regs[clock] = self.reading(clock);
            }
        }
        Ok(answer)
    }

    fn set_regs(&mut self, vcpu: usize, body: &[u8], done: bool) -> Result<Vec<u8>, Refusal> {
        let was_done = self.restore.is_some() && self.vcpus[vcpu].done;
        let written = if done && was_done {
            self.set_regs_again(vcpu, body).ok_or_else(|| self.busy())?
        } else {
            self.set_regs_now(vcpu, body)?
        };
        let remaining = match done {
            true => self.restore_done(&[vcpu as u32])?.to_le_bytes().to_vec(),
            false => Vec::new(),
        };
        let lines = self.lines(vcpu);
        Ok([words(&[u64::from(lines) | written << 32]), remaining].concat())
    }

    /// SET_REGS of a vCPU that has these values already. Returns how many are ignored.
    fn set_regs_again(&self, vcpu: usize, body: &[u8]) -> Option<u64> {
        let values = self.values(body).ok()?;
        let has = |register: usize| values[register].is_none_or(|it| self.has(vcpu, register, it));
        (0..6).all(has).then(|| {
            let ignored = |register: &usize| values[*register].is_some() && self.ignores(*register);
            (0..6).filter(ignored).count() as u64
        })
    }

    /// The values that SET_REGS sets, by register.
    fn values(&self, body: &[u8]) -> Result<[Option<u64>; 6], Refusal> {
        let mut values = [None; 6];
        for (n, entry) in (0..).zip(body.chunks(16)) {
            let (id, value) = (u64_at(entry, 0), u64_at(entry, 8));
            let register = self.register(id).map_err(|status| (status, n))?;
            let differs = values[register].is_some_and(|before| before != value);
            if differs || self.is_too_large(register, value) {
                return Err((status::EINVAL, n));
            }
            values[register] = Some(value);
        }
        Ok(values)
    }

    /// SET_REGS. Returns how many writes are ignored.
    fn set_regs_now(&mut self, vcpu: usize, body: &[u8]) -> Result<u64, Refusal> {
        let writes_a_count = |entry: &[u8]| {
            let register = self.register(u64_at(entry, 0));
            register.is_ok_and(|it| it % 3 == 1 && !self.ignores(it))
        };
        let a_count = body.chunks(16).any(writes_a_count);
        let done = self.phase == RESTORING && self.vcpus[vcpu].done;
        if done || [RUNNING, ARMED].contains(&self.phase) && a_count {
            return Err(self.busy());
        }
        let values = self.values(body)?;
        let mut ignored = 0;
        for (register, value) in values.into_iter().enumerate() {
            if let Some(value) = value {
                ignored += u64::from(self.write(vcpu, register, value));
            }
        }
        let counts = self.counts();
        for (timer, count) in self.vcpus[vcpu].timers.iter_mut().zip(counts) {
            timer.to_report &= timer.line(count);
        }
        Ok(ignored)
    }

    fn get_vm(&mut self, first: u32, count: u32) -> Result<Vec<u8>, Refusal> {
        let vcpus: Range<usize> = first as usize..first as usize + count as usize;
        if vcpus.end > self.vcpus.len() {
            return Err((status::EINVAL, 0));
        }
        let [virt, phys] = self.counts();
        let range = u64::from(first) | u64::from(count) << 32;
        let mut answer = words(&[virt, phys, self.host, self.frequency, range]);
        for vcpu in vcpus.clone() {
            let row = contract::Vcpu::with(vcpu as u32, self.registers(vcpu));
            answer.extend(row.to_bytes());
        }
        for clock in 0..2 {
            if let Some(reading) = self.reading(clock) {
                self.vm_told[clock] = Some(reading);
                for vcpu in vcpus.clone() {
                    self.vcpus[vcpu].told_by_get_vm[clock] = Some(reading);
                }
            }
        }
        Ok(answer)
    }

    fn set_vm(&mut self, body: &[u8], done: bool) -> Result<Vec<u8>, Refusal> {
        let rows: Vec<_> = body.chunks(56).map(contract::Vcpu::of).collect();
        let index = |row: &contract::Vcpu| row.vcpu as usize;
        let is_present = |row: &contract::Vcpu, register: usize| row.present >> register & 1 != 0;
        let is_wrong = |vm: &Self, row: &contract::Vcpu| {
            let too_large = |register| vm.is_too_large(register, row.registers[register]);
            row.present > 0x3f || (0..6).any(|it| is_present(row, it) && too_large(it))
        };
        for row in rows.iter().filter(|row| row.vcpu < self.vcpus()) {
            let has = |it: usize| self.has(index(row), it, row.registers[it]);
            let same = (0..6).all(|register| !is_present(row, register) || has(register));
            let again = done && same && !is_wrong(self, row);
            if self.vcpus[index(row)].done && !again {
                return Err(self.busy());
            }
        }
        for (n, row) in rows.iter().enumerate() {
            let twice = rows[..n].iter().any(|other| other.vcpu == row.vcpu);
            if row.vcpu >= self.vcpus() || twice || is_wrong(self, row) {
                return Err((status::EINVAL, n as u32));
            }
        }
        for row in &rows {
            if self.vcpus[index(row)].done {
                continue;
            }
            for register in 0..6 {
                if is_present(row, register) {
                    self.write(index(row), register, row.registers[register]);
                }
            }
        }
        if !done {
            return Ok(Vec::new());
        }
        let vcpus: Vec<_> = rows.iter().map(|row| row.vcpu).collect();
        Ok(words(&[self.restore_done(&vcpus)?.into()]))
    }
}
