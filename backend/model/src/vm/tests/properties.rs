//! Random lives of a VM: it answers what a naive VM answers, and what must always hold, holds.

use proptest::prelude::*;
use vhost_user_timer_protocol::request::Body;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, Phase, Register, Status};
use vhost_user_timer_reference as reference;
use vhost_user_timer_reference::contract::Event;
use vhost_user_timer_reference::{Reference, Waiter};
use zerocopy::{FromBytes, IntoBytes};

use super::life::{Asked, Seen, Verdict, Witness, live};
use super::rig::{Ask, Fired, PROFILE, Reply, Rig, START_REALTIME, fired_by, registers_of};
use super::steps::story;
use crate::vm::{Notice, Released, Timeline, Token};

/// The most steps of a life.
const STEPS: usize = 60;

pub(super) fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        // PROPTEST_CASES asks for more.
        cases: cases.max(default.cases),
        // A failure prints its story; make a named test of what it shows.
        failure_persistence: None,
        ..default
    }
}

// The naive VM.

fn naive(host: u64) -> Reference {
    let profile = reference::Profile {
        max_vcpus: PROFILE.max_vcpus,
        request_queues: PROFILE.request_queues,
        frequency: PROFILE.frequency,
        frequency_fixed: PROFILE.frequency_fixed,
        source: PROFILE.source.code(),
    };
    Reference::new(profile, host, START_REALTIME)
}

fn waiter(token: Token) -> Waiter {
    let Token { queue, head } = token;
    Waiter { queue, head }
}

fn as_released(released: &Released) -> reference::Released {
    let run = released.run.as_ref();
    let run = run.map_or([].as_slice(), |run| run.as_bytes());
    reference::Released {
        waiters: released.waiters.iter().copied().map(waiter).collect(),
        answer: [released.header.as_bytes(), run].concat(),
    }
}

fn as_notice(notice: &Notice) -> reference::Notice {
    match *notice {
        Notice::Phase { from, to, epoch } => reference::Notice::Phase {
            from: from.code(),
            to: to.code(),
            epoch,
        },
        Notice::RestoreTimedOut { ref missing, vcpus } => reference::Notice::RestoreTimedOut {
            missing: missing.clone(),
            vcpus,
        },
        Notice::RealtimeWentBack { ns } => reference::Notice::RealtimeWentBack { ns },
        Notice::PhysicalCountMoved { ticks } => reference::Notice::PhysicalCountMoved { ticks },
    }
}

/// The phase is reported first; the order of the timers says nothing.
fn sorted(mut events: Vec<Event>) -> Vec<Event> {
    events.sort_by_key(|event| (event.kind == 1, event.vcpu, event.timer));
    events
}

impl Witness for Reference {
    fn see(&mut self, rig: &mut Rig, seen: &Seen<'_>) -> Verdict {
        match *seen {
            Seen::Asked(asked, reply) => {
                let expected = self.handle(&asked.bytes, asked.room, waiter(asked.token));
                let answer = reply.map(|_| &rig.effects.response);
                prop_assert_eq!(answer, expected.as_ref(), "{:?}", asked);
            }
            Seen::Passed(ticks, told) => {
                self.pass(ticks, ticks);
                if told {
                    self.notice_time();
                }
            }
            Seen::Events(events) => {
                let events = events.iter().map(|event| Event::of(&event.as_bytes()));
                prop_assert_eq!(sorted(events.collect()), sorted(self.take_events()));
                prop_assert!(!rig.vm.has_event() || rig.vm.phase() == Phase::New);
            }
            Seen::CancelQueue(queue) => self.stop_queue(queue),
            Seen::Disconnect => self.disconnect(),
            Seen::Reset => self.reset(),
            Seen::HostIs(host) => self.set_host(host),
            Seen::Effects(released, notices) => {
                let released: Vec<_> = released.iter().map(as_released).collect();
                let notices: Vec<_> = notices.iter().map(as_notice).collect();
                prop_assert_eq!(released, self.take_released());
                prop_assert_eq!(notices, self.take_notices());
            }
        }
        prop_assert_eq!(rig.now.host, self.host());
        Ok(())
    }
}

proptest! {
    #![proptest_config(config(700))]

    #[test]
    fn the_vm_answers_what_the_naive_one_answers(story in story(STEPS)) {
        live(&story, &mut naive(story.host))?;
    }
}

// What must always hold, seen from outside.

/// I1 to I3, and I8: the clocks and the gate.
#[derive(Default)]
struct Clocks {
    /// Offsets of the VM while it runs or is armed.
    offsets: Option<[u64; 2]>,
    counts: [u64; 2],
    was: Option<Phase>,
    /// The last request confirmed the VM's offsets.
    confirmed: bool,
    /// With ELAPSED: when the state was saved.
    saved_ns: Option<u64>,
    /// What the vCPUs brought to the open restore, and which are done.
    brought: Vec<Option<u64>>,
    done: Vec<bool>,
    pinned: bool,
}

/// A request that may move a count: the VMM sets it or opens, ends or drops a restore.
fn may_move_a_count(asked: &Asked) -> bool {
    let a_count = |id: u64| {
        [Register::TimerCnt, Register::PtimerCnt]
            .iter()
            .any(|register| {
                [Abi::Arm64, Abi::Arm]
                    .iter()
                    .any(|abi| register.id(*abi) == id)
            })
    };
    match asked.body() {
        Some(
            Body::ConfigureVm(_)
            | Body::SetCounterOffset(_)
            | Body::RestoreBegin(_)
            | Body::RestoreAbort
            | Body::RestoreDone,
        ) => true,
        Some(Body::SetRegs(entries)) => {
            asked.is_done() || entries.iter().any(|entry| a_count(entry.id.get()))
        }
        _ => asked.is_done(),
    }
}

fn counts_of(info: &wire::Info) -> [u64; 2] {
    let offsets = [info.cntvoff.get(), info.cntpoff.get()];
    offsets.map(|offset| info.host_count.get().wrapping_sub(offset))
}

impl Clocks {
    /// I2 and I3 of a restore: which vCPU has brought what.
    fn follow_restore(&mut self, asked: &Asked, rig: &Rig, info: &wire::Info) -> Verdict {
        let restoring = self.was == Some(Phase::Restoring);
        let mut named = Vec::new();
        match asked.body() {
            Some(Body::RestoreBegin(begin)) => {
                let vcpus = info.vcpus.get() as usize;
                let elapsed = begin.flags.get() & wire::restore_flags::ELAPSED != 0;
                self.saved_ns = elapsed.then_some(begin.saved_realtime_ns.get());
                self.brought = vec![None; vcpus];
                self.done = vec![false; vcpus];
            }
            Some(Body::RestoreDone) => named.push(asked.vcpu()),
            Some(Body::SetVm(entries)) => {
                for entry in entries {
                    named.push(entry.vcpu.get());
                    if !self.pinned && restoring && entry.has(Register::TimerCnt) {
                        self.brought[entry.vcpu.get() as usize] =
                            Some(entry.get(Register::TimerCnt));
                    }
                }
            }
            Some(Body::SetRegs(entries)) => {
                named.push(asked.vcpu());
                for entry in entries {
                    let ids = [Abi::Arm64, Abi::Arm].map(|abi| Register::TimerCnt.id(abi));
                    if !self.pinned && restoring && ids.contains(&entry.id.get()) {
                        self.brought[asked.vcpu() as usize] = Some(entry.value.get());
                    }
                }
            }
            _ => {}
        }
        if !(restoring && asked.is_done()) {
            return Ok(());
        }
        for vcpu in named {
            self.done[vcpu as usize] = true;
        }
        if info.phase.get() != Phase::Restoring.code() {
            prop_assert!(self.done.iter().all(|done| *done));
            let pinned = info.flags & wire::info_flags::OFFSET_PINNED != 0;
            let largest = self.brought.iter().flatten().max();
            // A tick is a nanosecond here.
            let now = rig.now.realtime_ns;
            let elapsed = self.saved_ns.map_or(0, |saved| now.saturating_sub(saved));
            let settled = largest.map(|largest| largest.wrapping_add(elapsed));
            prop_assert!(pinned || settled == Some(counts_of(info)[0]));
        }
        Ok(())
    }

    /// I8: a VM with CONFIRM runs by CONFIRM_RUN with its offsets, and by nothing else.
    fn follow_confirmation(&mut self, asked: &Asked, info: &wire::Info, phase: Phase) -> Verdict {
        self.confirmed = match asked.body() {
            Some(Body::ConfirmRun(said)) => {
                (said.cntvoff, said.cntpoff) == (info.cntvoff, info.cntpoff)
            }
            _ => false,
        };
        let confirms = info.flags & wire::info_flags::CONFIRM != 0;
        let began = phase == Phase::Running && self.was != Some(Phase::Running);
        prop_assert!(
            !(confirms && began) || self.confirmed,
            "{:?} let vCPUs run",
            asked
        );
        prop_assert!(confirms || phase != Phase::Armed);
        Ok(())
    }
}

impl Witness for Clocks {
    fn see(&mut self, rig: &mut Rig, seen: &Seen<'_>) -> Verdict {
        let info = rig.vm.info(rig.now);
        let counts = counts_of(&info);
        let phase = rig.vm.phase();

        let counts_on = matches!(phase, Phase::Running | Phase::Armed);

        // I1: the offsets never change while the VM runs, nor between their decision and that.
        let offsets = [info.cntvoff.get(), info.cntpoff.get()];
        if !counts_on {
            self.offsets = None;
        } else {
            let known = *self.offsets.get_or_insert(offsets);
            prop_assert_eq!(offsets, known);
        }

        // I3: a count is frozen or goes on with the host; only the VMM sets it.
        match *seen {
            Seen::Asked(asked, reply) => {
                let done = reply.is_some_and(|reply| reply.status == Status::Ok);
                if !(done && may_move_a_count(asked)) {
                    prop_assert_eq!(counts, self.counts, "{:?}", asked);
                }
                if done {
                    self.follow_restore(asked, rig, &info)?;
                }
                self.follow_confirmation(asked, &info, phase)?;
                let ran = self.was == Some(Phase::Restoring) && counts_on;
                prop_assert!(!ran || asked.is_done(), "{:?} let vCPUs run", asked);
            }
            Seen::Passed(ticks, _) => {
                for (count, before) in counts.into_iter().zip(self.counts) {
                    let passed = count.wrapping_sub(before);
                    prop_assert!(passed == 0 || passed == ticks);
                    prop_assert!(passed == ticks || !counts_on);
                }
            }
            Seen::Reset | Seen::HostIs(_) => {}
            Seen::Effects(released, _) => {
                // I2: no vCPU is released before all are done, and all get the same answer.
                for released in released {
                    prop_assert!(!released.waiters.is_empty());
                    let ok = released.header.status.get() == 0;
                    prop_assert_eq!(ok, released.run.is_some());
                    if let Some(run) = released.run {
                        prop_assert_eq!(phase, Phase::Running);
                        let confirms = info.flags & wire::info_flags::CONFIRM != 0;
                        prop_assert!(self.confirmed || !confirms);
                        prop_assert!(self.done.iter().all(|done| *done));
                        prop_assert_eq!([run.cntvoff.get(), run.cntpoff.get()], offsets);
                        prop_assert_eq!(run.host_count.get(), rig.now.host);
                        prop_assert_eq!(run.virt_count.get(), counts[0]);
                        prop_assert_eq!(run.phys_count.get(), counts[1]);
                        prop_assert_eq!(released.header.epoch.get(), rig.vm.epoch());
                    }
                }
            }
            _ => prop_assert_eq!(counts, self.counts),
        }
        if phase != Phase::Restoring {
            self.brought.clear();
            self.done.clear();
        }
        self.was = Some(phase);
        self.counts = counts;
        self.pinned = info.flags & wire::info_flags::OFFSET_PINNED != 0;
        Ok(())
    }
}

/// I7: in RUNNING every line that is high is reported, no other is, and none is late.
#[derive(Default)]
struct Lines {
    /// The lines that were reported high and have stayed high.
    heard: Vec<Fired>,
}

/// The timers that are enabled and not masked, with count and compare value, by GET_VM.
fn armed(rig: &Rig) -> Vec<(Fired, u64, u64)> {
    let mut rig = rig.clone();
    let vcpus = rig.info().vcpus.get();
    let mut armed = Vec::new();
    if vcpus == 0 {
        return armed;
    }
    let body = rig.done(&Ask::get_vm(0, vcpus)).body;
    for entry in <[wire::Vcpu]>::ref_from_bytes(&body[40..]).unwrap() {
        for clock in Timeline::ALL {
            let [ctl, cnt, cval] = registers_of(clock).map(|register| entry.get(register));
            if ctl & 3 == 1 {
                armed.push(((entry.vcpu.get(), clock), cnt, cval));
            }
        }
    }
    armed
}

/// Ticks until a line rises by itself, which may be after its count wraps.
fn ticks_to_rise(count: u64, cval: u64) -> Option<u128> {
    match (count < cval, cval) {
        (true, _) => Some(u128::from(cval - count)),
        (false, 0) => None,
        (false, _) => Some((1 << 64) - u128::from(count) + u128::from(cval)),
    }
}

impl Lines {
    fn hear_lines(&mut self, vcpu: u32, reply: &Reply) {
        for (clock, bit) in [(Timeline::Virtual, 1), (Timeline::Physical, 2)] {
            if reply.body[0] & bit != 0 {
                self.heard.push((vcpu, clock));
            }
        }
    }
}

impl Witness for Lines {
    fn see(&mut self, rig: &mut Rig, seen: &Seen<'_>) -> Verdict {
        let armed = armed(rig);
        let high: Vec<Fired> = armed
            .iter()
            .filter(|(_, count, cval)| count >= cval)
            .map(|(timer, ..)| *timer)
            .collect();
        let running = rig.vm.phase() == Phase::Running;
        if running && matches!(seen, Seen::Asked(..) | Seen::Passed(_, true)) {
            // A backend that sleeps as long as the VM says misses nothing, and does not spin.
            let ticks = rig.vm.ticks_to_next(rig.now).unwrap();
            let rises = armed.iter().filter_map(|it| ticks_to_rise(it.1, it.2));
            prop_assert!(ticks > 0);
            prop_assert!(rises.min().is_none_or(|rise| u128::from(ticks) <= rise));
        }
        if !running || matches!(seen, Seen::Disconnect) {
            self.heard.clear();
        }
        // A line that fell, or may have fallen between two looks, must be reported again.
        self.heard.retain(|line| high.contains(line));
        match seen {
            Seen::Asked(asked, Some(reply)) if reply.status == Status::Ok && running => {
                if let Some(Body::SetRegs(_)) = asked.body() {
                    self.hear_lines(asked.vcpu(), reply);
                }
            }
            Seen::Events(events) => {
                let fired: Vec<Fired> = events.iter().filter_map(fired_by).collect();
                prop_assert!(running || fired.is_empty());
                for (n, line) in fired.iter().enumerate() {
                    prop_assert!(high.contains(line), "{:?} is not high", line);
                    prop_assert!(!fired[..n].contains(line), "{:?} twice", line);
                }
                self.heard.extend(fired);
                if running {
                    for line in &high {
                        prop_assert!(self.heard.contains(line), "{:?} was lost", line);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn offsets_hold_while_running_counts_never_go_back_and_the_gate_holds(
        story in story(STEPS),
    ) {
        live(&story, &mut Clocks::default())?;
    }

    #[test]
    fn no_due_timer_is_lost_and_no_other_fires(story in story(STEPS)) {
        live(&story, &mut Lines::default())?;
    }
}
