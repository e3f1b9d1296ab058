//! Measures what the backend costs: see `bench --help`.

use std::process::ExitCode;

use clap::Parser;
use vhost_user_timer_tools::bench::{self, Args};

fn main() -> ExitCode {
    bench::run(Args::parse())
}
