//! The VM's time, and the gate its vCPUs wait at.
//!
//! [`Vm`] is a plain value. It is fed requests as bytes, with the host counter as an
//! argument, and gives back answers and effects; it reads no clock, holds no descriptor and
//! maps no memory. SPEC.md of the protocol crate is what it does; what must always hold:
//!
//! - one pair of counter offsets per VM, changed only outside RUNNING;
//! - a WAIT_RUN of a restore is answered only after every vCPU's RESTORE_DONE of that epoch,
//!   and all waiters get the same offsets and the same instant;
//! - no vCPU's count goes back over pause and restore, unless the VMM itself writes a smaller
//!   count;
//! - the order of register writes never matters;
//! - a due timer is never lost; a masked or disabled one never fires.
//!
//! Where does time stand still? In `clock`. Who waits for whom? In `restore`. When does a
//! timer fire? In `schedule`, over `deadlines`. What does the time page say? In `page`.

use alloc::vec::Vec;

mod clock;
mod deadlines;
mod machine;
mod ops;
mod page;
mod record;
mod restore;
mod saved;
mod schedule;
mod timer;

#[cfg(test)]
mod tests;

pub use clock::{Now, ns_of_ticks, ticks_of_ns};
pub use page::PageOrder;
pub use record::{BadRecord, VcpuRecord, VmRecord};
pub use saved::{LoadError, SaveError, Saved, SavedVcpu};
pub use vhost_user_timer_protocol::Timeline;
pub use vhost_user_timer_protocol::counter::Anchor;
pub use vhost_user_timer_protocol::op::Effect;

use machine::{Machine, State};
use ops::{Answer, HEADER};
use vhost_user_timer_protocol::abi::BadId;
use vhost_user_timer_protocol::wire::{self, info_flags};
use vhost_user_timer_protocol::{Phase, Request, Status, VERSION};
use zerocopy::IntoBytes;

/// The highest counter frequency that a VM can have, Hz. Arm ARM D12.1.2 has counters at
/// 1 GHz and leaves room above; host counters that stand in for one run up to some 5 GHz.
pub const MAX_FREQUENCY: u64 = 10_000_000_000;

/// What can be said of the counter that the guest reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestCounter {
    /// Nobody has configured the VM.
    Unconfigured,
    /// The VM does not run.
    Stopped,
    /// The virtual count (CNTVCT), now.
    Running(u64),
}

/// A restore that is open, for those who may not run before it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenRestore {
    /// Its time-out has passed.
    pub overdue: bool,
    /// Ticks until that is so; `None` where it never will be, or is.
    pub ticks_left: Option<u64>,
    /// How many vCPUs are missing.
    pub missing: u32,
}

/// What the backend lets its VM be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Profile {
    /// The most vCPUs.
    pub max_vcpus: u32,
    /// How many request queues the VM is served by.
    pub request_queues: u16,
    /// The counter frequency of a VM that asks for none, Hz: 1 to [`MAX_FREQUENCY`].
    pub frequency: u64,
    /// No other frequency than that is taken.
    pub frequency_fixed: bool,
}

impl Profile {
    /// Whether a VM may have this counter frequency, Hz.
    fn takes_frequency(&self, frequency: u64) -> bool {
        frequency == self.frequency
            || !self.frequency_fixed && (1..=MAX_FREQUENCY).contains(&frequency)
    }
}

/// A name that the shell gives a WAIT_RUN, to find its place again when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token {
    /// The request queue.
    pub queue: u16,
    /// The head of the descriptor chain.
    pub head: u16,
}

/// One request as it came in.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// The request, or with what status its bytes are refused.
    pub request: Result<Request<'a>, Status>,
    /// How many device-writable bytes there are: at least those of a response header.
    pub room: usize,
    /// Where the answer belongs.
    pub token: Token,
}

impl<'a> Incoming<'a> {
    /// The request in these device-readable bytes.
    pub fn parse(bytes: &'a [u8], room: usize, token: Token) -> Self {
        Incoming {
            request: Request::parse(bytes),
            room,
            token,
        }
    }

    /// The most that handling it can change.
    pub fn effect(&self) -> Effect {
        self.request
            .map_or(Effect::Reads, |request| request.row().effect)
    }
}

/// Whether a request was answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Handled {
    /// The answer is in [`Effects::response`].
    Answered,
    /// It waits; [`Effects::released`] will name its token one day.
    Waiting,
}

/// Waiters that are answered, all with the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Released {
    /// Whom to answer.
    pub waiters: Vec<Token>,
    /// The answer's header.
    pub header: wire::ResponseHeader,
    /// The answer's body, where they may run.
    pub run: Option<wire::Run>,
}

/// Something that the log should say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The VM's phase changed.
    Phase {
        /// From this one.
        from: Phase,
        /// To this one.
        to: Phase,
        /// In this epoch.
        epoch: u64,
    },
    /// A restore takes longer than the VMM gave it. It stays open.
    RestoreTimedOut {
        /// The vCPUs that are missing, in order.
        missing: Vec<u32>,
        /// How many the VM has.
        vcpus: u32,
    },
    /// ELAPSED was asked for, but the state was saved in this host's future.
    RealtimeWentBack {
        /// By how much, ns.
        ns: u64,
    },
}

/// What a state file must take in before an answer may be seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// The VM's own part; so too where vCPUs changed.
    pub vm: bool,
    /// These vCPUs.
    pub vcpus: Vec<u32>,
    /// Everything.
    pub all: bool,
}

impl Changed {
    /// Whether anything changed at all.
    pub fn any(&self) -> bool {
        self.vm || self.all || !self.vcpus.is_empty()
    }

    /// Nothing has changed since.
    pub fn clear(&mut self) {
        self.vm = false;
        self.all = false;
        self.vcpus.clear();
    }
}

/// What came of calls into the model, for the shell to carry out. It is reused from call to
/// call, so that nothing is allocated for a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// The answer to the request handled last, header first.
    pub response: Vec<u8>,
    /// Waiters to answer; the shell takes them out.
    pub released: Vec<Released>,
    /// What to log; the shell takes it out.
    pub notices: Vec<Notice>,
    /// What changed; the shell clears it.
    pub changed: Changed,
    /// What SET_TIME_PAGE wants; the shell takes it out, and does it or has it refused
    /// ([`Vm::refuse`]).
    pub page: Option<PageOrder>,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refusal {
    status: Status,
    detail: u32,
}

impl Refusal {
    fn bad_id(bad: BadId, entry: usize) -> Self {
        let status = match bad {
            BadId::Invalid => Status::Invalid,
            BadId::Unknown => Status::UnknownRegister,
        };
        Refusal {
            status,
            detail: entry as u32,
        }
    }

    fn invalid(entry: usize) -> Self {
        Refusal {
            status: Status::Invalid,
            detail: entry as u32,
        }
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Refusal { status, detail: 0 }
    }
}

/// A VM's time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Vm {
    profile: Profile,
    epoch: u64,
    /// `None` in NEW.
    machine: Option<Machine>,
    /// Whoever waits to run.
    waiters: Vec<Token>,
    /// The phase of which the frontend has yet to be told.
    untold_phase: Option<Phase>,
}

impl Vm {
    /// A VM that is yet to be configured.
    pub fn new(profile: Profile) -> Self {
        Vm {
            profile,
            epoch: 1,
            machine: None,
            waiters: Vec::new(),
            untold_phase: None,
        }
    }

    /// Where the VM is in its life.
    pub fn phase(&self) -> Phase {
        self.machine.as_ref().map_or(Phase::New, Machine::phase)
    }

    /// Starts at 1 and grows by one at every RESTORE_BEGIN.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Counter frequency, Hz.
    pub fn frequency(&self) -> u64 {
        self.machine
            .as_ref()
            .map_or(self.profile.frequency, |machine| machine.frequency)
    }

    /// What the VMM said of its host counter; the shell's reading follows it.
    pub fn anchor(&self) -> Option<Anchor> {
        self.machine.as_ref().and_then(|machine| machine.anchor)
    }

    /// What the guest reads of its virtual counter.
    pub fn guest_counter(&self, now: Now) -> GuestCounter {
        match &self.machine {
            None => GuestCounter::Unconfigured,
            Some(machine) if machine.phase() == Phase::Running => {
                GuestCounter::Running(machine.count(Timeline::Virtual, now.host))
            }
            Some(_) => GuestCounter::Stopped,
        }
    }

    /// The restore that is open, where one is.
    pub fn open_restore(&self, now: Now) -> Option<OpenRestore> {
        let restore = self.machine.as_ref().and_then(Machine::restoring)?;
        Some(OpenRestore {
            overdue: restore.overdue(now.host),
            ticks_left: restore
                .ticks_to_timeout(now.host)
                .filter(|ticks| *ticks != 0),
            missing: restore.remaining(),
        })
    }

    /// Whether the next call looks at [`Now::realtime_ns`].
    pub fn wants_realtime(&self) -> bool {
        self.machine
            .as_ref()
            .and_then(Machine::restoring)
            .is_some_and(|restore| restore.elapsed())
    }

    /// The VM in brief.
    pub fn info(&self, now: Now) -> wire::Info {
        let mut info = wire::Info {
            version: VERSION.into(),
            phase: self.phase().code().into(),
            frequency: self.frequency().into(),
            epoch: self.epoch.into(),
            max_vcpus: self.profile.max_vcpus.into(),
            request_queues: self.profile.request_queues.into(),
            host_count: now.host.into(),
            ..Default::default()
        };
        if let Some(machine) = &self.machine {
            let vcpus = machine.vcpus();
            let restored = machine.restoring().map_or(vcpus, |restore| restore.done());
            info.vcpus = vcpus.into();
            info.restored = restored.into();
            info.cntvoff = machine.offset(Timeline::Virtual, now.host).into();
            info.cntpoff = machine.offset(Timeline::Physical, now.host).into();
            info.abi = machine.abi.code();
            for (set, flag) in [
                (machine.pinned, info_flags::OFFSET_PINNED),
                (machine.anchor.is_some(), info_flags::ANCHORED),
                (machine.phys_virtualised, info_flags::PHYS_VIRTUALISED),
            ] {
                info.flags |= if set { flag } else { 0 };
            }
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

    /// Refuses the request that was handled last after all, for what only the shell can know. It
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

    /// Finds what the passing of time has brought: expired timers, and the end of a restore's
    /// patience.
    pub fn advance(&mut self, now: Now, effects: &mut Effects) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        machine.advance(now.host);
        if let State::Restoring(restore) = &mut machine.state
            && restore.take_timeout(now.host)
        {
            effects.changed.vm = true;
            effects.notices.push(Notice::RestoreTimedOut {
                missing: restore.missing().collect(),
                vcpus: machine.vcpus(),
            });
            let missing = self.busy_detail();
            self.release(effects, Status::TimedOut, missing, None);
        }
    }

    /// Ticks from `now` to the next instant at which [`advance`](Self::advance) has something
    /// to find; `None` where time alone changes nothing.
    pub fn ticks_to_next(&self, now: Now) -> Option<u64> {
        self.machine.as_ref()?.ticks_to_next(now.host)
    }

    /// Whether [`next_event`](Self::next_event) may have something.
    pub fn has_event(&self) -> bool {
        self.untold_phase.is_some()
            || self.machine.as_ref().is_some_and(|machine| {
                matches!(&machine.state, State::Running(schedule) if schedule.has_untold())
            })
    }

    /// The next thing that the frontend must be told, for a buffer of the event queue.
    pub fn next_event(&mut self, now: Now) -> Option<wire::Event> {
        let machine = self.machine.as_mut()?;
        match self.untold_phase.take() {
            Some(phase) => Some(wire::Event {
                kind: wire::EVENT_PHASE_CHANGED.into(),
                vcpu: phase.code().into(),
                count: machine.count(Timeline::Virtual, now.host).into(),
                epoch: self.epoch.into(),
                ..Default::default()
            }),
            None => machine.next_event(now.host, self.epoch),
        }
    }

    /// A request queue is being stopped: whoever waits on it is told so.
    pub fn cancel_queue(&mut self, queue: u16, effects: &mut Effects) {
        let (canceled, waiters) = core::mem::take(&mut self.waiters)
            .into_iter()
            .partition(|token| token.queue == queue);
        self.waiters = canceled;
        self.release(effects, Status::Canceled, 0, None);
        self.waiters = waiters;
    }

    /// The frontend is gone, and with it whatever it had not read: nobody waits any longer,
    /// and every line that stands high is to be told again.
    pub fn disconnect(&mut self, now: Now) {
        self.waiters.clear();
        if let Some(machine) = &mut self.machine {
            machine.advance(now.host);
            machine.tell_lines_again(now.host);
        }
    }

    /// Back to NEW (RESET_DEVICE). The epoch goes on, so that no late request of the former
    /// life is taken for one of the next.
    pub fn reset(&mut self, effects: &mut Effects) {
        effects.changed.all = true;
        self.machine = None;
        self.waiters.clear();
        self.untold_phase = None;
    }

    fn release(
        &mut self,
        effects: &mut Effects,
        status: Status,
        detail: u32,
        run: Option<wire::Run>,
    ) {
        if !self.waiters.is_empty() {
            effects.released.push(Released {
                waiters: core::mem::take(&mut self.waiters),
                header: self.header(Refusal { status, detail }),
                run,
            });
        }
    }

    /// The detail of EBUSY: the phase, or, while RESTORING, how many vCPUs are missing.
    fn busy_detail(&self) -> u32 {
        self.machine
            .as_ref()
            .and_then(Machine::restoring)
            .map_or(self.phase().code(), |restore| restore.remaining())
    }

    fn busy(&self) -> Refusal {
        Refusal {
            status: Status::Busy,
            detail: self.busy_detail(),
        }
    }
}
