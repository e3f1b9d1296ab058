//! A VMM without a hypervisor: see `mock-frontend --help`.

use std::process::ExitCode;

use clap::Parser;
use vhost_user_timer_tools::mock::{self, Args};

fn main() -> ExitCode {
    mock::run(&Args::parse())
}
