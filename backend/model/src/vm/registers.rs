//! What a vCPU's registers read, and what writing them does.
//!
//! Everything here goes by a register's timeline and role; no register is known by name.

use core::ops::Range;

use vhost_user_timer_protocol::{Register, Role, Timeline, wire};
use zerocopy::little_endian::U64;

use super::call::Refusal;
use super::clock::Clock;
use super::configured::{Configured, State};
use super::timer::Timer;
use super::vcpu::ReportedCount;

/// What a register of this role reads, given its timer and the count of its timeline.
#[inline]
fn read(role: Role, timer: Timer, count: u64) -> u64 {
    match role {
        Role::Control => timer.control(count),
        Role::Count => count,
        Role::Compare => timer.cval,
    }
}

impl Configured {
    /// The register that an id names; `entry` is its index in the request.
    pub(super) fn register_of(&self, entry: usize, id: U64) -> Result<Register, Refusal> {
        Register::from_id(id.get(), self.abi).map_err(|bad| Refusal::bad_id(bad, entry))
    }

    /// Whether this timeline's count is the virtual one (ONE_OFFSET).
    pub(super) fn follows(&self, timeline: Timeline) -> bool {
        self.flags.one_offset && timeline != Timeline::Virtual
    }

    // Reading.

    /// The count as this vCPU's register reads it: what it brought, while a restore is open,
    /// and the VM's count otherwise.
    fn vcpu_count(&self, vcpu: usize, timeline: Timeline, host: u64) -> u64 {
        let Some(restore) = self.restoring() else {
            // A timeline that follows another has a clock that does the same.
            return self.count(timeline, host);
        };
        let timeline = match self.follows(timeline) {
            true => Timeline::Virtual,
            false => timeline,
        };
        let brought = restore.staged[vcpu].count(timeline);
        brought
            .filter(|_| !self.pinned)
            .unwrap_or_else(|| self.count(timeline, host))
    }

    pub(super) fn register(&self, vcpu: usize, register: Register, host: u64) -> u64 {
        let timeline = register.timeline();
        let timer = self.vcpus[vcpu].timers[timeline.index()];
        read(
            register.role(),
            timer,
            self.vcpu_count(vcpu, timeline, host),
        )
    }

    /// All registers of a vCPU.
    pub(super) fn vcpu(&self, vcpu: usize, host: u64) -> wire::Vcpu {
        let timers = &self.vcpus[vcpu].timers;
        let counts = Timeline::ALL.map(|timeline| self.vcpu_count(vcpu, timeline, host));
        let mut values = wire::Vcpu {
            vcpu: (vcpu as u32).into(),
            ..Default::default()
        };
        for &(register, _) in self.abi.registers() {
            let index = register.timeline().index();
            values.set(
                register,
                read(register.role(), timers[index], counts[index]),
            );
        }
        values
    }

    /// The levels of the vCPU's interrupt lines, as the wire's bits.
    pub(super) fn lines(&self, vcpu: usize, host: u64) -> u32 {
        let timers = &self.vcpus[vcpu].timers;
        Timeline::ALL.into_iter().fold(0, |lines, timeline| {
            let count = self.vcpu_count(vcpu, timeline, host);
            match timers[timeline.index()].line(count) {
                true => lines | timeline.line_bit(),
                false => lines,
            }
        })
    }

    // What was reported.

    /// Remembers that this register's value is reported to the vCPU, where it is a count.
    pub(super) fn report_to_vcpu(&mut self, vcpu: usize, register: Register, host: u64) {
        let timeline = register.timeline();
        if register.role() == Role::Count
            && let Some(reported) = self.reported_count(timeline, host)
        {
            self.vcpus[vcpu].reported[timeline.index()] = Some(reported);
        }
    }

    /// Remembers that the counts are reported of the VM, and of these vCPUs.
    pub(super) fn report_by_get_vm(&mut self, vcpus: Range<u32>, host: u64) {
        for timeline in Timeline::ALL {
            if let Some(reported) = self.reported_count(timeline, host) {
                self.reported[timeline.index()] = Some(reported);
                for vcpu in &mut self.vcpus[vcpus.start as usize..vcpus.end as usize] {
                    vcpu.reported_by_get_vm[timeline.index()] = Some(reported);
                }
            }
        }
    }

    /// What to remember when a clock's count is reported; nothing if the clock is frozen, since
    /// no time passes then before the count is written back.
    fn reported_count(&self, timeline: Timeline, host: u64) -> Option<ReportedCount> {
        match self.clocks[timeline.index()] {
            Clock::Counting { offset } => Some(ReportedCount {
                count: host.wrapping_sub(offset),
                offset,
            }),
            Clock::Frozen { .. } => None,
        }
    }

    /// Whether this count was reported to this vCPU, and its clock has kept counting at the same
    /// offset.
    fn was_reported(&self, vcpu: usize, timeline: Timeline, count: u64) -> bool {
        let Clock::Counting { offset } = self.clocks[timeline.index()] else {
            return false;
        };
        let written = Some(ReportedCount { count, offset });
        let vcpu = &self.vcpus[vcpu];
        [vcpu.reported, vcpu.reported_by_get_vm, self.reported]
            .iter()
            .any(|reported| reported[timeline.index()] == written)
    }

    // Writing.

    /// Whether a write of this register is ignored: a count whose offset is pinned, or that follows
    /// the virtual one.
    pub(super) fn ignores(&self, register: Register) -> bool {
        register.role() == Role::Count && (self.pinned || self.follows(register.timeline()))
    }

    /// How many of the registers of `values` that are present are counts whose writes are ignored.
    pub(super) fn ignored(&self, values: &wire::Vcpu) -> u32 {
        if !self.pinned && !self.flags.one_offset {
            return 0;
        }
        let ignored = self.registers_in(values).filter(|it| self.ignores(*it));
        ignored.count() as u32
    }

    fn registers_in(&self, values: &wire::Vcpu) -> impl Iterator<Item = Register> {
        let registers = self.abi.registers().iter().map(|&(register, _)| register);
        registers.filter(|register| values.has(*register))
    }

    /// Whether the phase lets this vCPU's registers be written, with a count among them that is not
    /// ignored, or without.
    pub(super) fn may_write(&self, vcpu: usize, a_count: bool) -> bool {
        match &self.state {
            State::Paused => true,
            State::Running(_) | State::Armed(_) => !a_count,
            State::Restoring(open) => !open.restore.staged[vcpu].done,
        }
    }

    /// Whether this vCPU is done in a restore that can still be aborted.
    pub(super) fn is_done(&self, vcpu: usize) -> bool {
        let staged = self.restore().and_then(|restore| restore.staged.get(vcpu));
        staged.is_some_and(|staged| staged.done)
    }

    /// Whether a vCPU that is done has the registers of `values` that are present: controls by the
    /// bits that are stored, counts by what the vCPU brought. Ignored counts are not compared.
    pub(super) fn has_already(&self, vcpu: usize, values: &wire::Vcpu) -> bool {
        let mut compared = self.registers_in(values).filter(|it| !self.ignores(*it));
        compared.all(|register| {
            let timeline = register.timeline();
            let timer = self.vcpus[vcpu].timers[timeline.index()];
            let value = values.get(register);
            match register.role() {
                Role::Control => Timer::new(value, timer.cval) == timer,
                Role::Compare => timer.cval == value,
                Role::Count => self
                    .restore()
                    .is_some_and(|restore| restore.staged[vcpu].count(timeline) == Some(value)),
            }
        })
    }

    /// Writes the registers of `values` that are present, all together. [`Configured::may_write`]
    /// allowed it.
    pub(super) fn write(&mut self, vcpu: usize, values: &wire::Vcpu) {
        for &(register, _) in self.abi.registers() {
            if values.has(register) {
                self.write_one(vcpu, register, values.get(register));
            }
        }
        self.timers_changed(vcpu);
    }

    fn write_one(&mut self, vcpu: usize, register: Register, value: u64) {
        let timeline = register.timeline();
        if let Some(restore) = self.restoring_mut() {
            restore.staged[vcpu].present |= register.present_bit();
        }
        let timer = &mut self.vcpus[vcpu].timers[timeline.index()];
        match register.role() {
            Role::Control => timer.set_control(value),
            Role::Compare => timer.cval = value,
            Role::Count if self.pinned => {}
            Role::Count => self.write_count(vcpu, timeline, value),
        }
    }

    fn write_count(&mut self, vcpu: usize, timeline: Timeline, count: u64) {
        if let Some(restore) = self.restoring_mut() {
            // Also a count that follows another: the log says how far it moves.
            restore.staged[vcpu].counts[timeline.index()] = count;
        } else if !self.follows(timeline) && !self.was_reported(vcpu, timeline, count) {
            self.set_count(timeline, count);
        }
    }

    /// Freezes the clock of this timeline, and those that follow it, at this count.
    fn set_count(&mut self, timeline: Timeline, count: u64) {
        for each in Timeline::ALL {
            if each == timeline || self.follows(each) {
                self.clocks[each.index()] = Clock::Frozen { count };
            }
        }
        self.phys_virtualised |= timeline == Timeline::Physical;
    }

    /// Tells the schedule that this vCPU's timers may have changed.
    fn timers_changed(&mut self, vcpu: usize) {
        if let State::Running(schedule) = &mut self.state {
            for timeline in Timeline::ALL {
                let timer = self.vcpus[vcpu].timers[timeline.index()];
                schedule.timer_changed(vcpu as u32, timeline, timer);
            }
        }
    }
}
