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

    // Reading.

    /// The count as this vCPU's register reads it: what it brought, while a restore is open,
    /// and the VM's count otherwise.
    fn vcpu_count(&self, vcpu: usize, timeline: Timeline, host: u64) -> u64 {
        self.restoring()
            .filter(|_| !self.pinned)
            .and_then(|restore| restore.staged[vcpu].count(timeline))
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

    /// Whether the phase lets this vCPU's registers be written, with a count among them or not.
    pub(super) fn may_write(&self, vcpu: usize, a_count: bool) -> bool {
        match &self.state {
            State::Paused => true,
            State::Running(_) => !a_count || self.pinned,
            State::Restoring { restore, .. } => !restore.staged[vcpu].done,
        }
    }

    /// Writes the registers of `values` that are present, all together. [`Configured::may_write`]
    /// allowed it. Returns how many were counts that a pinned offset makes ignored.
    pub(super) fn write(&mut self, vcpu: usize, values: &wire::Vcpu) -> u32 {
        let mut ignored = 0;
        for &(register, _) in self.abi.registers() {
            if values.has(register) {
                ignored += u32::from(self.write_one(vcpu, register, values.get(register)));
            }
        }
        self.timers_changed(vcpu);
        ignored
    }

    /// Returns whether it was a count that a pinned offset makes ignored.
    fn write_one(&mut self, vcpu: usize, register: Register, value: u64) -> bool {
        let timeline = register.timeline();
        if let Some(restore) = self.restoring_mut() {
            restore.staged[vcpu].present |= register.present_bit();
        }
        let timer = &mut self.vcpus[vcpu].timers[timeline.index()];
        match register.role() {
            Role::Control => timer.set_control(value),
            Role::Compare => timer.cval = value,
            Role::Count if self.pinned => return true,
            Role::Count => self.write_count(vcpu, timeline, value),
        }
        false
    }

    fn write_count(&mut self, vcpu: usize, timeline: Timeline, count: u64) {
        if let Some(restore) = self.restoring_mut() {
            restore.staged[vcpu].counts[timeline.index()] = count;
        } else if !self.was_reported(vcpu, timeline, count) {
            self.clocks[timeline.index()] = Clock::Frozen { count };
            self.phys_virtualised |= timeline == Timeline::Physical;
        }
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
