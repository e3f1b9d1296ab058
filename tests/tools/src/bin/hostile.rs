//! Attacks a backend, and checks what it does meanwhile and afterwards: see `hostile --help`.

use std::process::ExitCode;

use clap::Parser;
use vhost_user_timer_tools::hostile::{self, Args};

fn main() -> ExitCode {
    hostile::run(&Args::parse())
}
