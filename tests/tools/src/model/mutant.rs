//! Backends that get one thing wrong each, around the real `Vm`. The check must catch every one
//! of them; otherwise it proves nothing about the real one.

use vhost_user_timer_model::vm::{Now, Vm};
use vhost_user_timer_protocol::request::Body;
use vhost_user_timer_protocol::wire::{
    EVENT_TIMER_ASSERTED, Event, RegValue, ResponseHeader, Run, ctl,
};
use vhost_user_timer_protocol::{Abi, Phase, Register, Request as Parsed, Status};
use zerocopy::FromBytes;

use super::device::{self, Answer, Device, Pair, Served};
use super::request::{Ask, Request, Timer};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The gate opens when one vCPU is still missing.
    OpensOneEarly,
    /// The count that is written last wins, as in KVM.
    LastCountWins,
    /// Each vCPU continues from the count that it brought.
    OffsetPerVcpu,
    /// A vCPU that was done in one restore counts as done in the next.
    KeepsOldDones,
    /// A count that is written in RUNNING takes effect, as in KVM.
    CountWhileRunning,
    /// With every timer that fires, another vCPU's timer is reported too, masked or not.
    FiresMasked,
    /// The frontend's first event of a timer is lost.
    LosesEvent,
    /// What became due around the end of the process is not reported by the next one.
    ForgetsOverRestart,
    /// Every event is reported again at once.
    TellsTwice,
    /// No alarm is ever set.
    Oversleeps,
    /// A restore that has timed out can no longer be completed.
    GivesUp,
    /// Of the vCPUs that are released together, the last is forgotten.
    LosesWaiter,
    /// The vCPUs that are released together each get another instant.
    AnswersDiffer,
    /// A RESTORE_DONE is missing from the state file.
    KeepsFromStateFile,
    /// The gate opens when the offsets are decided: before they are in the hypervisor.
    ReleasesAtArmed,
    /// The gate opens when any offsets are confirmed, be they those of an earlier RESUME.
    TakesAnyOffsets,
    /// The VMM resumes its vCPUs in a loop: it writes a vCPU's count, wakes the vCPU, and goes to
    /// the next one. In KVM, each of the writes moves the offset of the whole VM.
    ResumeLoop,
}

/// What a vCPU brought last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Brought {
    timer: Timer,
    count: u64,
}

/// A backend with a fault.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mutant {
    vm: Vm,
    fault: Fault,
    brought: Vec<Option<Brought>>,
    done: Vec<bool>,
    last_count: Option<u64>,
    /// An event to report once more.
    again: Option<Event>,
    /// The counts at which a loop resumes the vCPUs, once one of them runs.
    loop_at: Option<Pair>,
    timed_out: bool,
}

impl Mutant {
    /// A backend with this fault, whose VM is NEW.
    pub fn new(vcpus: u32, fault: Fault) -> Self {
        Mutant {
            vm: Vm::new(device::profile(vcpus)),
            fault,
            brought: vec![None; vcpus as usize],
            done: vec![false; vcpus as usize],
            last_count: None,
            again: None,
            loop_at: None,
            timed_out: false,
        }
    }

    /// Makes the real VM do what nobody asked for.
    fn forge(&mut self, now: Now, request: Request) -> Served {
        device::handle(&mut self.vm, now, u16::MAX, &request.bytes())
    }

    /// Brings a vCPU's registers, and reports the vCPU as done.
    fn forge_done(&mut self, now: Now, vcpu: usize, brought: Brought) -> Served {
        let Brought { timer, count } = brought;
        let of_vcpu = |ask| Request::of_vcpu(vcpu as u32, 0, ask);
        let mut served = self.forge(
            now,
            of_vcpu(Ask::Bring {
                timer,
                count,
                done: false,
            }),
        );
        served
            .replies
            .extend(self.forge(now, of_vcpu(Ask::Done)).replies);
        self.done[vcpu] = true;
        served
    }

    fn is_missing_only(&self, vcpu: usize) -> bool {
        !self.done[vcpu] && self.done.iter().filter(|done| !**done).count() == 1
    }

    /// Remembers a request that was granted.
    fn remember(&mut self, request: &Parsed<'_>) {
        let vcpu = request.vcpu as usize;
        match request.body {
            Body::RestoreBegin(_) => {
                self.done.fill(false);
                self.timed_out = false;
            }
            Body::SetRegs(entries) => self.remember_registers(vcpu, entries),
            Body::RestoreDone => self.done[vcpu] = true,
            _ => {}
        }
    }

    fn remember_registers(&mut self, vcpu: usize, entries: &[RegValue]) {
        let value = |register: Register| {
            let id = register.id(Abi::Arm64);
            let entry = entries.iter().find(|entry| entry.id.get() == id);
            entry.map(|entry| entry.value.get())
        };
        let count = value(Register::TimerCnt);
        self.last_count = count.or(self.last_count);
        if let (Some(control), Some(cval), Some(count)) =
            (value(Register::TimerCtl), value(Register::TimerCval), count)
        {
            let armed = control & ctl::IMASK == 0;
            let timer = Timer { armed, cval };
            self.brought[vcpu] = Some(Brought { timer, count });
        }
    }

    /// Sets the count of an answer to that of one vCPU alone.
    fn shift(&self, vcpu: u16, run: &mut Run) {
        let count_of = |brought: &Option<Brought>| brought.map(|brought| brought.count);
        let own = self.brought.get(usize::from(vcpu)).and_then(count_of);
        let largest = self.brought.iter().filter_map(count_of).max();
        if let (Some(own), Some(largest)) = (own, largest) {
            run.cntvoff += largest - own;
            run.virt_count -= largest - own;
        }
    }

    fn notice(&mut self, served: &Served) {
        let timed_out = Status::TimedOut.errno();
        let mut replies = served.replies.iter();
        self.timed_out |= replies.any(|reply| reply.header.status.get() == timed_out);
    }

    fn before(&mut self, now: Now, request: &Parsed<'_>) {
        if self.fault == Fault::LastCountWins
            && request.body == Body::RestoreDone
            && self.vm.phase() == Phase::Restoring
            && self.is_missing_only(request.vcpu as usize)
            && let Some(count) = self.last_count
        {
            let offset = now.host.wrapping_sub(count);
            self.forge(now, Request::of_vm(Ask::SetOffset(offset)));
        }
    }

    fn after_done(&mut self, now: Now, served: &mut Served) {
        if self.fault == Fault::OpensOneEarly
            && let Some(missing) = (0..self.done.len()).find(|vcpu| self.is_missing_only(*vcpu))
        {
            let timer = Timer {
                armed: false,
                cval: 0,
            };
            let forged = self.forge_done(now, missing, Brought { timer, count: 0 });
            served.replies.extend(forged.replies);
        }
    }

    fn after_begin(&mut self, now: Now, old: &[bool]) {
        if self.fault == Fault::KeepsOldDones {
            for (vcpu, done) in old.iter().enumerate() {
                if let Some(brought) = self.brought[vcpu].filter(|_| *done) {
                    self.forge_done(now, vcpu, brought);
                }
            }
        }
    }

    /// Confirms what the VMM has not.
    fn after_armed(&mut self, now: Now, request: &Parsed<'_>, served: &mut Served) {
        let confirms = match self.fault {
            Fault::ReleasesAtArmed => true,
            Fault::TakesAnyOffsets => matches!(request.body, Body::ConfirmRun(_)),
            _ => false,
        };
        if confirms && self.vm.phase() == Phase::Armed {
            let info = self.vm.info(now);
            let offsets = [info.cntvoff.get(), info.cntpoff.get()];
            let confirmed = self.forge(now, Request::of_vm(Ask::Confirm(offsets)));
            served.replies.extend(confirmed.replies);
            if self.fault == Fault::TakesAnyOffsets {
                served.answer = confirmed.answer;
            }
        }
    }

    fn count_while_running(&mut self, now: Now, request: &[u8]) {
        let keep_counting = false;
        self.forge(now, Request::of_vm(Ask::Pause { keep_counting }));
        device::handle(&mut self.vm, now, u16::MAX, request);
        self.forge(now, Request::of_vm(Ask::Resume));
    }
}

fn refused(status: Status) -> Served {
    let header = ResponseHeader {
        status: status.errno().into(),
        ..Default::default()
    };
    Served {
        answer: Some(Answer {
            header,
            body: Vec::new(),
        }),
        ..Default::default()
    }
}

impl Device for Mutant {
    fn vm(&self) -> &Vm {
        &self.vm
    }

    fn vm_mut(&mut self) -> &mut Vm {
        &mut self.vm
    }

    fn handle(&mut self, now: Now, queue: u16, request: &[u8]) -> Served {
        let was = self.vm.phase();
        let parsed = Parsed::parse(request).expect("a well-formed request");
        self.before(now, &parsed);
        let is_done = parsed.body == Body::RestoreDone;
        if self.fault == Fault::GivesUp && self.timed_out && is_done {
            return refused(Status::TimedOut);
        }
        let mut served = device::handle(&mut self.vm, now, queue, request);
        self.after_armed(now, &parsed, &mut served);
        if self.fault == Fault::KeepsFromStateFile && is_done {
            served.changed.vcpus.clear();
        } else {
            // What was forged is recorded as well.
            served.changed.all = true;
        }
        self.notice(&served);
        let status = served.answer.as_ref().map(Answer::status);
        let set_regs = matches!(parsed.body, Body::SetRegs(_));
        if status == Some(Status::Ok) {
            let old = self.done.clone();
            self.remember(&parsed);
            match parsed.body {
                Body::Pause(_) => self.loop_at = None,
                Body::RestoreBegin(_) if was == Phase::Restoring => self.after_begin(now, &old),
                _ if is_done => self.after_done(now, &mut served),
                _ => {}
            }
        } else if self.fault == Fault::CountWhileRunning && was == Phase::Running && set_regs {
            self.count_while_running(now, request);
        }
        match self.fault {
            Fault::OffsetPerVcpu => {
                for reply in &mut served.replies {
                    let vcpu = reply.queue;
                    if let Some(run) = &mut reply.run {
                        self.shift(vcpu, run);
                    }
                }
                if let Some(answer) = &mut served.answer
                    && let Ok(run) = Run::mut_from_bytes(&mut answer.body)
                {
                    self.shift(queue, run);
                }
            }
            Fault::LosesWaiter if served.replies.len() > 1 => {
                served.replies.pop();
            }
            Fault::AnswersDiffer => {
                for (ticks, reply) in (0..).zip(&mut served.replies) {
                    if let Some(run) = &mut reply.run {
                        run.host_count += ticks;
                        run.virt_count += ticks;
                        run.phys_count += ticks;
                    }
                }
            }
            _ => {}
        }
        served
    }

    fn enters(&mut self, now: Now, run: &Run, put_in: &mut Pair) {
        if self.fault == Fault::ResumeLoop {
            let counts = [run.virt_count.get(), run.phys_count.get()];
            let counts = *self.loop_at.get_or_insert(counts);
            *put_in = counts.map(|count| now.host.wrapping_sub(count));
        }
    }

    fn advance(&mut self, now: Now) -> Served {
        let served = device::advance(&mut self.vm, now);
        self.notice(&served);
        served
    }

    fn next_event(&mut self, now: Now) -> Option<Event> {
        let again = self.again.take();
        if again.is_some() {
            return again;
        }
        let event = self.vm.next_event(now);
        let fired = event.filter(|event| event.kind.get() == EVENT_TIMER_ASSERTED);
        match self.fault {
            Fault::TellsTwice => self.again = fired,
            Fault::FiresMasked => {
                let vcpus = self.done.len() as u32;
                self.again = fired.map(|event| Event {
                    vcpu: ((event.vcpu.get() + 2) % vcpus).into(),
                    ..event
                });
            }
            Fault::LosesEvent if fired.is_some() => return self.vm.next_event(now),
            _ => {}
        }
        event
    }

    fn ticks_to_next(&self, now: Now) -> Option<u64> {
        self.vm
            .ticks_to_next(now)
            .filter(|_| self.fault != Fault::Oversleeps)
    }

    fn restart(&mut self, now: Now) {
        device::restart(&mut self.vm, now);
        if self.fault == Fault::ForgetsOverRestart {
            while self.vm.next_event(now).is_some() {}
        }
    }
}
