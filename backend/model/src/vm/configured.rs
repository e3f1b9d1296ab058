//! A configured VM: a clock for each timeline, the vCPUs' timers, and what phase they are in.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, Phase, Timeline};

use super::clock::{ByTimeline, Clock, Now, ticks_of_ns, ticks_to_pass};
use super::restore::{Restore, Staged, Terms};
use super::schedule::Schedule;
use super::vcpu::{Reported, Vcpu};

/// What belongs to a phase.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum State {
    Paused,
    Running(Schedule),
    Restoring {
        restore: Restore,
        /// The VM from before the restore, in PAUSED, for RESTORE_ABORT.
        before: Box<Configured>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Configured {
    pub(super) abi: Abi,
    /// Hz.
    pub(super) frequency: u64,
    pub(super) anchor: Option<Anchor>,
    pub(super) clocks: ByTimeline<Clock>,
    /// SET_COUNTER_OFFSET fixed the offset.
    pub(super) pinned: bool,
    /// The physical clock is the VM's own. Otherwise it passes the host counter through, except in
    /// RESTORING.
    pub(super) phys_virtualised: bool,
    pub(super) vcpus: Vec<Vcpu>,
    /// The counts of the last GET_VM, which any vCPU may write back.
    pub(super) reported: Reported,
    pub(super) state: State,
}

impl Configured {
    pub(super) fn new(vcpus: u32, abi: Abi, frequency: u64) -> Self {
        Configured {
            abi,
            frequency,
            anchor: None,
            clocks: [Clock::Frozen { count: 0 }, Clock::PASSED_THROUGH],
            pinned: false,
            phys_virtualised: false,
            vcpus: vec![Vcpu::default(); vcpus as usize],
            reported: Reported::default(),
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
            State::Restoring { .. } => Phase::Restoring,
        }
    }

    pub(super) fn count(&self, timeline: Timeline, host: u64) -> u64 {
        self.clocks[timeline.index()].count(host)
    }

    pub(super) fn offset(&self, timeline: Timeline, host: u64) -> u64 {
        self.clocks[timeline.index()].offset(host)
    }

    fn counts(&self, host: u64) -> ByTimeline<u64> {
        self.clocks.map(|clock| clock.count(host))
    }

    /// Both counts and offsets at one instant.
    pub(super) fn run(&self, host: u64) -> wire::Run {
        wire::Run {
            cntvoff: self.offset(Timeline::Virtual, host).into(),
            cntpoff: self.offset(Timeline::Physical, host).into(),
            virt_count: self.count(Timeline::Virtual, host).into(),
            phys_count: self.count(Timeline::Physical, host).into(),
            host_count: host.into(),
        }
    }

    // Time.

    /// The VMM says what the host counter is.
    pub(super) fn set_anchor(&mut self, anchor: Anchor) {
        self.anchor = Some(anchor);
        // What was reported before was counted by another host counter.
        self.reported = Reported::default();
        for vcpu in &mut self.vcpus {
            vcpu.reported = Reported::default();
            vcpu.reported_by_get_vm = Reported::default();
        }
    }

    pub(super) fn pin_offset(&mut self, offset: u64) {
        self.clocks = [Clock::Counting { offset }; Timeline::COUNT];
        self.pinned = true;
        self.phys_virtualised = true;
    }

    fn freeze(&mut self, timeline: Timeline, host: u64) {
        let clock = &mut self.clocks[timeline.index()];
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
        self.start_running(host);
    }

    /// Runs, with the clocks as they are. Every line that is high is reported.
    pub(super) fn start_running(&mut self, host: u64) {
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
            State::Restoring { restore, .. } => restore.ticks_to_timeout(host),
        }
    }

    /// The next expiry to report, as an event. One whose line has fallen is dropped.
    pub(super) fn next_event(&mut self, host: u64, epoch: u64) -> Option<wire::Event> {
        let State::Running(schedule) = &mut self.state else {
            return None;
        };
        loop {
            let (vcpu, timeline) = schedule.next_pending()?;
            let timer = self.vcpus[vcpu as usize].timers[timeline.index()];
            let count = self.clocks[timeline.index()].count(host);
            if timer.line(count) {
                return Some(wire::Event {
                    kind: wire::EVENT_TIMER_ASSERTED.into(),
                    timer: timeline.code().into(),
                    vcpu: vcpu.into(),
                    cval: timer.cval.into(),
                    count: count.into(),
                    epoch: epoch.into(),
                });
            }
        }
    }

    /// Every line that is high is to be reported again.
    pub(super) fn report_lines_again(&mut self, host: u64) {
        let counts = self.counts(host);
        if let State::Running(schedule) = &mut self.state {
            for (index, vcpu) in (0..).zip(&self.vcpus) {
                for timeline in Timeline::ALL {
                    if vcpu.timers[timeline.index()].line(counts[timeline.index()]) {
                        schedule.report(index, timeline);
                    }
                }
            }
        }
    }

    // Restore.

    /// The open restore.
    pub(super) fn restoring(&self) -> Option<&Restore> {
        match &self.state {
            State::Restoring { restore, .. } => Some(restore),
            _ => None,
        }
    }

    pub(super) fn restoring_mut(&mut self) -> Option<&mut Restore> {
        match &mut self.state {
            State::Restoring { restore, .. } => Some(restore),
            _ => None,
        }
    }

    /// The VM from before the open restore.
    pub(super) fn before_restore(&self) -> Option<&Configured> {
        match &self.state {
            State::Restoring { before, .. } => Some(before),
            _ => None,
        }
    }

    /// Opens a restore, or starts the open one over.
    pub(super) fn begin_restore(&mut self, begin: &wire::RestoreBegin, host: u64) {
        let before = match core::mem::replace(&mut self.state, State::Paused) {
            State::Restoring { before, .. } => {
                self.clone_from(&before);
                before
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
        self.open_restore(Restore::open(terms, staged), before, host);
    }

    /// Opens `restore`: both clocks stand still from here on, and no offset is decided.
    pub(super) fn open_restore(&mut self, restore: Restore, before: Box<Configured>, host: u64) {
        self.pinned = false;
        for timeline in Timeline::ALL {
            self.freeze(timeline, host);
        }
        self.state = State::Restoring { restore, before };
    }

    /// Aborts an open restore: everything is as it was before.
    pub(super) fn abort_restore(&mut self) {
        if let State::Restoring { before, .. } = core::mem::replace(&mut self.state, State::Paused)
        {
            *self = *before;
        }
    }

    /// Closes the restore after its last vCPU. `settled` are the counts that the vCPUs brought.
    pub(super) fn complete_restore(
        &mut self,
        settled: ByTimeline<Option<u64>>,
        now: Now,
    ) -> Completed {
        let mut completed = Completed::default();
        let State::Restoring { restore, .. } = core::mem::replace(&mut self.state, State::Paused)
        else {
            return completed;
        };
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
            for timeline in Timeline::ALL {
                let count = settled[timeline.index()].unwrap_or(self.count(timeline, now.host));
                self.clocks[timeline.index()] = Clock::Frozen {
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

/// What the log should say of a restore that was completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Completed {
    /// With ELAPSED: how far the wall clock lies before the save, ns.
    pub(super) realtime_went_back_ns: Option<u64>,
}
