//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

/// What each exit code means. The manual page has this list as well.
const EXIT_STATUS: &str = "Exit status:
  0  The answer is printed
  1  The backend could not be asked, or the answer not be printed; a message is on stderr
  2  The command line is wrong; a message is on stderr";

/// Shows the VM of a running vhost-user-timer backend.
///
/// A backend serves one frontend at a time, so this works only while no VMM is connected.
#[derive(Debug, Parser)]
#[command(name = "vhost-user-timer-ctl", version, max_term_width = 100)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// What to show.
    #[command(subcommand)]
    pub command: Command,

    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to show of the VM.
#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
pub enum Command {
    /// Show the VM's state: phase, epoch, vCPUs, frequency, offsets
    Info(Target),
    /// Show the VM's state and the timers of every vCPU, all read at one instant
    Dump(Target),
}

/// The backend to ask.
#[derive(Clone, Debug, clap::Args)]
pub struct Target {
    /// Ask the backend at this socket, the one of its timer device
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,

    /// Wait for up to this many seconds, each time, until the backend accepts the connection and
    /// until it answers; more than 0, at most 3600
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0, value_parser = seconds,
          allow_negative_numbers = true)]
    timeout: f64,
}

impl Target {
    /// How long to wait for the connection, and for each answer.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout)
    }
}

fn seconds(text: &str) -> Result<f64, &'static str> {
    let seconds = text.parse::<f64>().ok();
    let in_range = seconds.filter(|seconds| *seconds > 0.0 && *seconds <= 3600.0);
    in_range.ok_or("a number of seconds, more than 0 and at most 3600")
}
