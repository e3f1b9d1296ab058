//! The mock frontend: a VMM without a hypervisor. Its vCPUs are real threads, and it uses only
//! the public frontend library.
//!
//! `demo` moves a VM from one backend to another and measures, inside the vCPU threads, whether
//! the backends keep their promises: `demo` is the story, `act` one restore and its threads,
//! `guest` what a vCPU does, `hypervisor` where its count is made, `vmm` one backend with its
//! connection, `report` the result.

mod act;
mod demo;
mod error;
mod guest;
mod hypervisor;
mod report;
mod vmm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use serde_json::json;
use vhost_user_timer_protocol::MAX_VCPUS;

pub use error::{Error, Side};

use act::Moment;
use demo::{Plan, Via};
use error::Chain;
use report::{Console, Report, Verdict, counted, print_line};
use vhost_user_timer_kit::backend_process;

/// A VMM without a hypervisor: real threads as vCPUs, and a real backend behind them
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
    /// Prints `demo: OK …` as its last line and exits with 0 if no vCPU ran early, no count
    /// decreased, all vCPUs had the same offset, and every due timer fired exactly once.
    /// Otherwise prints `demo: FAILED …` and exits with 1.
    Demo(Demo),
}

#[derive(Debug, clap::Args)]
struct Demo {
    /// Number of vCPUs, 1 to 4096; each is a thread
    #[arg(long, value_name = "N", default_value_t = 8,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    vcpus: u32,

    /// Seed of the random order of events [default: a new one each time]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,

    /// How the VM gets from one backend to the other
    #[arg(long, value_name = "WAY", value_enum, default_value_t = Via::Requests)]
    via: Via,

    /// Kill the destination's backend, and start another on the same state file
    #[arg(long, value_name = "WHEN", value_enum, num_args = 0..=1, require_equals = true,
          default_missing_value = "mid-restore")]
    kill: Option<Moment>,

    /// The backend program [default: $VHOST_USER_TIMER, or vhost-user-timer beside this program]
    #[arg(long, value_name = "PATH")]
    backend: Option<PathBuf>,

    /// Print nothing but one JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> ExitCode {
    match &args.command {
        Command::Demo(demo) => demo.run(),
    }
}

impl Demo {
    fn run(&self) -> ExitCode {
        // Short enough to type.
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
            print_result(&measured, verdict);
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
            // A demo that failed may not have got that far.
            "killed": self.kill.is_some() && measured.is_ok(),
            "elapsed_ms": console.elapsed().as_millis() as u64,
            "verdict": verdict,
            "report": measured.as_ref().ok(),
            "error": measured.as_ref().err().map(|error| Chain(error).to_string()),
        })
    }
}

fn print_result(measured: &Result<Report, Error>, verdict: Option<Verdict>) {
    match measured {
        Ok(report) => print_line(format_args!("\n{}\n", report.table())),
        Err(error) => print_line(format_args!("demo: FAILED {}", Chain(error))),
    }
    if let Some(verdict) = verdict {
        print_line(verdict);
    }
}
