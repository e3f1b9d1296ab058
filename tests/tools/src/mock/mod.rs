//! The mock frontend: plays the VMM, with real threads as vCPUs, by the public frontend library
//! only.
//!
//! `demo` (`demo`, `act`, `guest`, `vmm`, `report`) moves a VM from one backend to another and
//! measures, from inside the vCPU threads, whether the backends keep what they promise. `info`
//! and `dump` (`inspect`) show the VM of a backend that runs already.

mod act;
mod demo;
mod error;
mod guest;
mod inspect;
mod report;
mod vmm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::json;
use vhost_user_timer_protocol::MAX_VCPUS;

pub use error::{Error, Side};

use demo::{Plan, Via};
use error::Chain;
use report::{Console, Report, Verdict, counted, print_line};
use vhost_user_timer_kit::backend_process;

/// Plays a VMM that has its VM's timers kept by vhost-user-timer.
#[derive(Debug, Parser)]
#[command(name = "mock-frontend", version, max_term_width = 100)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Move a VM from one backend to another, and measure what its vCPUs see
    ///
    /// The last line is `demo: OK …`, and the exit status 0, if no vCPU ran early, no count went
    /// back, all vCPUs had one offset, and every due timer fired once; else it is
    /// `demo: FAILED …`, and 1.
    Demo(Demo),
    /// Show the state of a running backend's VM
    Info(inspect::Target),
    /// Show a running backend's whole VM: all timers of all vCPUs, read at one instant
    Dump(inspect::Target),
}

#[derive(Debug, clap::Args)]
struct Demo {
    /// How many vCPUs the VM has, 1 to 4096; each is a thread
    #[arg(long, value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    vcpus: u32,

    /// What the order of things is drawn from [default: another one each time]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,

    /// How the VM gets from the one backend to the other
    #[arg(long, value_name = "WAY", value_enum, default_value_t = Via::Requests)]
    via: Via,

    /// Kill the destination's backend in mid-restore: another one goes on with its state file
    #[arg(long)]
    kill: bool,

    /// The backend program [default: $VHOST_USER_TIMER, or vhost-user-timer beside this program]
    #[arg(long, value_name = "PATH")]
    backend: Option<PathBuf>,

    /// Print one JSON object in the end, and nothing else
    #[arg(long)]
    json: bool,
}

/// Does what the command line says.
pub fn run(args: &Args) -> ExitCode {
    let done = match &args.command {
        Command::Demo(args) => return args.run(),
        Command::Info(target) => inspect::info(target),
        Command::Dump(target) => inspect::dump(target),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mock-frontend: {}", Chain(&error));
            ExitCode::FAILURE
        }
    }
}

impl Demo {
    fn run(&self) -> ExitCode {
        // Few digits, since someone may have to type them.
        let seed = self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
        let console = Console::new(self.json);
        console.print(format_args!(
            "A VM of {} moves from one backend to another; seed {seed}.\n",
            counted(self.vcpus, "vCPU"),
        ));
        let measured = self.program().and_then(|program| {
            let plan = Plan {
                vcpus: self.vcpus,
                seed,
                program,
                via: self.via,
                kill: self.kill,
            };
            demo::run(&plan, &console)
        });
        let verdict = measured.as_ref().ok().map(Report::verdict);
        if self.json {
            print_line(self.json(seed, &console, &measured, verdict));
        } else {
            tell(&measured, verdict);
        }
        match verdict {
            Some(verdict) if verdict.is_ok() => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }

    fn program(&self) -> Result<PathBuf, Error> {
        match &self.backend {
            Some(program) => Ok(program.clone()),
            None => backend_process::find_program().map_err(Error::Launch),
        }
    }

    fn json(
        &self,
        seed: u64,
        console: &Console,
        measured: &Result<Report, Error>,
        verdict: Option<Verdict>,
    ) -> serde_json::Value {
        json!({
            "ok": verdict.is_some_and(|verdict| verdict.is_ok()),
            "seed": seed,
            "vcpus": self.vcpus,
            "via": self.via,
            // A demonstration that fails may not have come to that.
            "killed": self.kill && measured.is_ok(),
            "elapsed_ms": console.elapsed().as_millis() as u64,
            "verdict": verdict,
            "report": measured.as_ref().ok(),
            "error": measured.as_ref().err().map(|error| Chain(error).to_string()),
        })
    }
}

fn tell(measured: &Result<Report, Error>, verdict: Option<Verdict>) {
    match measured {
        Ok(report) => print_line(format_args!("\n{}\n", report.table())),
        Err(error) => print_line(format_args!("demo: FAILED {}", Chain(error))),
    }
    if let Some(verdict) = verdict {
        print_line(verdict);
    }
}
