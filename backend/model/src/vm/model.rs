//! [`Vm`]: the VM as the shell sees it.

use alloc::vec::Vec;

use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::wire::{self, info_flags};
use vhost_user_timer_protocol::{CounterSource, Phase, Status, Timeline, VERSION};
use zerocopy::IntoBytes;

use super::call::{Answer, Effects, HEADER, Handled, Incoming, Notice, Refusal, Released, Token};
use super::clock::Now;
use super::configured::{Configured, State};

/// The highest counter frequency that a VM can have, Hz. Arm ARM D12.1.2 has counters at
/// 1 GHz and leaves room above; host counters that stand in for one run up to some 5 GHz.
pub const MAX_FREQUENCY: u64 = 10_000_000_000;

/// What the guest reads of its virtual counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestCounter {
    /// The VM is not configured yet.
    Unconfigured,
    /// The VM does not run.
    Stopped,
    /// The virtual count (CNTVCT), now.
    Running(u64),
}

/// A restore that keeps the vCPUs from running, for those who must not run before it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenRestore {
    /// Its time-out has passed.
    pub overdue: bool,
    /// Ticks until then; `None` without a time-out, and once it has passed.
    pub ticks_left: Option<u64>,
    /// How many vCPUs are missing.
    pub missing: u32,
}

/// The limits that the backend sets for its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Profile {
    /// The most vCPUs.
    pub max_vcpus: u32,
    /// How many request queues serve the VM.
    pub request_queues: u16,
    /// The counter frequency of a VM that asks for none, Hz: 1 to [`MAX_FREQUENCY`].
    pub frequency: u64,
    /// Only that frequency is accepted.
    pub frequency_fixed: bool,
    /// What the host counter counts by, unless the VM has an anchor.
    pub source: CounterSource,
}

impl Profile {
    /// Whether a VM may have this counter frequency, Hz.
    pub(super) fn accepts_frequency(&self, frequency: u64) -> bool {
        frequency == self.frequency
            || !self.frequency_fixed && (1..=MAX_FREQUENCY).contains(&frequency)
    }
}

/// A VM's time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vm {
    pub(super) profile: Profile,
    pub(super) epoch: u64,
    /// `None` in NEW.
    pub(super) configured: Option<Configured>,
    /// The WAIT_RUNs that are not answered yet.
    pub(super) waiters: Vec<Token>,
    /// The last change of phase that is not reported to the frontend yet.
    pub(super) pending_phase: Option<Phase>,
}

impl Vm {
    /// A VM in NEW.
    pub fn new(profile: Profile) -> Self {
        Vm {
            profile,
            epoch: 1,
            configured: None,
            waiters: Vec::new(),
            pending_phase: None,
        }
    }

    /// The limits that the backend sets for the VM.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Where the VM is in its life.
    pub fn phase(&self) -> Phase {
        self.configured
            .as_ref()
            .map_or(Phase::New, Configured::phase)
    }

    /// Starts at 1 and grows by one at every RESTORE_BEGIN.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Counter frequency, Hz.
    pub fn frequency(&self) -> u64 {
        self.configured
            .as_ref()
            .map_or(self.profile.frequency, |configured| configured.frequency)
    }

    /// The VMM's host counter, if it gave one; the shell reads the host counter by it.
    pub fn anchor(&self) -> Option<Anchor> {
        self.configured
            .as_ref()
            .and_then(|configured| configured.anchor)
    }

    /// What the host counter counts by. An anchor is of CLOCK_MONOTONIC.
    fn counter_source(&self) -> CounterSource {
        match self.anchor() {
            Some(_) => CounterSource::Monotonic,
            None => self.profile.source,
        }
    }

    /// What the guest reads of its virtual counter.
    pub fn guest_counter(&self, now: Now) -> GuestCounter {
        match &self.configured {
            None => GuestCounter::Unconfigured,
            Some(configured) if configured.phase() == Phase::Running => {
                GuestCounter::Running(configured.count(Timeline::Virtual, now.host))
            }
            Some(_) => GuestCounter::Stopped,
        }
    }

    /// The restore that keeps the vCPUs from running, if there is one: it is open, or it has armed
    /// the VM.
    pub fn open_restore(&self, now: Now) -> Option<OpenRestore> {
        let restore = self.configured.as_ref().and_then(Configured::restore)?;
        Some(OpenRestore {
            overdue: restore.overdue(now.host),
            ticks_left: restore
                .ticks_to_timeout(now.host)
                .filter(|ticks| *ticks != 0),
            missing: restore.remaining(),
        })
    }

    /// Whether the next call uses [`Now::realtime_ns`].
    pub fn wants_realtime(&self) -> bool {
        self.configured
            .as_ref()
            .and_then(Configured::restoring)
            .is_some_and(|restore| restore.elapsed())
    }

    /// The VM in brief, as GET_INFO answers.
    pub fn info(&self, now: Now) -> wire::Info {
        let mut info = wire::Info {
            version: VERSION.into(),
            phase: self.phase().code().into(),
            frequency: self.frequency().into(),
            epoch: self.epoch.into(),
            max_vcpus: self.profile.max_vcpus.into(),
            request_queues: self.profile.request_queues.into(),
            host_count: now.host.into(),
            flags: self.counter_source().info_flags(),
            ..Default::default()
        };
        if let Some(configured) = &self.configured {
            let vcpus = configured.vcpus();
            let restored = configured
                .restoring()
                .map_or(vcpus, |restore| restore.done());
            info.vcpus = vcpus.into();
            info.restored = restored.into();
            info.cntvoff = configured.offset(Timeline::Virtual, now.host).into();
            info.cntpoff = configured.offset(Timeline::Physical, now.host).into();
            info.abi = configured.abi.code();
            for (set, flag) in [
                (configured.pinned, info_flags::OFFSET_PINNED),
                (configured.anchor.is_some(), info_flags::ANCHORED),
                (configured.phys_virtualised, info_flags::PHYS_VIRTUALISED),
            ] {
                info.flags |= if set { flag } else { 0 };
            }
            info.flags |= configured.flags.info();
        }
        info
    }

    /// Handles one request at one instant.
    pub fn handle(&mut self, now: Now, incoming: &Incoming<'_>, effects: &mut Effects) -> Handled {
        self.advance(now, effects);
        let mut out = core::mem::take(&mut effects.response);
        out.clear();
        out.resize(HEADER, 0);
        let mut answer = Answer {
            out: &mut out,
            room: incoming.room,
        };
        let done = incoming
            .request
            .map_err(Refusal::from)
            .and_then(|request| self.perform(now, &request, incoming.token, &mut answer, effects));
        let (handled, refusal) = match done {
            Ok(handled) => (handled, Refusal::from(Status::Ok)),
            Err(refusal) => {
                out.truncate(HEADER);
                (Handled::Answered, refusal)
            }
        };
        out[..HEADER].copy_from_slice(self.header(refusal).as_bytes());
        effects.response = out;
        handled
    }

    /// Refuses the last request after all, for a reason that only the shell can know. The request
    /// must have changed nothing.
    pub fn refuse(&self, status: Status, effects: &mut Effects) {
        effects.response.clear();
        let header = self.header(status.into());
        effects.response.extend_from_slice(header.as_bytes());
    }

    fn header(&self, Refusal { status, detail }: Refusal) -> wire::ResponseHeader {
        wire::ResponseHeader {
            status: status.errno().into(),
            detail: detail.into(),
            epoch: self.epoch.into(),
        }
    }

    /// Lets time pass up to `now`: finds expired timers, and a restore's time-out.
    pub fn advance(&mut self, now: Now, effects: &mut Effects) {
        let Some(configured) = &mut self.configured else {
            return;
        };
        configured.advance(now.host);
        if let Some(restore) = configured.restore_mut()
            && restore.take_timeout(now.host)
        {
            effects.changed.vm = true;
            let remaining = restore.remaining();
            effects.notices.push(Notice::RestoreTimedOut {
                missing: restore.missing().collect(),
                vcpus: configured.vcpus(),
            });
            let missing = Refusal::new(Status::TimedOut, remaining);
            self.release_all(missing, None, effects);
        }
    }

    /// Ticks from `now` to the next instant at which [`advance`](Self::advance) finds something;
    /// `None` where time alone changes nothing.
    pub fn ticks_to_next(&self, now: Now) -> Option<u64> {
        self.configured.as_ref()?.ticks_to_next(now.host)
    }

    /// Whether [`next_event`](Self::next_event) may have something.
    pub fn has_event(&self) -> bool {
        self.pending_phase.is_some()
            || self.configured.as_ref().is_some_and(|configured| {
                matches!(&configured.state, State::Running(schedule) if schedule.has_pending())
            })
    }

    /// The next event for the frontend, for a buffer of the event queue.
    pub fn next_event(&mut self, now: Now) -> Option<wire::Event> {
        let configured = self.configured.as_mut()?;
        match self.pending_phase.take() {
            Some(phase) => Some(wire::Event {
                kind: wire::EVENT_PHASE_CHANGED.into(),
                vcpu: phase.code().into(),
                count: configured.count(Timeline::Virtual, now.host).into(),
                epoch: self.epoch.into(),
                ..Default::default()
            }),
            None => configured.next_event(now.host, self.epoch),
        }
    }

    /// A request queue is being stopped: its waiters are answered with ECANCELED.
    pub fn cancel_queue(&mut self, queue: u16, effects: &mut Effects) {
        let of_queue = |token: &mut Token| token.queue == queue;
        let canceled = self.waiters.extract_if(.., of_queue).collect();
        self.release(canceled, Status::Canceled.into(), None, effects);
    }

    /// The frontend is gone, with everything that it had not read: its waiters are forgotten, and
    /// every line that is high is reported again.
    pub fn disconnect(&mut self, now: Now) {
        self.waiters.clear();
        if let Some(configured) = &mut self.configured {
            configured.advance(now.host);
            configured.report_lines_again(now.host);
        }
    }

    /// Back to NEW (RESET_DEVICE). The epoch stays, so that a late request from before is not taken
    /// for one of the next VM.
    pub fn reset(&mut self, effects: &mut Effects) {
        effects.changed.all = true;
        self.configured = None;
        self.waiters.clear();
        self.pending_phase = None;
    }

    /// Answers these waiters, all with the same status, detail and `run`.
    fn release(
        &self,
        waiters: Vec<Token>,
        why: Refusal,
        run: Option<wire::Run>,
        effects: &mut Effects,
    ) {
        if !waiters.is_empty() {
            effects.released.push(Released {
                waiters,
                header: self.header(why),
                run,
            });
        }
    }

    /// Answers all waiters.
    pub(super) fn release_all(
        &mut self,
        why: impl Into<Refusal>,
        run: Option<wire::Run>,
        effects: &mut Effects,
    ) {
        let waiters = core::mem::take(&mut self.waiters);
        self.release(waiters, why.into(), run, effects);
    }

    /// EBUSY. Its detail is the phase, or, while RESTORING, how many vCPUs are missing.
    pub(super) fn busy(&self) -> Refusal {
        let restore = self.configured.as_ref().and_then(Configured::restoring);
        let detail = restore.map_or(self.phase().code(), |restore| restore.remaining());
        Refusal::new(Status::Busy, detail)
    }

    /// Does what a change of phase entails, if there was one: reports it to the frontend and the
    /// log, and answers the waiters where the vCPUs may run now.
    #[inline]
    pub(super) fn phase_changed(&mut self, from: Phase, now: Now, effects: &mut Effects) {
        let to = self.phase();
        if from != to {
            self.phase_is(to, from, now, effects);
        }
    }

    fn phase_is(&mut self, to: Phase, from: Phase, now: Now, effects: &mut Effects) {
        self.pending_phase = Some(to);
        effects.notices.push(Notice::Phase {
            from,
            to,
            epoch: self.epoch,
        });
        if to == Phase::Running {
            let run = self.configured.as_ref().map(|vm| vm.run(now.host));
            self.release_all(Status::Ok, run, effects);
        }
    }
}
