//! Random lives of a VM: the real one and the naive one say the same all along, and what must
//! always hold does.

use proptest::prelude::*;
use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{Abi, Phase, Register, Status};
use zerocopy::FromBytes;

use super::life::{Asked, Seen, Verdict, Witness, live};
use super::reference::Reference;
use super::rig::{Ask, Fired, Reply, Rig, START_REALTIME, fired_by, registers_of};
use super::steps::{Want, story};
use crate::vm::ClockId;

/// How many steps a life has at most.
const STEPS: usize = 60;

fn config(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        // PROPTEST_CASES asks for more.
        cases: cases.max(default.cases),
        // A failure prints its story, and what it shows becomes a test of its own.
        failure_persistence: None,
        ..default
    }
}

// The naive VM.

fn sorted(events: &[wire::Event]) -> Vec<wire::Event> {
    let mut events = events.to_vec();
    // The order of timers says nothing; a phase is told first.
    events.sort_by_key(|event| (event.kind.get() == 1, event.vcpu.get(), event.timer.get()));
    events
}

impl Witness for Reference {
    fn see(&mut self, rig: &mut Rig, seen: &Seen<'_>) -> Verdict {
        match *seen {
            Seen::Asked(asked, reply) => {
                let expected = self.handle(
                    &asked.want,
                    asked.vcpu,
                    asked.epoch,
                    asked.room,
                    asked.token,
                );
                prop_assert_eq!(reply, expected.as_ref(), "{:?}", asked);
            }
            Seen::Passed(ticks, told) => {
                self.pass(ticks);
                if told {
                    self.notice_time();
                }
            }
            Seen::Events(events) => {
                prop_assert_eq!(sorted(events), sorted(&self.events()));
                prop_assert!(!rig.vm.has_event() || rig.vm.phase() == Phase::New);
            }
            Seen::CancelQueue(queue) => self.cancel_queue(queue),
            Seen::Disconnect => self.disconnect(),
            Seen::Reset => self.reset(),
            Seen::HostIs(host) => self.set_host(host),
            Seen::Effects(released, notices) => {
                prop_assert_eq!(released, std::mem::take(&mut self.released));
                prop_assert_eq!(notices, std::mem::take(&mut self.notices));
            }
        }
        prop_assert_eq!(rig.now.host, self.host);
        Ok(())
    }
}

proptest! {
    #![proptest_config(config(700))]

    #[test]
    fn the_vm_says_what_the_naive_one_says(story in story(STEPS)) {
        live(&story, &mut Reference::new(story.host, START_REALTIME))?;
    }
}

// What must always hold, seen from outside.

/// What DESIGN.md demands of the clocks and of the gate.
#[derive(Default)]
struct Clocks {
    /// Offsets of the VM while it runs.
    offsets: Option<[u64; 2]>,
    counts: [u64; 2],
    was_restoring: bool,
    /// With ELAPSED: when the state was saved.
    saved_ns: Option<u64>,
    /// What the vCPUs brought in the open restore, and who is done.
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
    match &asked.want {
        Want::Configure { .. }
        | Want::SetOffset(_)
        | Want::Begin { .. }
        | Want::RestoreDone
        | Want::Abort => true,
        Want::SetRegs(entries) => entries.iter().any(|(id, _)| a_count(*id)),
        _ => false,
    }
}

fn counts_of(info: &wire::Info) -> [u64; 2] {
    let offsets = [info.cntvoff.get(), info.cntpoff.get()];
    offsets.map(|offset| info.host_count.get().wrapping_sub(offset))
}

impl Clocks {
    /// I2 and I3 of a restore: who has brought what.
    fn follow_restore(&mut self, asked: &Asked, rig: &Rig, info: &wire::Info) -> Verdict {
        let vcpus = info.vcpus.get() as usize;
        match &asked.want {
            Want::Begin {
                flags, saved_ns, ..
            } => {
                self.saved_ns = (flags & wire::restore_flags::ELAPSED != 0).then_some(*saved_ns);
                self.brought = vec![None; vcpus];
                self.done = vec![false; vcpus];
            }
            Want::RestoreDone => {
                self.done[asked.vcpu as usize] = true;
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
            }
            Want::SetVm(entries) if !self.pinned => {
                for entry in entries {
                    if entry.present.get() & wire::present::CNT != 0 {
                        self.brought[entry.vcpu.get() as usize] = Some(entry.cnt.get());
                    }
                }
            }
            Want::SetRegs(entries) if !self.pinned => {
                for (id, value) in entries {
                    let ids = [Abi::Arm64, Abi::Arm].map(|abi| Register::TimerCnt.id(abi));
                    if ids.contains(id) && info.phase.get() == Phase::Restoring.code() {
                        self.brought[asked.vcpu as usize] = Some(*value);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl Witness for Clocks {
    fn see(&mut self, rig: &mut Rig, seen: &Seen<'_>) -> Verdict {
        let info = rig.vm.info(rig.now);
        let counts = counts_of(&info);
        let phase = rig.vm.phase();

        // I1: the offsets never change while the VM runs.
        let offsets = [info.cntvoff.get(), info.cntpoff.get()];
        if phase != Phase::Running {
            self.offsets = None;
        } else {
            let known = *self.offsets.get_or_insert(offsets);
            prop_assert_eq!(offsets, known);
        }

        // I3: a count stands still or goes on with the host; only the VMM sets it.
        match *seen {
            Seen::Asked(asked, reply) => {
                let done = reply.is_some_and(|reply| reply.status == Status::Ok);
                if !(done && may_move_a_count(asked)) {
                    prop_assert_eq!(counts, self.counts, "{:?}", asked);
                }
                if done {
                    self.follow_restore(asked, rig, &info)?;
                }
                let restored = matches!(asked.want, Want::RestoreDone);
                let ran = self.was_restoring && phase == Phase::Running;
                prop_assert!(!ran || restored, "{:?} let vCPUs run", asked);
            }
            Seen::Passed(ticks, _) => {
                for (count, before) in counts.into_iter().zip(self.counts) {
                    let passed = count.wrapping_sub(before);
                    prop_assert!(passed == 0 || passed == ticks);
                    prop_assert!(passed == ticks || phase != Phase::Running);
                }
            }
            Seen::Reset | Seen::HostIs(_) => {}
            Seen::Effects(released, _) => {
                // I2: nobody is let run before everybody is done, and all alike.
                for released in released {
                    prop_assert!(!released.waiters.is_empty());
                    let ok = released.header.status.get() == 0;
                    prop_assert_eq!(ok, released.run.is_some());
                    if let Some(run) = released.run {
                        prop_assert_eq!(phase, Phase::Running);
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
        self.was_restoring = phase == Phase::Restoring;
        self.counts = counts;
        self.pinned = info.flags & wire::info_flags::OFFSET_PINNED != 0;
        Ok(())
    }
}

/// I7: while the VM runs the frontend hears of every line that is high, and of no other, and
/// is not kept waiting.
#[derive(Default)]
struct Lines {
    /// The lines of which the frontend was told that they are high, and which stayed so.
    heard: Vec<Fired>,
}

/// The timers that are on and not masked, with count and compare value, as GET_VM tells them.
fn armed(rig: &Rig) -> Vec<(Fired, u64, u64)> {
    let mut rig = rig.clone();
    let vcpus = rig.info().vcpus.get();
    let mut armed = Vec::new();
    if vcpus == 0 {
        return armed;
    }
    let body = rig.done(&Ask::get_vm(0, vcpus)).body;
    for entry in <[wire::Vcpu]>::ref_from_bytes(&body[40..]).unwrap() {
        for clock in ClockId::BOTH {
            let [ctl, cnt, cval] = registers_of(clock).map(|register| entry.get(register));
            if ctl & 3 == 1 {
                armed.push(((entry.vcpu.get(), clock), cnt, cval));
            }
        }
    }
    armed
}

/// Ticks until a line rises by itself, at the latest after its count wrapped.
fn ticks_to_rise(count: u64, cval: u64) -> Option<u128> {
    match (count < cval, cval) {
        (true, _) => Some(u128::from(cval - count)),
        (false, 0) => None,
        (false, _) => Some((1 << 64) - u128::from(count) + u128::from(cval)),
    }
}

impl Lines {
    fn hear_lines(&mut self, asked: &Asked, reply: &Reply) {
        for (clock, bit) in [(ClockId::Virtual, 1), (ClockId::Physical, 2)] {
            if reply.body[0] & bit != 0 {
                self.heard.push((asked.vcpu, clock));
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
            // Whoever sleeps as long as the VM says oversleeps nothing, and does not spin.
            let ticks = rig.vm.ticks_to_next(rig.now).unwrap();
            let rises = armed.iter().filter_map(|it| ticks_to_rise(it.1, it.2));
            prop_assert!(ticks > 0);
            prop_assert!(rises.min().is_none_or(|rise| u128::from(ticks) <= rise));
        }
        if !running || matches!(seen, Seen::Disconnect) {
            self.heard.clear();
        }
        // What fell must be heard of anew; so must what may have fallen between two looks.
        self.heard.retain(|line| high.contains(line));
        match seen {
            Seen::Asked(asked, Some(reply)) if reply.status == Status::Ok && running => {
                if let Want::SetRegs(_) = asked.want {
                    self.hear_lines(asked, reply);
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
