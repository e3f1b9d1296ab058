//! A configured VM: two clocks, a timer of each per vCPU, and what state they are in.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use core::ops::Range;

use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, Phase, Register, Role, Timeline};
use zerocopy::little_endian::U64;

use super::Refusal;
use super::clock::{Clock, Now, ticks_of_ns, ticks_to_pass};
use super::restore::{Restore, Staged, Terms};
use super::saved::SavedVcpu;
use super::schedule::{Schedule, Timers};

/// A count that a vCPU was told of a counting clock, and the offset it then had.
///
/// Writing such a count back says nothing new. Taking it for a new count, as KVM does, would
/// set the clock back by the time between the read and the write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Told {
    count: u64,
    offset: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Vcpu {
    pub(super) timers: Timers,
    /// The counts that it was told by GET_REGS.
    told: [Option<Told>; 2],
    /// The counts that it was told by GET_VM, which can read the VM in parts.
    told_by_vm: [Option<Told>; 2],
}

impl Vcpu {
    pub(super) fn with_timers(timers: Timers) -> Self {
        Vcpu {
            timers,
            ..Vcpu::default()
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum State {
    Paused,
    Running(Schedule),
    Restoring(Restore),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Machine {
    pub(super) abi: Abi,
    /// Hz.
    pub(super) frequency: u64,
    pub(super) anchor: Option<Anchor>,
    pub(super) clocks: [Clock; 2],
    /// SET_COUNTER_OFFSET fixed the offset.
    pub(super) pinned: bool,
    /// The physical clock is the VM's own. Outside RESTORING it passes the host counter
    /// through where this is not so.
    pub(super) phys_virtualised: bool,
    pub(super) vcpus: Vec<Vcpu>,
    /// The counts of the VM that GET_VM told last, of which any vCPU may make use.
    told: [Option<Told>; 2],
    pub(super) state: State,
}

impl Machine {
    pub(super) fn new(vcpus: u32, abi: Abi, frequency: u64) -> Self {
        Machine {
            abi,
            frequency,
            anchor: None,
            clocks: [Clock::Frozen { count: 0 }, Clock::PASSED_THROUGH],
            pinned: false,
            phys_virtualised: false,
            vcpus: vec![Vcpu::default(); vcpus as usize],
            told: [None; 2],
            state: State::Paused,
        }
    }

    pub(super) fn vcpus(&self) -> u32 {
        self.vcpus.len() as u32
    }

    pub(super) fn phase(&self) -> Phase {
        match self.state {
            State::Paused => Phase::Paused,
            State::Running(_) => Phase::Running,
            State::Restoring(_) => Phase::Restoring,
        }
    }

    pub(super) fn restoring(&self) -> Option<&Restore> {
        match &self.state {
            State::Restoring(restore) => Some(restore),
            _ => None,
        }
    }

    pub(super) fn count(&self, clock: Timeline, host: u64) -> u64 {
        self.clocks[clock.index()].count(host)
    }

    pub(super) fn offset(&self, clock: Timeline, host: u64) -> u64 {
        self.clocks[clock.index()].offset(host)
    }

    fn counts(&self, host: u64) -> [u64; 2] {
        self.clocks.map(|clock| clock.count(host))
    }

    pub(super) fn run(&self, host: u64) -> wire::Run {
        wire::Run {
            cntvoff: self.offset(Timeline::Virtual, host).into(),
            cntpoff: self.offset(Timeline::Physical, host).into(),
            virt_count: self.count(Timeline::Virtual, host).into(),
            phys_count: self.count(Timeline::Physical, host).into(),
            host_count: host.into(),
        }
    }

    // Registers.

    /// The count as this vCPU's register reads it: what it brought, while a restore is open,
    /// and the VM's count otherwise.
    fn vcpu_count(&self, vcpu: usize, clock: Timeline, host: u64) -> u64 {
        self.restoring()
            .filter(|_| !self.pinned)
            .and_then(|restore| restore.staged[vcpu].count(clock))
            .unwrap_or_else(|| self.count(clock, host))
    }

    pub(super) fn register(&self, vcpu: usize, register: Register, host: u64) -> u64 {
        let timeline = register.timeline();
        let timer = self.vcpus[vcpu].timers[timeline.index()];
        let count = self.vcpu_count(vcpu, timeline, host);
        match register.role() {
            Role::Control => timer.control(count),
            Role::Count => count,
            Role::Compare => timer.cval,
        }
    }

    pub(super) fn vcpu(&self, vcpu: usize, host: u64) -> wire::Vcpu {
        let mut values = wire::Vcpu {
            vcpu: (vcpu as u32).into(),
            ..Default::default()
        };
        for &(register, _) in self.abi.registers() {
            values.set(register, self.register(vcpu, register, host));
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

    /// Notes that this vCPU is told the count that it reads now.
    pub(super) fn tell_vcpu(&mut self, vcpu: usize, register: Register, host: u64) {
        let timeline = register.timeline();
        if register.role() == Role::Count
            && let Some(told) = self.telling(timeline, host)
        {
            self.vcpus[vcpu].told[timeline.index()] = Some(told);
        }
    }

    /// Notes that the counts of now are told of the VM, and of these vCPUs.
    pub(super) fn tell_vm(&mut self, vcpus: Range<u32>, host: u64) {
        for clock in Timeline::ALL {
            if let Some(told) = self.telling(clock, host) {
                self.told[clock.index()] = Some(told);
                for vcpu in &mut self.vcpus[vcpus.start as usize..vcpus.end as usize] {
                    vcpu.told_by_vm[clock.index()] = Some(told);
                }
            }
        }
    }

    /// What there is to remember of telling a clock's count: nothing, if it is frozen, since
    /// then no time passes before it is written back.
    fn telling(&self, clock: Timeline, host: u64) -> Option<Told> {
        match self.clocks[clock.index()] {
            Clock::Counting { offset } => Some(Told {
                count: host.wrapping_sub(offset),
                offset,
            }),
            Clock::Frozen { .. } => None,
        }
    }

    /// Whether this vCPU was told the count of this clock, and the clock has gone on counting
    /// since.
    fn was_told(&self, vcpu: usize, clock: Timeline, count: u64) -> bool {
        let Clock::Counting { offset } = self.clocks[clock.index()] else {
            return false;
        };
        let known = Some(Told { count, offset });
        let vcpu = &self.vcpus[vcpu];
        [vcpu.told, vcpu.told_by_vm, self.told]
            .iter()
            .any(|told| told[clock.index()] == known)
    }

    /// Writes one register that [`Machine::may_write`] allowed. Returns whether it was a count
    /// that the pinned offset makes ignored.
    pub(super) fn write(&mut self, vcpu: usize, register: Register, value: u64) -> bool {
        if let State::Restoring(restore) = &mut self.state {
            restore.staged[vcpu].present |= register.present_bit();
        }
        let timer = &mut self.vcpus[vcpu].timers[register.timeline().index()];
        match register.role() {
            Role::Control => timer.set_control(value),
            Role::Count => return self.write_count(vcpu, register.timeline(), value),
            Role::Compare => timer.cval = value,
        }
        false
    }

    fn write_count(&mut self, vcpu: usize, clock: Timeline, count: u64) -> bool {
        if self.pinned {
            return true;
        }
        if let State::Restoring(restore) = &mut self.state {
            restore.staged[vcpu].stage_count(clock, count);
            return false;
        }
        if !self.was_told(vcpu, clock, count) {
            self.clocks[clock.index()] = Clock::Frozen { count };
            self.phys_virtualised |= clock == Timeline::Physical;
        }
        false
    }

    /// Takes in that writes may have changed this vCPU's timers.
    pub(super) fn rewritten(&mut self, vcpu: usize) {
        if let State::Running(schedule) = &mut self.state {
            for clock in Timeline::ALL {
                let timer = self.vcpus[vcpu].timers[clock.index()];
                schedule.rewritten(vcpu as u32, clock, timer);
            }
        }
    }

    /// Whether the phase lets this vCPU's registers be written, a count among them or not.
    pub(super) fn may_write(&self, vcpu: usize, a_count: bool) -> bool {
        match &self.state {
            State::Paused => true,
            State::Running(_) => !a_count || self.pinned,
            State::Restoring(restore) => !restore.staged[vcpu].done,
        }
    }

    /// The registers that ids name.
    pub(super) fn register_of(&self, entry: usize, id: U64) -> Result<Register, Refusal> {
        Register::from_id(id.get(), self.abi).map_err(|bad| Refusal::bad_id(bad, entry))
    }

    // Time.

    /// The host counter at `monotonic_ns` of CLOCK_MONOTONIC has been told by the VMM.
    pub(super) fn set_anchor(&mut self, anchor: Anchor) {
        self.anchor = Some(anchor);
        // What was told before was told of another host counter.
        self.told = [None; 2];
        for vcpu in &mut self.vcpus {
            vcpu.told = [None; 2];
            vcpu.told_by_vm = [None; 2];
        }
    }

    pub(super) fn pin_offset(&mut self, offset: u64) {
        self.clocks = [Clock::Counting { offset }; 2];
        self.pinned = true;
        self.phys_virtualised = true;
    }

    fn freeze(&mut self, clock: Timeline, host: u64) {
        let clock = &mut self.clocks[clock.index()];
        *clock = clock.frozen(host);
    }

    pub(super) fn pause(&mut self, keep_counting: bool, host: u64) {
        if !keep_counting {
            self.freeze(Timeline::Virtual, host);
            if self.phys_virtualised {
                self.freeze(Timeline::Physical, host);
            }
        }
        self.state = State::Paused;
    }

    pub(super) fn resume(&mut self, host: u64) {
        self.clocks = self.clocks.map(|clock| clock.counting(host));
        self.go_on(host);
    }

    /// Runs, with the clocks as they are.
    pub(super) fn go_on(&mut self, host: u64) {
        let timers = self.vcpus.iter().map(|vcpu| &vcpu.timers);
        self.state = State::Running(Schedule::start(timers, self.counts(host)));
    }

    /// Finds the expiries up to now, where the VM runs.
    pub(super) fn advance(&mut self, host: u64) {
        let counts = self.counts(host);
        if let State::Running(schedule) = &mut self.state {
            schedule.advance(self.vcpus.iter().map(|vcpu| &vcpu.timers), counts);
        }
    }

    /// Ticks to the next instant at which time alone changes something.
    pub(super) fn ticks_to_next(&self, host: u64) -> Option<u64> {
        match &self.state {
            State::Paused => None,
            State::Running(schedule) => Some(schedule.ticks_to_next(self.counts(host))),
            State::Restoring(restore) => restore.ticks_to_timeout(host),
        }
    }

    /// The next timer of which the frontend must hear, as an event. An event whose line has
    /// fallen is dropped.
    pub(super) fn next_event(&mut self, host: u64, epoch: u64) -> Option<wire::Event> {
        let State::Running(schedule) = &mut self.state else {
            return None;
        };
        loop {
            let (vcpu, clock) = schedule.next_untold()?;
            let timer = self.vcpus[vcpu as usize].timers[clock.index()];
            let count = self.clocks[clock.index()].count(host);
            if timer.line(count) {
                return Some(wire::Event {
                    kind: wire::EVENT_TIMER_ASSERTED.into(),
                    timer: clock.code().into(),
                    vcpu: vcpu.into(),
                    cval: timer.cval.into(),
                    count: count.into(),
                    epoch: epoch.into(),
                });
            }
        }
    }

    /// Every line that stands high is told again.
    pub(super) fn tell_lines_again(&mut self, host: u64) {
        let counts = self.counts(host);
        if let State::Running(schedule) = &mut self.state {
            for (index, vcpu) in (0..).zip(&self.vcpus) {
                for clock in Timeline::ALL {
                    if vcpu.timers[clock.index()].line(counts[clock.index()]) {
                        schedule.tell(index, clock);
                    }
                }
            }
        }
    }

    // Restore.

    /// Opens a restore, or opens the open one anew.
    pub(super) fn begin_restore(&mut self, begin: &wire::RestoreBegin, host: u64) {
        let before = match core::mem::replace(&mut self.state, State::Paused) {
            State::Restoring(open) => {
                self.clone_from(&open.before);
                open.before
            }
            _ => Box::new(self.clone()),
        };
        let timeout_ns = begin.timeout_ns.get();
        let terms = Terms {
            flags: begin.flags.get(),
            saved_realtime_ns: begin.saved_realtime_ns.get(),
            began: host,
            timeout: (timeout_ns != 0).then(|| ticks_to_pass(timeout_ns, self.frequency)),
        };
        let staged = vec![Staged::default(); self.vcpus.len()];
        self.open_restore(Restore::open(before, terms, staged), host);
    }

    /// Both clocks stand still from here on, and the offset is nobody's yet.
    fn open_restore(&mut self, restore: Restore, host: u64) {
        self.pinned = false;
        self.freeze(Timeline::Virtual, host);
        self.freeze(Timeline::Physical, host);
        self.state = State::Restoring(restore);
    }

    /// Opens a restore of a saved VM: every vCPU has brought the same counts, and its timers.
    pub(super) fn load(
        &mut self,
        before: Machine,
        terms: Terms,
        staged: Staged,
        timers: &[SavedVcpu],
        host: u64,
    ) {
        for (vcpu, saved) in self.vcpus.iter_mut().zip(timers) {
            vcpu.timers[0].set_control(saved.ctl);
            vcpu.timers[0].cval = saved.cval;
            vcpu.timers[1].set_control(saved.pctl);
            vcpu.timers[1].cval = saved.pcval;
        }
        let staged = vec![staged; self.vcpus.len()];
        self.open_restore(Restore::open(Box::new(before), terms, staged), host);
    }

    /// Gives an open restore up: everything is as it was before.
    pub(super) fn abort_restore(&mut self) {
        if let State::Restoring(open) = core::mem::replace(&mut self.state, State::Paused) {
            *self = *open.before;
        }
    }

    /// What a vCPU has brought in the open restore.
    pub(super) fn staged(&self, vcpu: usize) -> Option<&Staged> {
        self.restoring().map(|restore| &restore.staged[vcpu])
    }

    /// Closes the restore after the last vCPU: `settled` are the counts that vCPUs brought.
    pub(super) fn complete_restore(&mut self, settled: [Option<u64>; 2], now: Now) -> Completed {
        let State::Restoring(restore) = core::mem::replace(&mut self.state, State::Paused) else {
            return Completed::default();
        };
        let mut completed = Completed::default();
        if !self.pinned {
            let mut elapsed = 0;
            if restore.elapsed() {
                match now.realtime_ns.checked_sub(restore.terms.saved_realtime_ns) {
                    Some(ns) => elapsed = ticks_of_ns(ns, self.frequency),
                    None => {
                        completed.realtime_went_back_ns =
                            Some(restore.terms.saved_realtime_ns - now.realtime_ns);
                    }
                }
            }
            self.phys_virtualised |= settled[Timeline::Physical.index()].is_some();
            for clock in Timeline::ALL {
                let count = settled[clock.index()].unwrap_or(self.count(clock, now.host));
                self.clocks[clock.index()] = Clock::Frozen {
                    count: count.wrapping_add(elapsed),
                };
            }
            if !self.phys_virtualised {
                self.clocks[Timeline::Physical.index()] = Clock::PASSED_THROUGH;
            }
        }
        if restore.autorun() {
            self.resume(now.host);
        }
        completed
    }
}

/// What there is to say of a restore that was completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Completed {
    /// With ELAPSED: how far the wall clock lies before the save.
    pub(super) realtime_went_back_ns: Option<u64>,
}
