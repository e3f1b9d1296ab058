//! The sentences of SPEC.md, each stated once, as a scenario.
//!
//! A scenario is named by its sentence, and the table at the head of its file says which ids it
//! proves and where it runs: on the model in this process, on the released backend behind its
//! socket, or on both. [`world`] is what it runs on; [`sentences`] sees that no id is without a
//! scenario.

#[macro_use]
mod scenarios;
mod sentences;
mod world;

mod armed;
mod configure;
mod connection;
mod counters;
mod device_state;
mod done;
mod events;
mod interop;
mod layouts;
mod offsets;
mod one_offset;
mod phases;
mod queues;
mod registers;
mod requests;
mod restore;
mod rings;
mod settle;
mod time_page;
mod wait_run;
mod whole_vm;
mod write_back;

/// Every file's scenarios.
fn files() -> Vec<&'static [scenarios::Scenario]> {
    let files = [
        configure::SCENARIOS,
        connection::SCENARIOS,
        counters::SCENARIOS,
        done::SCENARIOS,
        interop::SCENARIOS,
        layouts::SCENARIOS,
        offsets::SCENARIOS,
        one_offset::SCENARIOS,
        phases::SCENARIOS,
        queues::SCENARIOS,
        registers::SCENARIOS,
        requests::SCENARIOS,
        restore::SCENARIOS,
        rings::SCENARIOS,
        settle::SCENARIOS,
        wait_run::SCENARIOS,
        whole_vm::SCENARIOS,
        write_back::SCENARIOS,
    ];
    [
        &files[..],
        &armed::SCENARIOS[..],
        &device_state::SCENARIOS,
        &events::SCENARIOS,
        &time_page::SCENARIOS,
    ]
    .concat()
}
