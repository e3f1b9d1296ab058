//! A state of the world: the device, the threads around it, and what is in flight between them.

use vhost_user_timer_model::vm::Now;
use vhost_user_timer_protocol::wire::{ResponseHeader, Run};
use vhost_user_timer_protocol::{Phase, Status};

use super::action::{Action, Deed};
use super::device::{Device, Pair, Records, Reply, Served};
use super::ghost::{Ghost, Open};
use super::limits::Limits;
use super::request::{Ask, Request};
use super::scenario::{BROUGHT, COUNT, HOST, TICK, timer_of};
use super::{CONFIRMED, GATE, ONE_RUN, OPENS, RECORDED, REPORTED};

/// What a vCPU's thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Thread {
    /// Nothing, or it has requests in its queue.
    Idle,
    /// The backend holds its WAIT_RUN.
    Waiting {
        /// The epoch it named.
        asked: u64,
        /// The epoch it was served in.
        since: u64,
    },
    /// Runs the guest. The pair are the offsets of its WAIT_RUN's answer.
    Running(Pair),
}

/// What is in the hypervisor where nobody has put anything in that still matters.
const NOTHING: Pair = [0; 2];

/// What came of the last step, for a reader. Not part of the state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Note {
    /// A restore was completed.
    pub completed: bool,
    /// A restore was begun while one was open.
    pub begun_again: bool,
    /// A restore was aborted.
    pub aborted: bool,
    /// A waiter got ETIMEDOUT.
    pub timed_out: bool,
    /// A request got ESTALE.
    pub stale: bool,
    /// A restore that was armed was aborted.
    pub aborted_armed: bool,
    /// The backend restarted while the VM was armed.
    pub restarted_armed: bool,
    /// A timer's event was taken.
    pub fired: bool,
    /// The backend restarted in a restore in which some vCPU was done.
    pub restarted_under_way: bool,
    /// How the request that was served was answered.
    pub status: Option<Status>,
}

impl PartialEq for Note {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Note {}

impl std::hash::Hash for Note {
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}

/// A state of the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct System<D> {
    pub(super) host: u64,
    /// The device.
    pub device: D,
    pub(super) threads: Vec<Thread>,
    /// What is in flight, per thread: of the vCPUs, then of the VMM, and last of its applier.
    pub(super) queues: Vec<Vec<Request>>,
    /// The offsets in the VMM's hypervisor, where the guest's counters are made of them. Only for a
    /// VM with CONFIRM; the guest of another has the offsets of its WAIT_RUN's answer.
    pub(super) put_in: Pair,
    /// What can still happen.
    pub left: Limits,
    /// What must hold.
    pub ghost: Ghost,
    /// What came of the last step.
    pub note: Note,
}

impl<D: Device> System<D> {
    /// A VM that was configured, and is PAUSED.
    ///
    /// # Panics
    ///
    /// If the device refuses to be configured.
    pub fn new(limits: &Limits, mut device: D) -> Self {
        let vcpus = limits.vcpus;
        let timers: Vec<_> = (0..vcpus).map(timer_of).collect();
        let mut set_up = vec![
            Request::of_vm(Ask::Configure {
                vcpus,
                confirm: limits.confirm,
                one_offset: limits.one_offset,
            }),
            Request::of_vcpu(0, 0, Ask::SetCount(COUNT)),
        ];
        set_up.extend(
            (0..)
                .zip(&timers)
                .map(|(vcpu, timer)| Request::of_vcpu(vcpu, 0, Ask::SetTimer(*timer))),
        );
        for request in set_up {
            let served = device.handle(Now::at(HOST), 0, &request.bytes());
            let status = served.answer.map(|answer| answer.status());
            assert_eq!(status, Some(Status::Ok), "{request}");
        }
        System {
            host: HOST,
            device,
            threads: vec![Thread::Idle; vcpus as usize],
            queues: vec![Vec::new(); (vcpus + limits.vmm_threads + 1) as usize],
            put_in: NOTHING,
            left: limits.clamped(),
            ghost: Ghost::new(limits, timers),
            note: Note::default(),
        }
    }

    pub(super) fn now(&self) -> Now {
        Now::at(self.host)
    }

    pub(super) fn phase(&self) -> Phase {
        self.device.vm().phase()
    }

    /// The queue of the VMM's thread that puts the offsets in.
    pub(super) fn applier(&self) -> usize {
        self.queues.len() - 1
    }

    pub(super) fn vcpus(&self) -> u32 {
        self.threads.len() as u32
    }

    /// Whether a property held on the way here and holds here.
    pub fn holds(&self, name: &str) -> bool {
        !self.ghost.broken().contains(&name)
    }

    /// Whether some vCPU runs.
    pub fn anyone_runs(&self) -> bool {
        let runs = |thread: &Thread| matches!(thread, Thread::Running(_));
        self.threads.iter().any(runs)
    }

    /// The queues whose WAIT_RUN the backend holds.
    pub(super) fn waiting(&self) -> Vec<usize> {
        let waits = |vcpu: &usize| matches!(self.threads[*vcpu], Thread::Waiting { .. });
        (0..self.threads.len()).filter(waits).collect()
    }

    // What comes of it.

    /// The state after an action.
    pub fn after(&self, limits: &Limits, action: Action) -> Self {
        let mut next = self.clone();
        next.note = Note::default();
        next.act(limits, action);
        let is = next.phase();
        if is != Phase::Running {
            // A VMM has stopped its vCPUs when it sends PAUSE.
            for thread in &mut next.threads {
                if matches!(thread, Thread::Running(_)) {
                    *thread = Thread::Idle;
                }
            }
        }
        let info = next.device.vm().info(next.now());
        next.ghost.stepped(is, &info);
        for thread in &next.threads {
            if let Thread::Running(offsets) = *thread {
                let made_of = if limits.confirm { next.put_in } else { offsets };
                next.ghost.seen(made_of, next.host);
            }
        }
        if is != Phase::Running && next.queues[next.applier()].is_empty() {
            // Before anything runs, other offsets are put in: these no longer matter.
            next.put_in = NOTHING;
        }
        next
    }

    fn act(&mut self, limits: &Limits, action: Action) {
        match action {
            Action::Tick => {
                self.left.ticks -= 1;
                self.host += TICK;
            }
            Action::Enter(vcpu) => self.enter(vcpu),
            Action::BringFor { thread, vcpu } => {
                let queue = (limits.vcpus + thread) as usize;
                self.queues[queue] = self.bringing(vcpu, 0);
            }
            Action::Serve(queue) => self.serve(queue),
            Action::ServeAndDie(queue) => {
                let request = self.queues[queue][0];
                self.handle(queue, &request);
                self.die(false);
            }
            Action::Vmm(deed) => {
                let replies = self.do_deed(deed).replies;
                self.replied(&replies);
            }
            Action::VmmAndDie(deed) => {
                self.do_deed(deed);
                self.die(false);
            }
            Action::Apply => {
                let info = self.device.vm().info(self.now());
                self.put_in = [info.cntvoff.get(), info.cntpoff.get()];
                let applier = self.applier();
                self.queues[applier].push(Request::of_vm(Ask::Confirm(self.put_in)));
            }
            Action::TakeEvents => self.take_events(),
            Action::StopQueue(vcpu) => {
                self.disturb(|left| &mut left.disconnects);
                let replies = self.device.stop_queue(vcpu as u16);
                self.replied(&replies);
                // Waiters on other queues keep waiting.
                let its_own = |reply: &Reply| u32::from(reply.queue) == vcpu;
                self.ghost
                    .expect(OPENS, replies.len() == 1 && replies.iter().all(its_own));
            }
            Action::Reconnect { lost } => {
                self.disturb(|left| &mut left.disconnects);
                self.device.disconnect(self.now());
                self.ghost.forgotten();
                self.submit_again(lost);
            }
            Action::Restart { lost } => self.die(lost),
        }
    }

    fn disturb(&mut self, which: impl FnOnce(&mut Limits) -> &mut u8) {
        *which(&mut self.left) -= 1;
        self.left.disturbances -= 1;
        self.left = self.left.clamped();
    }

    /// A vCPU's thread wants to run. Every second one names the epoch; the last one leaves its
    /// registers to the VMM.
    fn enter(&mut self, vcpu: u32) {
        let last = self.vcpus() > 1 && vcpu + 1 == self.vcpus();
        let names_epoch = vcpu % 2 == 1;
        let epoch = if names_epoch {
            self.device.vm().epoch()
        } else {
            0
        };
        let brings = self.ghost.misses(vcpu) && !last;
        let queue = vcpu as usize;
        if brings {
            self.queues[queue] = self.bringing(vcpu, epoch);
        }
        if names_epoch || !brings {
            self.queues[queue].push(Request::of_vcpu(vcpu, epoch, Ask::WaitRun));
        }
        if !names_epoch && !brings {
            self.serve(queue);
        }
    }

    /// What brings a vCPU's registers and says RESTORE_DONE: two requests of the first vCPU, and
    /// one of each other.
    pub(super) fn bringing(&self, vcpu: u32, epoch: u64) -> Vec<Request> {
        let index = (u64::from(vcpu) + self.device.vm().epoch()) % BROUGHT.len() as u64;
        let done = self.left.confirm && vcpu != 0;
        let bring = Ask::Bring {
            timer: timer_of(vcpu),
            count: BROUGHT[index as usize],
            done,
        };
        let asks = std::iter::once(bring).chain((!done).then_some(Ask::Done));
        asks.map(|ask| Request::of_vcpu(vcpu, epoch, ask)).collect()
    }

    /// The VMM does something. It counts against the limits only if it was granted.
    fn do_deed(&mut self, deed: Deed) -> Served {
        let request = deed.request(self.vcpus());
        let served = self.handle(self.threads.len(), &request);
        let granted = self.note.status == Some(Status::Ok);
        if granted && deed.cost(&mut self.left).is_some() {
            self.disturb(|left| deed.cost(left).expect("a deed that costs"));
        }
        served
    }

    /// Lets the device handle a request, and the ghost observe it.
    fn handle(&mut self, queue: usize, request: &Request) -> Served {
        let was = self.phase();
        let records = Records::of(self.device.vm());
        let now = self.now();
        let served = self.device.handle(now, queue as u16, &request.bytes());
        self.check_record(records, &served);
        if let Some(answer) = &served.answer {
            let info = self.device.vm().info(self.now());
            self.ghost.served(request, answer, was, &info);
            let granted = answer.status() == Status::Ok;
            self.note.status = Some(answer.status());
            self.note.stale = answer.status() == Status::Stale;
            let restoring = was == Phase::Restoring;
            let begins = matches!(request.ask, Ask::Begin { .. });
            self.note.begun_again = granted && restoring && begins;
            self.note.aborted = granted && request.ask == Ask::Abort;
            self.note.aborted_armed = self.note.aborted && was == Phase::Armed;
            let ended = self.phase() != Phase::Restoring;
            self.note.completed = granted && restoring && ended && !self.note.aborted;
        }
        served
    }

    fn check_record(&mut self, records: Records, served: &Served) {
        let recorded = records.lead_to(self.device.vm(), self.now(), &served.changed);
        self.ghost.expect(RECORDED, recorded);
    }

    fn serve(&mut self, queue: usize) {
        let request = self.queues[queue].remove(0);
        let served = self.handle(queue, &request);
        let waits = request.ask == Ask::WaitRun;
        match &served.answer {
            Some(answer) if waits => {
                self.answered(queue, &answer.header, answer.run());
            }
            Some(answer) => {
                // Its thread sees the refusal, and drops the rest of its plan.
                if answer.status() != Status::Ok {
                    self.queues[queue].clear();
                }
            }
            None => {
                self.ghost.expect(OPENS, waits);
                self.threads[queue] = Thread::Waiting {
                    asked: request.epoch,
                    since: self.device.vm().epoch(),
                };
            }
        }
        self.replied(&served.replies);
    }

    /// Waiters see their answers.
    fn replied(&mut self, replies: &[Reply]) {
        for reply in replies {
            let queue = usize::from(reply.queue);
            let Some(&Thread::Waiting { since, .. }) = self.threads.get(queue) else {
                // Answered twice, or never asked.
                self.ghost.found_broken(OPENS);
                continue;
            };
            self.threads[queue] = Thread::Idle;
            let status = self.answered(queue, &reply.header, reply.run);
            self.note.timed_out |= status == Status::TimedOut;
            if status == Status::Ok {
                self.ghost.expect(GATE, reply.header.epoch.get() == since);
            }
        }
        let together = |reply: &Reply| reply.run;
        let mut runs = replies.iter().filter_map(together);
        let first = runs.next();
        self.ghost
            .expect(ONE_RUN, runs.all(|run| Some(run) == first));
    }

    /// A thread sees the answer to its WAIT_RUN.
    fn answered(&mut self, queue: usize, header: &ResponseHeader, run: Option<Run>) -> Status {
        let status = Status::from(header.status.get());
        match run {
            Some(run) if status == Status::Ok => {
                let let_run = self.phase() == Phase::Running && self.ghost.open().is_none();
                self.ghost.expect(GATE, let_run);
                self.device.enters(self.now(), &run, &mut self.put_in);
                let offsets = [run.cntvoff.get(), run.cntpoff.get()];
                let counts = [run.virt_count.get(), run.phys_count.get()];
                let at = offsets.map(|offset| self.host.wrapping_sub(offset));
                self.ghost
                    .expect(ONE_RUN, at == counts && run.host_count.get() == self.host);
                let confirmed = self.ghost.confirmed() == Some(offsets);
                self.ghost
                    .expect(CONFIRMED, confirmed || !self.left.confirm);
                self.threads[queue] = Thread::Running(offsets);
            }
            _ => self.ghost.expect(GATE, status != Status::Ok),
        }
        status
    }

    fn take_events(&mut self) {
        let now = self.now();
        let records = Records::of(self.device.vm());
        let served = self.device.advance(now);
        self.check_record(records, &served);
        self.replied(&served.replies);
        // Each vCPU's timers, twice, and the phase: there cannot be more events.
        for _ in 0..4 * self.threads.len() + 1 {
            match self.device.next_event(now) {
                Some(event) => {
                    self.note.fired |= event.cval.get() != 0;
                    self.ghost.reported(&event, now);
                }
                None => {
                    self.ghost.all_reported();
                    return;
                }
            }
        }
        self.ghost.found_broken(REPORTED);
    }

    /// The backend is killed, and another takes over.
    fn die(&mut self, lost: bool) {
        self.disturb(|left| &mut left.restarts);
        let done = |open: &Open| open.parts.iter().any(|part| part.done);
        self.note.restarted_under_way = self.ghost.open().is_some_and(done);
        self.note.restarted_armed = self.phase() == Phase::Armed;
        let info = self.device.vm().info(self.now());
        // If the last request let the VM run, some lines have been high since then.
        self.ghost.stepped(self.phase(), &info);
        self.device.restart(self.now());
        self.ghost.forgotten();
        self.submit_again(lost);
    }

    /// What was not answered is lost with the connection, or submitted again.
    fn submit_again(&mut self, lost: bool) {
        if lost {
            self.queues.iter_mut().for_each(Vec::clear);
        }
        for vcpu in self.waiting() {
            if let Thread::Waiting { asked, .. } = self.threads[vcpu]
                && !lost
            {
                let again = Request::of_vcpu(vcpu as u32, asked, Ask::WaitRun);
                self.queues[vcpu].insert(0, again);
            }
            self.threads[vcpu] = Thread::Idle;
        }
    }
}
