//! The sentences of SPEC.md, each told once as a scenario.
//!
//! A scenario is named by its sentence, and the table at the head of its file says which ids it proves
//! and where it runs: on the model in this process, on the released backend behind its socket, or on
//! both. [`world`] is what it runs on; [`sentences`] sees that no id is without a scenario.

#[macro_use]
mod scenarios;
mod world;

mod counters;
mod events;
mod events_exact;
mod offsets;
mod phases;
mod queues;
mod registers;
mod requests;
mod restore;
mod settle;
mod told;
mod wait_run;
mod whole_vm;

mod control_channel;
mod descriptor_layouts;
mod device_state;
mod interop_virtio_driver;
mod time_page;

/// Every file's scenarios.
#[allow(dead_code, reason = "the check of all sentences is still to come")]
const FILES: &[&[scenarios::Scenario]] = &[
    counters::SCENARIOS,
    offsets::SCENARIOS,
    phases::SCENARIOS,
    queues::SCENARIOS,
    requests::SCENARIOS,
    restore::SCENARIOS,
    settle::SCENARIOS,
    wait_run::SCENARIOS,
    events::SCENARIOS,
    events_exact::SCENARIOS,
    registers::SCENARIOS,
    told::SCENARIOS,
    whole_vm::SCENARIOS,
];
