//! A model check of the backend's time: every interleaving of a VMM and its vCPUs, within limits,
//! against the real [`vhost_user_timer_model::vm::Vm`].
//!
//! A thread per vCPU and threads of the VMM, each with a request queue of its own, work on one
//! [`Device`]. What they send is real bytes, and lies in its queue for as long as the
//! checker likes: other queues overtake it, time passes it by, connections and backends come to an
//! end around it ([`Action`]). How much of that can happen is [limited](limits), and all that can
//! happen within the limits is tried. What must hold is tracked beside the device by
//! [`Ghost`](ghost::Ghost), which believes nothing but the answers, and is checked in every state:
//!
//! - [`ONE_OFFSET`]: one pair of offsets, constant while RUNNING, and whoever runs has it (I1);
//! - [`GATE`]: nobody is let run, and the VM is not RUNNING, while a vCPU is missing in the open
//!   restore; who waited in one epoch is not let run in another (I2);
//! - [`ONE_RUN`]: all who are let run together are told one and the same instant (I2);
//! - [`FORWARD`]: no count is below one that a vCPU has seen, or brought to the restore that ended
//!   last, unless the VMM wrote it (I3);
//! - [`SETTLED`]: a restore goes on from the largest count that was brought in its epoch;
//! - [`TOLD`]: once the frontend takes events, every line that rose has been told, once a rise (I7);
//! - [`NOT_FALSELY`]: a timer that is masked, or not due, is never told (I7);
//! - [`IN_TIME`]: the backend asks to be woken before the next line rises, and before the restore's
//!   patience ends (I7);
//! - [`RECORDED`]: what changed is what the state file is told to take in, so that a backend that
//!   is started again goes on from the VM as it was (I5);
//! - [`OPENS`]: from every state, an open restore can be completed and the VM resumed, and then all
//!   who waited are let run, once each: no deadlock.
//!
//! That the check can fail is shown by [`mutant`]: backends that get one thing wrong each.

pub mod action;
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
/// I2: all who are let run together get the same instant.
pub const ONE_RUN: &str = "I2: all who are let run together get one instant";
/// I3: no count goes back.
pub const FORWARD: &str = "I3: no count goes back";
/// I3, for a restore, exactly.
pub const SETTLED: &str = "I3: a restore goes on from the largest count";
/// I7: a line that rose is told, once.
pub const TOLD: &str = "I7: a timer that is due is told, once";
/// I7: only such a line is told.
pub const NOT_FALSELY: &str = "I7: a masked timer is never told";
/// I7: the backend wakes up for it.
pub const IN_TIME: &str = "I7: the backend wakes in time";
/// I5: every change reaches the state file.
pub const RECORDED: &str = "I5: every change reaches the state file";
/// No deadlock.
pub const OPENS: &str = "The gate can always be opened";

/// The properties that are watched step by step.
const HELD: [&str; 8] = [
    ONE_OFFSET,
    GATE,
    ONE_RUN,
    FORWARD,
    SETTLED,
    TOLD,
    NOT_FALSELY,
    RECORDED,
];

/// The state space of one kind of device within limits.
#[derive(Debug)]
pub struct Timers<D> {
    limits: Limits,
    /// Configured, PAUSED, with a timer per vCPU.
    initial: System<D>,
    /// Of which properties a counterexample was found.
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

    /// Whether one of [`HELD`] held up to here.
    fn held<const INDEX: usize>(&self, state: &System<D>) -> bool {
        self.first_failure(HELD[INDEX], state.holds(HELD[INDEX]))
    }

    /// Whether the property is to be taken to hold in a state in which it holds or not. The
    /// checker keeps the last counterexample that it meets, and the first is the shortest.
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
            Property::always(IN_TIME, |model: &Self, state: &System<D>| {
                model.first_failure(IN_TIME, state.wakes_in_time())
            }),
            Property::always(OPENS, |model: &Self, state: &System<D>| {
                model.first_failure(OPENS, state.gate_can_be_opened())
            }),
        ];
        // What must be met somewhere, or the check says nothing.
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
            "the backend restarts in a restore that is under way",
            |_, state| state.note.restarted_under_way,
        );
        properties
    }
}
