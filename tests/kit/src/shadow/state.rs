//! A state that a VM may be in: the naive VM, at the earliest and at the latest.
//!
//! A request is served at some instant between its sending and its answer. Where the answer names
//! the instant and the counts, they are known exactly, and the whole answer must be the naive VM's.
//! Where it does not, the instant may matter all the same: RESTORE_BEGIN freezes a count that is
//! then known roughly. So there are two naive VMs, alike but for their counts, and the real counts
//! lie between theirs.

use std::ops::RangeInclusive;

use vhost_user_timer_protocol::Phase;
use vhost_user_timer_reference::contract::{Answer, op, phase, status, u32_at, u64_at};
use vhost_user_timer_reference::{Ask, Profile, Reference, Waiter};

use super::Outcome;
use crate::watch::HOST_FREQUENCY;

/// A state that a VM may be in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// The VM with the least counts that it can have, when the host counter reads 0. (That is
    /// long ago; but two states are the same if they are the same at any one instant.)
    low: Reference,
    /// The VM with the greatest counts that it can have, at the same instant.
    high: Reference,
}

/// An instant that an answer names.
struct Instant {
    host: u64,
    counts: [u64; 2],
}

impl Instant {
    /// The instant in the body of a granted request's answer.
    fn of(ask: &Ask, body: &[u8]) -> Option<Self> {
        let host_at = match ask.op {
            op::GET_INFO => 56,
            op::GET_VM => 16,
            op::PAUSE | op::RESUME | op::CONFIRM_RUN => 32,
            _ => return None,
        };
        let host = u64_at(body, host_at);
        let counts = match ask.op {
            op::GET_INFO => [24, 32].map(|at| host.wrapping_sub(u64_at(body, at))),
            op::GET_VM => [0, 8].map(|at| u64_at(body, at)),
            _ => [16, 24].map(|at| u64_at(body, at)),
        };
        Some(Instant { host, counts })
    }
}

/// The VM after a request that was served when the host counter read `host`, and the outcome.
fn served(before: &Reference, ask: &Ask, host: u64) -> (Reference, Outcome) {
    let mut after = before.clone();
    after.set_host(host);
    let answer = after.handle(&ask.bytes(), ask.room, Waiter { queue: 1, head: 0 });
    // A WAIT_RUN that is held would have none; its answer says nothing about the VM.
    let answer = Answer::of(&answer.unwrap_or_else(|| panic!("{ask:?} is not for here")));
    // Nobody waits here, and events and logs are looked at elsewhere.
    after.take_events();
    after.take_notices();
    after.set_host(0);
    let outcome = match answer.status {
        status::OK => Outcome::Done(answer.body),
        status => Outcome::Refused(status, answer.detail),
    };
    (after, outcome)
}

/// How far a VM's counts are ahead of another's, both clocks together.
fn ahead(vm: &Reference, of: &Reference) -> i64 {
    let [virt, phys] = [0, 1].map(|clock| vm.counts()[clock].wrapping_sub(of.counts()[clock]));
    virt.wrapping_add(phys) as i64
}

/// Whether an outcome is one of these, or a SET_REGS that met its lines between them.
fn is_between(outcome: &Outcome, possible: &[Outcome], ask: &Ask) -> bool {
    if possible.contains(outcome) {
        return true;
    }
    let (Outcome::Done(body), op::SET_REGS) = (outcome, ask.op) else {
        return false;
    };
    let known = possible.iter().filter_map(|outcome| match outcome {
        Outcome::Done(body) => Some(body),
        Outcome::Refused(..) => None,
    });
    let known: Vec<_> = known.collect();
    let lines = |body: &Vec<u8>| u32_at(body, 0);
    let always = known.iter().fold(!0, |all, body| all & lines(body));
    let ever = known.iter().fold(0, |any, body| any | lines(body));
    // Of ignored counts, and, with DONE, of vCPUs that are missing.
    let ignored = |body: &Vec<u8>| body[4..].to_vec();
    lines(body) & always == always
        && lines(body) & !ever == 0
        && known.iter().any(|known| ignored(known) == ignored(body))
}

impl State {
    /// A VM in NEW, of a backend with these limits whose host counter is CLOCK_MONOTONIC.
    pub fn new(max_vcpus: u32, request_queues: u16) -> Self {
        let profile = Profile {
            max_vcpus,
            request_queues,
            frequency: HOST_FREQUENCY,
            frequency_fixed: false,
            source: crate::contract::info_source::MONOTONIC,
        };
        let vm = Reference::new(profile, 0, 0);
        State {
            low: vm.clone(),
            high: vm,
        }
    }

    /// The phase.
    ///
    /// # Panics
    ///
    /// Never: the naive VM's phases are the protocol's.
    pub fn phase(&self) -> Phase {
        Phase::from_code(self.low.phase()).expect("a phase")
    }

    /// The registers that a vCPU still lacks in the open restore, as `present` bits.
    pub fn lacks(&self, vcpu: u32) -> u32 {
        self.low.lacks(vcpu)
    }

    /// CONFIRM_RUN with the offsets of a VM in ARMED; `None` where the answers have not told them.
    pub fn confirm(&self) -> Option<Ask> {
        // The host counter reads 0 in both, so an offset is the count's negative.
        let [cntvoff, cntpoff] = self.low.counts().map(u64::wrapping_neg);
        (self.low == self.high).then(|| Ask::confirm(cntvoff, cntpoff))
    }

    /// A virtual count close to the one at this CLOCK_MONOTONIC, ns.
    pub fn virt_count_at(&self, monotonic_ns: u64) -> u64 {
        let mut now = self.low.clone();
        now.set_host(self.host_at(monotonic_ns));
        now.counts()[0]
    }

    /// The VM's host counter at this CLOCK_MONOTONIC, ns.
    fn host_at(&self, monotonic_ns: u64) -> u64 {
        // A tick is a nanosecond here.
        let anchored = self.low.anchor();
        let ahead = anchored.map_or(0, |(then, count)| count.wrapping_sub(then));
        monotonic_ns.wrapping_add(ahead)
    }

    /// The instant that a request's outcome names, CLOCK_MONOTONIC, ns.
    pub(super) fn instant(&self, ask: &Ask, outcome: &Outcome) -> Option<u64> {
        let Outcome::Done(body) = outcome else {
            return None;
        };
        let whole = body.len() == ask.answer_len();
        let host = whole.then(|| Instant::of(ask, body)).flatten()?.host;
        Some(host.wrapping_sub(self.host_at(0)))
    }

    /// Serves a request at some instant of `when`, CLOCK_MONOTONIC, ns, and checks that the
    /// outcome, if it is known, can be.
    ///
    /// # Errors
    ///
    /// Why it cannot be.
    pub fn apply(
        &mut self,
        ask: &Ask,
        when: RangeInclusive<u64>,
        outcome: Option<&Outcome>,
    ) -> Result<(), String> {
        let tried = self.try_apply(ask, when, outcome);
        tried.map_err(|why| format!("{ask:?}: {why}"))
    }

    fn try_apply(
        &mut self,
        ask: &Ask,
        when: RangeInclusive<u64>,
        outcome: Option<&Outcome>,
    ) -> Result<(), String> {
        let mut hosts = [*when.start(), *when.end()].map(|ns| self.host_at(ns));
        if let Some(Outcome::Done(body)) = outcome {
            if body.len() != ask.answer_len() {
                return Err(format!("an answer's body of {} bytes", body.len()));
            }
            if let Some(instant) = Instant::of(ask, body) {
                self.learn(&instant, hosts)?;
                hosts = [instant.host; 2];
            }
        }
        let [from_low, from_high] =
            [&self.low, &self.high].map(|vm| hosts.map(|host| served(vm, ask, host)));
        if let Some(outcome) = outcome {
            let all = from_low.iter().chain(&from_high);
            let possible: Vec<_> = all.map(|(_, outcome)| outcome.clone()).collect();
            if !is_between(outcome, &possible, ask) {
                return Err(format!("the outcome is {outcome:x?}, of {possible:x?}"));
            }
        }
        let [(low, _), (low_late, _)] = from_low;
        let [(high, _), (high_late, _)] = from_high;
        let least = if ahead(&low_late, &low) < 0 {
            low_late
        } else {
            low
        };
        let greatest = if ahead(&high_late, &high) > 0 {
            high_late
        } else {
            high
        };
        (self.low, self.high) = (least, greatest);
        Ok(())
    }

    /// Takes in the counts at an instant, which was one of those between `hosts`.
    fn learn(&mut self, instant: &Instant, hosts: [u64; 2]) -> Result<(), String> {
        let Instant { host, counts } = *instant;
        let within = |value: u64, [least, most]: [u64; 2]| {
            value.wrapping_sub(least) <= most.wrapping_sub(least)
        };
        if !within(host, hosts) {
            return Err(format!("the host counter is {host}, of {hosts:?}"));
        }
        if self.low.phase() == phase::NEW {
            return Ok(());
        }
        self.low.set_host(host);
        self.high.set_host(host);
        let bounds = [0, 1].map(|clock| [&self.low, &self.high].map(|vm| vm.counts()[clock]));
        if !(0..2).all(|clock| within(counts[clock], bounds[clock])) {
            return Err(format!(
                "the counts are {counts:?} at {host}, of {bounds:?}"
            ));
        }
        self.low.set_counts(counts);
        self.high.set_counts(counts);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost_user_timer_reference::contract::words;

    const NEVER: RangeInclusive<u64> = 0..=0;

    fn running() -> State {
        let mut state = State::new(2, 1);
        for ask in [Ask::configure(2, 0, 0), Ask::resume()] {
            state.apply(&ask, NEVER, None).unwrap();
        }
        state
    }

    fn run_at(host: u64, virt: u64) -> Outcome {
        Outcome::Done(words(&[host.wrapping_sub(virt), 0, virt, host, host]))
    }

    #[test]
    fn a_count_that_froze_at_an_unknown_instant_is_one_of_that_time() {
        for (virt, can_be) in [(99, false), (100, true), (120, true), (121, false)] {
            let mut state = running();
            state.apply(&Ask::pause(), 100..=120, None).unwrap();
            let resumed = state.apply(&Ask::resume(), 200..=300, Some(&run_at(250, virt)));
            assert_eq!(resumed.is_ok(), can_be, "{virt}: {resumed:?}");
        }
    }

    #[test]
    fn a_clock_that_went_on_at_an_unknown_instant_has_lost_that_time_at_most() {
        for (virt, can_be) in [(109, false), (110, true), (130, true), (131, false)] {
            let mut state = running();
            let paused = run_at(100, 100);
            state
                .apply(&Ask::pause(), 100..=100, Some(&paused))
                .unwrap();
            state.apply(&Ask::resume(), 200..=220, None).unwrap();
            let paused = state.apply(&Ask::pause(), 230..=230, Some(&run_at(230, virt)));
            assert_eq!(paused.is_ok(), can_be, "{virt}: {paused:?}");
        }
    }

    #[test]
    fn an_abort_brings_back_what_was_known_of_the_clocks() {
        let mut state = running();
        state.apply(&Ask::pause(), 100..=120, None).unwrap();
        state.apply(&Ask::begin(2, 0), 130..=140, None).unwrap();
        state.apply(&Ask::abort(), 150..=160, None).unwrap();
        for (virt, can_be) in [(99, false), (100, true), (120, true), (121, false)] {
            let mut state = state.clone();
            let resumed = state.apply(&Ask::resume(), 200..=200, Some(&run_at(200, virt)));
            assert_eq!(resumed.is_ok(), can_be, "{virt}: {resumed:?}");
        }
    }

    #[test]
    fn a_line_is_unknown_only_while_its_timer_falls_due() {
        use vhost_user_timer_protocol::Register::{TimerCtl, TimerCval};
        let arm = Ask::set_regs(0, &[(TimerCtl, 1), (TimerCval, 110)]);
        for (when, low, high) in [
            (90..=109, true, false),
            (100..=120, true, true),
            (110..=120, false, true),
        ] {
            for (lines, can_be) in [(0, low), (1, high), (2, false)] {
                let answer = Outcome::Done(words(&[lines]));
                let set = running().apply(&arm, when.clone(), Some(&answer));
                assert_eq!(set.is_ok(), can_be, "{when:?} {lines}: {set:?}");
            }
        }
    }

    #[test]
    fn an_instant_outside_the_request_s_time_cannot_be() {
        for (host, can_be) in [(99, false), (100, true), (120, true), (121, false)] {
            let paused = running().apply(&Ask::pause(), 100..=120, Some(&run_at(host, host)));
            assert_eq!(paused.is_ok(), can_be, "{host}: {paused:?}");
        }
    }
}
