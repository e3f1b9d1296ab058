//! A configured VM: a clock for each timeline, the vCPUs' timers, and what phase they are in.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, Phase, Timeline};

use super::clock::{ByTimeline, Clock};
use super::flags::VmFlags;
use super::restore::Restore;
use super::schedule::Schedule;
use super::vcpu::{Reported, Vcpu};

/// What belongs to a phase.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum State {
    Paused,
    Running(Schedule),
    Restoring(Open),
    /// By RESUME, or by a restore that is complete.
    Armed(Option<Open>),
}

/// A restore, and the VM from before it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Open {
    pub(super) restore: Restore,
    /// The VM from before the restore, in PAUSED, for RESTORE_ABORT.
    pub(super) before: Box<Configured>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Configured {
    pub(super) abi: Abi,
    /// Hz.
    pub(super) frequency: u64,
    pub(super) flags: VmFlags,
    pub(super) anchor: Option<Anchor>,
    pub(super) clocks: ByTimeline<Clock>,
    /// SET_COUNTER_OFFSET fixed the offset.
    pub(super) pinned: bool,
    /// The physical clock is the VM's own. Otherwise it passes the host counter through, except in
    /// RESTORING. With ONE_OFFSET it is always the VM's own, and equals the virtual one.
    pub(super) phys_virtualised: bool,
    pub(super) vcpus: Vec<Vcpu>,
    /// The counts of the last GET_VM, which any vCPU may write back.
    pub(super) reported: Reported,
    pub(super) state: State,
}

impl Configured {
    pub(super) fn new(vcpus: u32, abi: Abi, frequency: u64, flags: VmFlags) -> Self {
        let virt = Clock::Frozen { count: 0 };
        let phys = match flags.one_offset {
            true => virt,
            false => Clock::PASSED_THROUGH,
        };
        Configured {
            abi,
            frequency,
            flags,
            anchor: None,
            clocks: [virt, phys],
            pinned: false,
            phys_virtualised: flags.one_offset,
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
            State::Restoring(_) => Phase::Restoring,
            State::Armed(_) => Phase::Armed,
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

    pub(super) fn freeze(&mut self, timeline: Timeline, host: u64) {
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
        self.start_counting(None, host);
    }

    /// Both clocks count from here on, and their offsets are decided. The VM runs, or is armed by
    /// `restore` or RESUME until the VMM confirms the offsets.
    pub(super) fn start_counting(&mut self, restore: Option<Open>, host: u64) {
        self.clocks = self.clocks.map(|clock| clock.counting(host));
        match self.flags.confirm {
            true => self.state = State::Armed(restore),
            false => self.start_running(host),
        }
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
            State::Running(schedule) => Some(schedule.ticks_to_next(self.counts(host))),
            _ => self.restore()?.ticks_to_timeout(host),
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

    // The restore: see `gate`.

    /// The open restore, and what it puts back.
    pub(super) fn open(&self) -> Option<&Open> {
        match &self.state {
            State::Restoring(open) | State::Armed(Some(open)) => Some(open),
            _ => None,
        }
    }

    /// The restore that can still be aborted: the open one, or the one that armed the VM.
    pub(super) fn restore(&self) -> Option<&Restore> {
        self.open().map(|open| &open.restore)
    }

    pub(super) fn restore_mut(&mut self) -> Option<&mut Restore> {
        match &mut self.state {
            State::Restoring(open) | State::Armed(Some(open)) => Some(&mut open.restore),
            _ => None,
        }
    }

    /// The open restore.
    pub(super) fn restoring(&self) -> Option<&Restore> {
        match &self.state {
            State::Restoring(open) => Some(&open.restore),
            _ => None,
        }
    }

    pub(super) fn restoring_mut(&mut self) -> Option<&mut Restore> {
        match &mut self.state {
            State::Restoring(open) => Some(&mut open.restore),
            _ => None,
        }
    }
}
