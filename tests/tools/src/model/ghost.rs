//! What must hold according to the requests that were granted and the answers that were given. It
//! sees nothing of the device but these, and what a frontend could ask at any time.

use vhost_user_timer_model::vm::Now;
use vhost_user_timer_protocol::wire::{
    EVENT_TIMER_ASSERTED, Event, Info, LINE_VIRTUAL, SetRegsResult, TIMER_VIRTUAL,
};
use vhost_user_timer_protocol::{Phase, Status};
use zerocopy::FromBytes;

use super::device::{Answer, Pair};
use super::limits::Limits;
use super::request::{Ask, Request, Timer};
use super::{CONFIRMED, FORWARD, GATE, NOT_FALSELY, ONE_OFFSET, REPORTED, SETTLED};

/// A timer's line in RUNNING, and whether it was reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Line {
    /// It is low.
    Low,
    /// It is high, and not reported yet.
    Pending,
    /// It is high, and was reported since it rose.
    Reported,
}

/// What one vCPU has done in the epoch of an open restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Part {
    /// Its RESTORE_DONE was granted.
    pub done: bool,
    /// The count that it brought.
    brought: Option<u64>,
}

/// What is known of a restore that is open, or armed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Open {
    /// What each vCPU has done.
    pub parts: Vec<Part>,
    /// AUTORUN.
    autorun: bool,
    /// Every vCPU is done, and the VM is armed.
    armed: bool,
    /// The host counter at which waiters get ETIMEDOUT.
    patience: Option<u64>,
    /// What there was before the restore.
    before: Facts,
}

/// What RESTORE_ABORT brings back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Facts {
    /// The largest counts that any vCPU has seen since the VMM said what they are.
    floors: Pair,
    pinned: bool,
    timers: Vec<Timer>,
}

/// An observer that sees all requests and all answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ghost {
    /// The VM has CONFIRM.
    confirm: bool,
    /// The VM has ONE_OFFSET.
    one_offset: bool,
    facts: Facts,
    open: Option<Box<Open>>,
    lines: Vec<Line>,
    /// The offsets since RUNNING began.
    ran: Option<Pair>,
    /// The offsets of the last CONFIRM_RUN, until the VM is no longer RUNNING.
    confirmed: Option<Pair>,
    /// The properties that were found violated on the way.
    broken: Vec<&'static str>,
}

/// The answer to SET_REGS; with DONE there is more behind it.
fn written(answer: &Answer) -> Option<SetRegsResult> {
    let result = SetRegsResult::read_from_prefix(&answer.body);
    result.ok().map(|(result, _)| result)
}

fn offsets(info: &Info) -> Pair {
    [info.cntvoff.get(), info.cntpoff.get()]
}

impl Ghost {
    /// Of a VM that is PAUSED.
    pub fn new(limits: &Limits, timers: Vec<Timer>) -> Self {
        Ghost {
            confirm: limits.confirm,
            one_offset: limits.one_offset,
            lines: vec![Line::Low; timers.len()],
            facts: Facts {
                floors: [0; 2],
                pinned: false,
                timers,
            },
            open: None,
            ran: None,
            confirmed: None,
            broken: Vec::new(),
        }
    }

    /// The restore that is open, or armed.
    pub fn open(&self) -> Option<&Open> {
        self.open.as_deref()
    }

    /// The offsets that the VMM has confirmed for the VM that is RUNNING.
    pub fn confirmed(&self) -> Option<Pair> {
        self.confirmed
    }

    /// Whether a restore is open in which this vCPU is missing.
    pub fn misses(&self, vcpu: u32) -> bool {
        self.open()
            .is_some_and(|open| !open.parts[vcpu as usize].done)
    }

    /// Whether some line must still be reported.
    pub fn owes(&self) -> bool {
        self.lines.contains(&Line::Pending)
    }

    /// Observes that a property does not hold.
    pub fn found_broken(&mut self, name: &'static str) {
        if !self.broken.contains(&name) {
            self.broken.push(name);
        }
    }

    /// Checks one thing of a property.
    pub fn expect(&mut self, name: &'static str, holds: bool) {
        if !holds {
            self.found_broken(name);
        }
    }

    /// The properties that were found violated.
    pub fn broken(&self) -> &[&'static str] {
        &self.broken
    }

    /// Observes that a request was served in phase `was`, with this answer, whether or not anyone
    /// saw the answer. `after` is the VM after it.
    pub fn served(&mut self, request: &Request, answer: &Answer, was: Phase, after: &Info) {
        if answer.status() != Status::Ok {
            return;
        }
        let vcpu = request.vcpu as usize;
        match request.ask {
            // Of a vCPU that is done, it brings again what is there.
            Ask::Bring { done: true, .. } if !self.misses(request.vcpu) => {}
            Ask::Bring { timer, count, done } => {
                self.facts.timers[vcpu] = timer;
                self.count_written(vcpu, count, answer, was);
                self.timer_written(vcpu, answer, after);
                if done {
                    self.vcpu_done(vcpu, after);
                }
            }
            Ask::SetTimer(timer) => {
                self.facts.timers[vcpu] = timer;
                self.timer_written(vcpu, answer, after);
            }
            Ask::SetCount(count) => self.count_written(vcpu, count, answer, was),
            Ask::Done => self.vcpu_done(vcpu, after),
            Ask::Begin {
                timeout, autorun, ..
            } => {
                let began = after.host_count.get();
                self.begun(autorun, (timeout != 0).then_some(began + timeout));
            }
            Ask::Confirm(offsets) => {
                self.confirmed = Some(offsets);
                self.open = None;
            }
            Ask::Pause { .. } if was == Phase::Armed => self.open = None,
            Ask::Abort => {
                if let Some(open) = self.open.take() {
                    self.facts = open.before;
                }
            }
            Ask::SetOffset(offset) => {
                self.facts.pinned = true;
                self.facts.floors = [after.host_count.get().wrapping_sub(offset); 2];
            }
            Ask::WaitRun | Ask::Configure { .. } | Ask::Pause { .. } | Ask::Resume => {}
        }
    }

    fn begun(&mut self, autorun: bool, patience: Option<u64>) {
        let vcpus = self.lines.len();
        let before = match self.open.take() {
            Some(open) => open.before,
            None => self.facts.clone(),
        };
        self.facts = Facts {
            pinned: false,
            ..before.clone()
        };
        self.open = Some(Box::new(Open {
            parts: vec![Part::default(); vcpus],
            autorun,
            armed: false,
            patience,
            before,
        }));
    }

    fn count_written(&mut self, vcpu: usize, count: u64, answer: &Answer, was: Phase) {
        if written(answer).is_none_or(|result| result.ignored.get() != 0) {
            return;
        }
        match &mut self.open {
            Some(open) => open.parts[vcpu].brought = Some(count),
            // The VMM may set time back, but not under a running vCPU.
            None if was == Phase::Paused => self.set_floor(count),
            None => {}
        }
    }

    /// The virtual count is this from now on.
    fn set_floor(&mut self, count: u64) {
        self.facts.floors[0] = count;
        if self.one_offset {
            self.facts.floors[1] = count;
        }
    }

    /// The write's own answer says how it left the line, so no report is due for that.
    fn timer_written(&mut self, vcpu: usize, answer: &Answer, after: &Info) {
        if after.phase.get() == Phase::Restoring.code() {
            return;
        }
        let count = after.host_count.get().wrapping_sub(after.cntvoff.get());
        let high = self.facts.timers[vcpu].line(count);
        let said = written(answer).is_some_and(|result| result.lines.get() & LINE_VIRTUAL != 0);
        self.expect(REPORTED, said || !high);
        self.expect(NOT_FALSELY, high || !said);
        if self.ran.is_some() {
            self.lines[vcpu] = match self.lines[vcpu] {
                _ if !high => Line::Low,
                Line::Low => Line::Reported,
                known => known,
            };
        }
    }

    fn vcpu_done(&mut self, vcpu: usize, after: &Info) {
        let Some(open) = &mut self.open else {
            return;
        };
        open.parts[vcpu].done = true;
        if open.parts.iter().any(|part| !part.done) {
            return;
        }
        if std::mem::replace(&mut open.armed, true) {
            // It was already.
            return;
        }
        let largest = open.parts.iter().filter_map(|part| part.brought).max();
        if !(self.confirm && open.autorun) {
            self.open = None;
        }
        if let Some(largest) = largest.filter(|_| !self.facts.pinned) {
            self.set_floor(largest);
            let count = after.host_count.get().wrapping_sub(after.cntvoff.get());
            self.expect(SETTLED, count == largest);
        }
    }

    /// Observes the VM after a step.
    pub fn stepped(&mut self, is: Phase, info: &Info) {
        let now = offsets(info);
        let host = info.host_count.get();
        let right = match is {
            Phase::Restoring => self.open.as_ref().is_some_and(|open| !open.armed),
            Phase::Armed => self.confirm && self.open.as_ref().is_none_or(|open| open.armed),
            _ => self.open.is_none(),
        };
        self.expect(GATE, right);
        if self.one_offset {
            self.expect(ONE_OFFSET, now[0] == now[1]);
        }
        if is == Phase::Running {
            self.expect(CONFIRMED, self.confirmed == Some(now) || !self.confirm);
            let constant = *self.ran.get_or_insert(now) == now;
            self.expect(ONE_OFFSET, constant);
            self.lines_rise(now, host);
        } else {
            self.ran = None;
            self.confirmed = None;
            self.lines.fill(Line::Low);
        }
        if is != Phase::Restoring {
            let floors = self.facts.floors;
            let forward = (0..2).all(|clock| host.wrapping_sub(now[clock]) >= floors[clock]);
            self.expect(FORWARD, forward);
        }
    }

    fn lines_rise(&mut self, offsets: Pair, host: u64) {
        let count = host.wrapping_sub(offsets[0]);
        for (line, timer) in self.lines.iter_mut().zip(&self.facts.timers) {
            if *line == Line::Low && timer.line(count) {
                *line = Line::Pending;
            }
        }
    }

    /// Observes what a vCPU that runs at these offsets can see.
    pub fn seen(&mut self, offsets: Pair, host: u64) {
        self.expect(ONE_OFFSET, self.ran == Some(offsets));
        let counts = offsets.map(|offset| host.wrapping_sub(offset));
        let floors = self.facts.floors;
        self.expect(FORWARD, (0..2).all(|clock| counts[clock] >= floors[clock]));
        self.facts.floors = [0, 1].map(|clock| counts[clock].max(floors[clock]));
    }

    /// Observes an event that the frontend took.
    pub fn reported(&mut self, event: &Event, now: Now) {
        if event.kind.get() != EVENT_TIMER_ASSERTED {
            return;
        }
        let vcpu = event.vcpu.get() as usize;
        let Some(offsets) = self.ran else {
            self.found_broken(NOT_FALSELY);
            return;
        };
        let count = now.host.wrapping_sub(offsets[0]);
        let high = event.timer.get() == TIMER_VIRTUAL
            && self
                .facts
                .timers
                .get(vcpu)
                .is_some_and(|timer| timer.line(count));
        self.expect(NOT_FALSELY, high);
        if high {
            self.expect(REPORTED, self.lines[vcpu] == Line::Pending);
            self.lines[vcpu] = Line::Reported;
        }
    }

    /// Observes that there are no more events.
    pub fn all_reported(&mut self) {
        let owes = self.owes();
        self.expect(REPORTED, !owes);
    }

    /// Observes that it is unknown what was reported to the frontend.
    pub fn forgotten(&mut self) {
        for line in &mut self.lines {
            if *line == Line::Reported {
                *line = Line::Pending;
            }
        }
    }

    /// Ticks until time alone changes something: a line rises, or a restore times out.
    pub fn ticks_to_next(&self, host: u64) -> Option<u64> {
        if let Some(open) = self.open() {
            let patience = open.patience?.checked_sub(host);
            return patience.filter(|ticks| *ticks > 0);
        }
        let count = host.wrapping_sub(self.ran?[0]);
        let timers = self.facts.timers.iter().zip(&self.lines);
        timers
            .filter(|(timer, line)| timer.armed && **line == Line::Low)
            .map(|(timer, _)| timer.cval.saturating_sub(count))
            .min()
    }
}
