//! The machine: KVM, the vCPUs' threads, and who decides when they run.
//!
//! | | |
//! |---|---|
//! | [`time`] | what a VMM does with the backend: copy this |
//! | [`gates`] | how the vCPUs come to run after a restore and a pause, and two ways that are wrong |
//! | [`vm`], [`gic`], [`vcpu`], [`registers`], [`snapshot`] | the rest of a small VMM |
//! | [`life`], [`round`] | rounds of running, and what the guest observed in each |
//! | [`commands`], [`moves`] | the command line's |

mod commands;
mod error;
mod gates;
mod gic;
mod life;
mod moves;
mod registers;
mod round;
mod snapshot;
mod time;
mod vcpu;
mod vm;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

pub(crate) fn main() -> ExitCode {
    let carried_out = match Cli::parse().command {
        Command::Boot { options, save } => commands::boot(&options, &save),
        Command::Restore {
            options,
            from,
            save,
            round,
        } => commands::restore(&options, &from, save.as_deref(), round),
        Command::Moves {
            options,
            rounds,
            every,
        } => moves::moves(&options, rounds, every),
        Command::Pauses {
            options,
            rounds,
            keep_counting,
        } => commands::pauses(&options, rounds, keep_counting),
        Command::Lifecycle { options } => commands::lifecycle(&options),
    };
    match carried_out {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.report("");
            ExitCode::FAILURE
        }
    }
}
