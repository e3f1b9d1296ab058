//! A state that a VM may be in, and what each request makes of it (SPEC.md, "Operations").

use vhost_user_timer_protocol::wire::{self, ctl, info_flags, present, restore_flags};
use vhost_user_timer_protocol::{Phase, Register, Status};

use super::{Answer, Ask, Span};
use crate::watch::HOST_FREQUENCY;

/// Bits of a control register that are stored.
const STORED: u64 = ctl::ENABLE | ctl::IMASK;

/// The register's place in a vCPU's.
const TIMERS: [[Register; 3]; 2] = [
    [Register::TimerCtl, Register::TimerCnt, Register::TimerCval],
    [
        Register::PtimerCtl,
        Register::PtimerCnt,
        Register::PtimerCval,
    ],
];

/// A VM as it may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    epoch: u64,
    /// `None` in NEW.
    machine: Option<Machine>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    clocks: [Clock; 2],
    pinned: bool,
    phys_virtualised: bool,
    /// By how much the host counter is ahead of CLOCK_MONOTONIC, where the VMM has said so.
    anchor: Option<u64>,
    /// [control, compare value] of the virtual timer and of the physical one.
    timers: Vec<[[u64; 2]; 2]>,
    running: bool,
    restore: Option<Box<Restore>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clock {
    /// With this offset.
    Counting(Span),
    /// At this count.
    Frozen(Span),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Restore {
    before: Machine,
    flags: u32,
    staged: Vec<Staged>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Staged {
    present: u32,
    counts: [u64; 2],
    done: bool,
}

/// A request that is refused: status and detail.
type Refused = (Status, u32);

impl Default for State {
    fn default() -> Self {
        State {
            epoch: 1,
            machine: None,
        }
    }
}

impl Clock {
    fn count(self, host: Span) -> Span {
        match self {
            Clock::Counting(offset) => host - offset,
            Clock::Frozen(count) => count,
        }
    }

    fn freeze(&mut self, host: Span) {
        *self = Clock::Frozen(self.count(host));
    }

    fn count_on(&mut self, host: Span) {
        if let Clock::Frozen(count) = *self {
            *self = Clock::Counting(host - count);
        }
    }

    /// Takes in that the count was this, when the host counter was that.
    fn was(&mut self, count: u64, host: u64) -> Result<(), String> {
        let offset = Span::exactly(host.wrapping_sub(count));
        let known = match *self {
            Clock::Counting(known) => known.met_with(offset).map(Clock::Counting),
            Clock::Frozen(known) => known.met_with(Span::exactly(count)).map(Clock::Frozen),
        };
        let wrong = || format!("the count is {count} at {host}, of the clock {self:?}");
        *self = known.ok_or_else(wrong)?;
        Ok(())
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, should: T) -> Result<(), String> {
    if is == should {
        return Ok(());
    }
    Err(format!("{what} is {is:?} and should be {should:?}"))
}

impl Machine {
    fn new(vcpus: u32) -> Self {
        Machine {
            clocks: [
                Clock::Frozen(Span::exactly(0)),
                Clock::Counting(Span::exactly(0)),
            ],
            pinned: false,
            phys_virtualised: false,
            anchor: None,
            timers: vec![[[0; 2]; 2]; vcpus as usize],
            running: false,
            restore: None,
        }
    }

    fn phase(&self) -> Phase {
        match (&self.restore, self.running) {
            (Some(_), _) => Phase::Restoring,
            (None, true) => Phase::Running,
            (None, false) => Phase::Paused,
        }
    }

    fn missing(&self) -> u32 {
        let staged = self.restore.iter().flat_map(|restore| &restore.staged);
        staged.filter(|staged| !staged.done).count() as u32
    }

    fn resume(&mut self, host: Span) {
        for clock in &mut self.clocks {
            clock.count_on(host);
        }
        self.running = true;
    }

    fn pause(&mut self, keep_counting: bool, host: Span) {
        if !keep_counting {
            self.clocks[0].freeze(host);
            if self.phys_virtualised {
                self.clocks[1].freeze(host);
            }
        }
        self.running = false;
    }

    fn begin_restore(&mut self, flags: u32, host: Span) {
        let before = match self.restore.take() {
            Some(open) => open.before,
            None => self.clone(),
        };
        *self = before.clone();
        self.pinned = false;
        for clock in &mut self.clocks {
            clock.freeze(host);
        }
        let staged = vec![Staged::default(); self.timers.len()];
        self.restore = Some(Box::new(Restore {
            before,
            flags,
            staged,
        }));
    }

    /// The registers that this vCPU must still bring, as [`present`] bits.
    fn lacks(&self, vcpu: usize) -> u32 {
        let count = if self.pinned { 0 } else { present::CNT };
        let restore = self.restore.as_ref();
        let brought = restore.map_or(present::ALL, |restore| restore.staged[vcpu].present);
        (present::CTL | present::CVAL | count) & !brought
    }

    fn restore_done(&mut self, vcpu: usize, host: Span) -> Result<(), Refused> {
        let lacks = self.lacks(vcpu);
        let (pinned, missing) = (self.pinned, self.missing());
        let Some(restore) = &mut self.restore else {
            return Err((Status::Busy, self.phase().code()));
        };
        if lacks != 0 {
            return Err((Status::Incomplete, lacks));
        }
        let last = missing == 1 && !restore.staged[vcpu].done;
        let brought = |clock: usize| -> Vec<u64> {
            let bit = TIMERS[clock][1].present_bit();
            let staged = restore
                .staged
                .iter()
                .filter(|staged| staged.present & bit != 0);
            staged.map(|staged| staged.counts[clock]).collect()
        };
        let brought = [brought(0), brought(1)];
        let equal = |counts: &Vec<u64>| counts.windows(2).all(|pair| pair[0] == pair[1]);
        let strict = restore.flags & restore_flags::STRICT != 0;
        if last && strict && !pinned && !brought.iter().all(equal) {
            return Err((Status::Invalid, 0));
        }
        restore.staged[vcpu].done = true;
        if last {
            let autorun = restore.flags & restore_flags::AUTORUN != 0;
            self.restore = None;
            if !pinned {
                self.phys_virtualised |= !brought[1].is_empty();
                for (clock, counts) in self.clocks.iter_mut().zip(&brought) {
                    if let Some(largest) = counts.iter().max() {
                        *clock = Clock::Frozen(Span::exactly(*largest));
                    }
                }
                if !self.phys_virtualised {
                    self.clocks[1] = Clock::Counting(Span::exactly(0));
                }
            }
            if autorun {
                self.resume(host);
            }
        }
        Ok(())
    }

    /// Writes a register. Returns whether it was a count that is ignored.
    fn write(&mut self, vcpu: usize, register: Register, value: u64) -> bool {
        let staged = self
            .restore
            .as_mut()
            .map(|restore| &mut restore.staged[vcpu]);
        let clock = usize::from(TIMERS[1].contains(&register));
        let [control, count, _] = TIMERS[clock];
        if register == count {
            match staged {
                Some(staged) => {
                    staged.present |= register.present_bit();
                    if !self.pinned {
                        staged.counts[clock] = value;
                    }
                }
                None if !self.pinned => {
                    self.clocks[clock] = Clock::Frozen(Span::exactly(value));
                    self.phys_virtualised |= clock == 1;
                }
                None => {}
            }
            return self.pinned;
        }
        if let Some(staged) = staged {
            staged.present |= register.present_bit();
        }
        let [stored, compare] = &mut self.timers[vcpu][clock];
        if register == control {
            *stored = value & STORED;
        } else {
            *compare = value;
        }
        false
    }

    fn set_regs(&mut self, vcpu: usize, entries: &[(Register, u64)]) -> Result<u32, Refused> {
        let counts = TIMERS.map(|timer| timer[1]);
        let a_count = entries
            .iter()
            .any(|(register, _)| counts.contains(register));
        let done = self
            .restore
            .as_ref()
            .is_some_and(|restore| restore.staged[vcpu].done);
        if done {
            return Err((Status::Busy, self.missing()));
        }
        if self.running && a_count && !self.pinned {
            return Err((Status::Busy, Phase::Running.code()));
        }
        let ignored = entries
            .iter()
            .filter(|(register, value)| self.write(vcpu, *register, *value));
        Ok(ignored.count() as u32)
    }

    /// The count that a vCPU's register reads in an open restore, where it brought one.
    fn brought(&self, vcpu: usize, clock: usize) -> Option<u64> {
        let restore = self.restore.as_ref().filter(|_| !self.pinned)?;
        let staged = restore.staged[vcpu];
        let bit = TIMERS[clock][1].present_bit();
        (staged.present & bit != 0).then_some(staged.counts[clock])
    }

    /// Whether a line stands high, if that can be known.
    fn line(&self, vcpu: usize, clock: usize, host: Span) -> Option<bool> {
        let [control, compare] = self.timers[vcpu][clock];
        if control != ctl::ENABLE {
            return Some(false);
        }
        let [least, most] = match self.brought(vcpu, clock) {
            Some(count) => [count; 2],
            None => self.clocks[clock].count(host).bounds(),
        };
        let high = [least, most].map(|count| count >= compare);
        (least <= most && high[0] == high[1]).then_some(high[0])
    }

    fn counts_were(&mut self, virt: u64, phys: u64, host: u64) -> Result<(), String> {
        self.clocks[0].was(virt, host)?;
        self.clocks[1].was(phys, host)
    }

    fn vcpu_was(&self, row: &wire::Vcpu, vm: &wire::Vm) -> Result<(), String> {
        let vcpu = row.vcpu.get() as usize;
        let counts = [vm.virt_count.get(), vm.phys_count.get()];
        for (clock, [control, count, compare]) in TIMERS.into_iter().enumerate() {
            let should = self.brought(vcpu, clock).unwrap_or(counts[clock]);
            let name = |register: Register| format!("vCPU {vcpu}'s {}", register.name());
            same(&name(count), row.get(count), should)?;
            let [stored, cval] = self.timers[vcpu][clock];
            same(&name(compare), row.get(compare), cval)?;
            let due = stored & ctl::ENABLE != 0 && should >= cval;
            let istatus = if due { ctl::ISTATUS } else { 0 };
            same(&name(control), row.get(control), stored | istatus)?;
        }
        Ok(())
    }
}

impl State {
    /// Where the VM is in its life.
    pub fn phase(&self) -> Phase {
        self.machine.as_ref().map_or(Phase::New, Machine::phase)
    }

    /// The epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The registers that a vCPU must still bring to the open restore, as [`present`] bits.
    pub fn lacks(&self, vcpu: u32) -> u32 {
        self.machine
            .as_ref()
            .map_or(0, |machine| machine.lacks(vcpu as usize))
    }

    /// A virtual count that is near the present one.
    pub fn virt_count_at(&self, monotonic_ns: u64) -> u64 {
        let machine = self.machine.as_ref();
        let host = monotonic_ns.wrapping_add(machine.and_then(|m| m.anchor).unwrap_or(0));
        let count = machine.map(|machine| machine.clocks[0].count(Span::exactly(host)));
        count.map_or(0, |count| count.bounds()[0])
    }

    /// The detail of EBUSY.
    fn busy(&self) -> Refused {
        let detail = match &self.machine {
            Some(machine) if machine.restore.is_some() => machine.missing(),
            _ => self.phase().code(),
        };
        (Status::Busy, detail)
    }

    fn machine_in(&mut self, phases: &[Phase]) -> Result<&mut Machine, Refused> {
        let busy = self.busy();
        match &mut self.machine {
            Some(machine) if phases.contains(&machine.phase()) => Ok(machine),
            _ => Err(busy),
        }
    }

    /// Does what is asked, at `when` of CLOCK_MONOTONIC, ns, and looks whether the answer, where
    /// there is one, can be.
    ///
    /// # Errors
    ///
    /// Why it cannot.
    pub fn apply(&mut self, ask: &Ask, when: Span, answer: Option<&Answer>) -> Result<(), String> {
        let machine = self.machine.as_ref();
        let ahead = machine.and_then(|machine| machine.anchor).unwrap_or(0);
        let mut host = when + Span::exactly(ahead);
        let read = match answer {
            Some(Answer::Run(run)) => Some(run.host_count.get()),
            Some(Answer::Info(info)) => Some(info.host_count.get()),
            Some(Answer::Vm(vm, _)) => Some(vm.host_count.get()),
            _ => None,
        };
        if let Some(read) = read {
            host = host
                .met_with(Span::exactly(read))
                .ok_or_else(|| format!("{ask:?}: the host counter is {read} in {host:?}"))?;
        }
        let judged = match (self.perform(ask, host), answer) {
            (_, None) => Ok(()),
            (Ok(expected), Some(answer)) => match expected {
                Some(expected) => same("the answer", answer, &expected),
                None => self.judge(answer, host, ask),
            },
            (Err((status, detail)), Some(answer)) => {
                same("the answer", answer, &Answer::Refused(status, detail))
            }
        };
        judged.map_err(|why| format!("{ask:?}: {why}"))
    }

    /// Does what is asked. Returns the answer, where it does not depend on the instant.
    fn perform(&mut self, ask: &Ask, host: Span) -> Result<Option<Answer>, Refused> {
        use Phase::{Paused, Restoring, Running};
        let configured = [Paused, Running, Restoring];
        match ask {
            Ask::GetInfo => return Ok(None),
            Ask::Configure { vcpus } => {
                let busy = self.busy();
                let machine = self.machine.get_or_insert_with(|| Machine::new(*vcpus));
                if machine.timers.len() != *vcpus as usize {
                    return Err(busy);
                }
            }
            Ask::GetVm { .. } => {
                self.machine_in(&configured)?;
                return Ok(None);
            }
            Ask::SetRegs { vcpu, entries } => {
                let machine = self.machine_in(&configured)?;
                let vcpu = *vcpu as usize;
                let ignored = machine.set_regs(vcpu, entries)?;
                let lines = [machine.line(vcpu, 0, host), machine.line(vcpu, 1, host)];
                let [Some(virt), Some(phys)] = lines else {
                    return Ok(None);
                };
                return Ok(Some(Answer::SetRegs(wire::SetRegsResult {
                    lines: (u32::from(virt) | u32::from(phys) << 1).into(),
                    ignored: ignored.into(),
                })));
            }
            Ask::SetVm(rows) => {
                let busy = self.busy();
                let machine = self.machine_in(&[Restoring])?;
                let done = |row: &wire::Vcpu| {
                    let restore = machine.restore.as_ref();
                    restore.is_some_and(|restore| restore.staged[row.vcpu.get() as usize].done)
                };
                if rows.iter().any(done) {
                    return Err(busy);
                }
                for row in rows {
                    for register in Register::ALL {
                        if row.present.get() & register.present_bit() != 0 {
                            machine.write(row.vcpu.get() as usize, register, row.get(register));
                        }
                    }
                }
            }
            Ask::SetCounterOffset(offset) => {
                let machine = self.machine_in(&[Paused, Restoring])?;
                machine.clocks = [Clock::Counting(Span::exactly(*offset)); 2];
                machine.pinned = true;
                machine.phys_virtualised = true;
            }
            Ask::SetCounterAnchor {
                monotonic_ns,
                count,
            } => {
                let machine = self.machine_in(&[Paused])?;
                machine.anchor = Some(count.wrapping_sub(*monotonic_ns));
            }
            Ask::Pause { keep_counting } => {
                let machine = self.machine_in(&[Paused, Running])?;
                if machine.running {
                    machine.pause(*keep_counting, host);
                }
                return Ok(None);
            }
            Ask::Resume => {
                let machine = self.machine_in(&[Paused, Running])?;
                if !machine.running {
                    machine.resume(host);
                }
                return Ok(None);
            }
            Ask::RestoreBegin { flags, .. } => {
                self.machine_in(&[Paused, Restoring])?
                    .begin_restore(*flags, host);
                self.epoch += 1;
            }
            Ask::RestoreDone(vcpu) => {
                let machine = self.machine_in(&[Restoring])?;
                machine.restore_done(*vcpu as usize, host)?;
                return Ok(Some(Answer::Remaining(machine.missing())));
            }
            Ask::RestoreAbort => {
                let machine = self.machine_in(&[Restoring])?;
                if let Some(open) = machine.restore.take() {
                    *machine = open.before;
                }
            }
        }
        Ok(Some(Answer::Done))
    }

    /// Looks whether an answer that tells of an instant can be, and learns from it.
    fn judge(&mut self, answer: &Answer, host: Span, ask: &Ask) -> Result<(), String> {
        let phase = self.phase();
        match (answer, &mut self.machine) {
            (Answer::Info(info), machine) => {
                same("the phase", info.phase.get(), phase.code())?;
                same("the epoch", info.epoch.get(), self.epoch)?;
                let Some(machine) = machine else {
                    return same("the number of vCPUs", info.vcpus.get(), 0);
                };
                let vcpus = machine.timers.len() as u32;
                same("the number of vCPUs", info.vcpus.get(), vcpus)?;
                same("restored", info.restored.get(), vcpus - machine.missing())?;
                same("the frequency", info.frequency.get(), HOST_FREQUENCY)?;
                let flag = |set, flag| if set { flag } else { 0 };
                let flags = flag(machine.pinned, info_flags::OFFSET_PINNED)
                    | flag(machine.anchor.is_some(), info_flags::ANCHORED)
                    | flag(machine.phys_virtualised, info_flags::PHYS_VIRTUALISED);
                same("the flags", info.flags, flags)?;
                let host = info.host_count.get();
                let count = |offset: u64| host.wrapping_sub(offset);
                let counts = (count(info.cntvoff.get()), count(info.cntpoff.get()));
                machine.counts_were(counts.0, counts.1, host)
            }
            (Answer::Vm(vm, rows), Some(machine)) => {
                let (virt, phys) = (vm.virt_count.get(), vm.phys_count.get());
                machine.counts_were(virt, phys, vm.host_count.get())?;
                same("the number of rows", rows.len(), machine.timers.len())?;
                rows.iter().try_for_each(|row| machine.vcpu_was(row, vm))
            }
            (Answer::Run(run), Some(machine)) => {
                let (virt, phys) = (run.virt_count.get(), run.phys_count.get());
                let host = run.host_count.get();
                same("cntvoff", run.cntvoff.get(), host.wrapping_sub(virt))?;
                same("cntpoff", run.cntpoff.get(), host.wrapping_sub(phys))?;
                machine.counts_were(virt, phys, host)
            }
            (Answer::SetRegs(result), Some(machine)) => {
                let Ask::SetRegs { vcpu, .. } = ask else {
                    return Err("there should be another answer".to_owned());
                };
                for clock in 0..2 {
                    let is = result.lines.get() >> clock & 1 != 0;
                    if let Some(should) = machine.line(*vcpu as usize, clock, host) {
                        same("the line", is, should)?;
                    }
                }
                Ok(())
            }
            (answer, _) => Err(format!("{answer:?} cannot be in {phase}")),
        }
    }
}
