//! A model check of the backend's time: every interleaving of a VMM and its vCPUs, within limits,
//! against the real [`vhost_user_timer_model::vm::Vm`].
//!
//! One thread for each vCPU, and threads of the VMM, each with a request queue of its own, work on
//! one [`Device`]. What they send is real bytes, and stays in its queue for as long as the checker
//! likes: other queues overtake it, time passes, connections and backends end ([`Action`]). How
//! often each of these happens is [limited](limits), and within the limits every order is tried.
//! [`Ghost`](ghost::Ghost) tracks what must hold beside the device. It knows only requests and
//! answers, and is checked in every state:
//!
//! - [`ONE_OFFSET`]: one pair of offsets, constant while RUNNING, which every running vCPU has
//!   (I1);
//! - [`GATE`]: no vCPU is released, and the VM is not RUNNING, while a vCPU is missing in the open
//!   restore; a waiter of one epoch is not released in another (I2);
//! - [`CONFIRMED`]: in a VM with CONFIRM, no vCPU is released before the VMM has put these very
//!   offsets into its hypervisor and confirmed them; and what the guest reads is made of the
//!   offsets there (I8);
//! - [`ONE_RUN`]: all vCPUs that are released together get the same instant (I2);
//! - [`FORWARD`]: no count is below one that a vCPU has seen, or brought to the last completed
//!   restore, unless the VMM wrote it (I3);
//! - [`SETTLED`]: a restore continues from the largest count that was brought in its epoch (I3);
//! - [`REPORTED`]: once the frontend takes events, every line that rose has been reported, exactly
//!   once for each rise (I7);
//! - [`NOT_FALSELY`]: a timer that is masked, or not due, is never reported (I7);
//! - [`IN_TIME`]: the backend asks to be woken before the next line rises, and before the restore
//!   times out (I7);
//! - [`RECORDED`]: the state file is given every change, so that a backend that is started again
//!   continues from the VM as it was (I5);
//! - [`OPENS`]: from every state, an open restore can be completed, the VM resumed and its offsets
//!   confirmed, and then every waiter is released, once: no deadlock.
//!
//! [`mutant`] shows that the check can fail: backends, and a VMM, that get one thing wrong each.

pub mod action;
mod choices;
pub mod device;
pub mod ghost;
mod inspect;
pub mod limits;
pub mod mutant;
pub mod request;
pub mod run;
mod scenario;
pub mod system;

use stateright::{Model, Property};

use action::Action;
use device::Device;
use limits::Limits;
use system::System;

/// I1: one pair of offsets, constant while RUNNING.
pub const ONE_OFFSET: &str = "I1: one pair of offsets, constant while RUNNING";
/// I2: nobody runs before every vCPU is done.
pub const GATE: &str = "I2: nobody runs before every vCPU is done";
/// I8: nobody runs before the VMM has confirmed these very offsets.
pub const CONFIRMED: &str = "I8: nobody runs before these very offsets are confirmed";
/// I2: all vCPUs that are released together get the same instant.
pub const ONE_RUN: &str = "I2: all vCPUs that are released together get one instant";
/// I3: no count decreases.
pub const FORWARD: &str = "I3: no count decreases";
/// I3, for a restore, exactly.
pub const SETTLED: &str = "I3: a restore continues from the largest count";
/// I7: a line that rose is reported, once.
pub const REPORTED: &str = "I7: a due timer is reported, once";
/// I7: only such a line is reported.
pub const NOT_FALSELY: &str = "I7: a masked timer is never reported";
/// I7: the backend wakes up in time for it.
pub const IN_TIME: &str = "I7: the backend wakes in time";
/// I5: every change reaches the state file.
pub const RECORDED: &str = "I5: every change reaches the state file";
/// No deadlock.
pub const OPENS: &str = "The gate can always be opened";

/// The properties that are checked at every step.
const HELD: [&str; 9] = [
    ONE_OFFSET,
    GATE,
    CONFIRMED,
    ONE_RUN,
    FORWARD,
    SETTLED,
    REPORTED,
    NOT_FALSELY,
    RECORDED,
];

/// The state space of one kind of device within limits.
#[derive(Debug)]
pub struct Timers<D> {
    limits: Limits,
    /// Configured, PAUSED, with a timer per vCPU.
    initial: System<D>,
    /// The properties with a counterexample.
    failed: run::Failed,
}

impl<D: Device> Timers<D> {
    /// The state space of `device`, a VM in NEW.
    ///
    /// # Panics
    ///
    /// When the device refuses to be configured.
    pub fn new(limits: Limits, device: D) -> Self {
        Timers {
            limits,
            initial: System::new(&limits, device),
            failed: run::Failed::default(),
        }
    }

    /// Its limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether one of [`HELD`] has held up to here.
    fn held<const INDEX: usize>(&self, state: &System<D>) -> bool {
        self.first_failure(HELD[INDEX], state.holds(HELD[INDEX]))
    }

    /// Whether to treat the property as holding in this state. The checker keeps the last
    /// counterexample that it meets, and the first is the shortest.
    fn first_failure(&self, name: &'static str, holds: bool) -> bool {
        holds || !self.failed.is_first(name)
    }
}

impl<D: Device> Model for Timers<D> {
    type State = System<D>;
    type Action = Action;

    fn init_states(&self) -> Vec<System<D>> {
        vec![self.initial.clone()]
    }

    fn actions(&self, state: &System<D>, actions: &mut Vec<Action>) {
        state.actions(&self.limits, actions);
    }

    fn next_state(&self, state: &System<D>, action: Action) -> Option<System<D>> {
        Some(state.after(&self.limits, action))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(HELD[0], Self::held::<0>),
            Property::always(HELD[1], Self::held::<1>),
            Property::always(HELD[2], Self::held::<2>),
            Property::always(HELD[3], Self::held::<3>),
            Property::always(HELD[4], Self::held::<4>),
            Property::always(HELD[5], Self::held::<5>),
            Property::always(HELD[6], Self::held::<6>),
            Property::always(HELD[7], Self::held::<7>),
            Property::always(HELD[8], Self::held::<8>),
            Property::always(IN_TIME, |model: &Self, state: &System<D>| {
                model.first_failure(IN_TIME, state.wakes_in_time())
            }),
            Property::always(OPENS, |model: &Self, state: &System<D>| {
                model.first_failure(OPENS, state.gate_can_be_opened())
            }),
        ];
        // What must be reached somewhere; otherwise the check shows nothing.
        let limits = &self.limits;
        let mut sometimes = |possible: bool, name, condition: fn(&Self, &System<D>) -> bool| {
            if possible {
                properties.push(Property::sometimes(name, condition));
            }
        };
        sometimes(true, "a vCPU runs", |_, state| state.anyone_runs());
        sometimes(limits.ticks > 0, "a timer fires", |_, state| {
            state.note.fired
        });
        sometimes(limits.begins > 0, "a restore completes", |_, state| {
            state.note.completed
        });
        let twice = limits.disturbances > 1;
        sometimes(
            twice && limits.begins > 1,
            "a restore is begun again",
            |_, state| state.note.begun_again,
        );
        sometimes(
            twice && limits.begins > 0 && limits.aborts > 0,
            "a restore is aborted",
            |_, state| state.note.aborted,
        );
        sometimes(
            limits.begins > 0 && limits.ticks > 0 && limits.vcpus > 1,
            "a restore times out",
            |_, state| state.note.timed_out,
        );
        sometimes(
            twice && limits.begins > 1 && limits.vcpus > 1,
            "a request of an old epoch is refused",
            |_, state| state.note.stale,
        );
        sometimes(
            twice && limits.begins > 0 && limits.restarts > 0 && limits.vcpus > 1,
            "the backend restarts in the middle of a restore",
            |_, state| state.note.restarted_under_way,
        );
        sometimes(
            limits.confirm && twice && limits.begins > 0 && limits.aborts > 0,
            "a restore is aborted when all are back but nothing is confirmed",
            |_, state| state.note.aborted_armed,
        );
        sometimes(
            limits.confirm && limits.restarts > 0,
            "the backend restarts before the offsets are confirmed",
            |_, state| state.note.restarted_armed,
        );
        properties
    }
}
