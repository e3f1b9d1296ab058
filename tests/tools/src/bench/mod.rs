//! The bench: what a request, a restore, a timer and a reading cost, compared with a floor, which
//! is the best that two processes can do.
//!
//! Each number and its floor are measured alternately in one run. Whatever disturbs the machine
//! disturbs both, so ratios are stable where the numbers are not. For that reason the operations
//! of the model are measured here too, although they need no second process; `benches/model.rs`
//! compares them with their own earlier runs.

mod crew;
mod driver;
mod floor;
mod place;
mod report;
mod rows;
mod stats;

use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Parser;

use place::Cpus;
use report::Report;
use vhost_user_timer_kit::backend_process::{BackendProcess, find_program};

/// Measures the backend and its floors in one run, and prints their ratios
///
/// Prints a table on stdout, and writes report.json and report.html to the folder of --out.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Measure fewer rounds, for a first impression in under a minute
    #[arg(long)]
    quick: bool,

    /// Measure only these rows, given by number [default: all]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    rows: Vec<u8>,

    /// The backend program [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    backend: Option<PathBuf>,

    /// Measure another virtio-rtc backend, listening on this socket, alternately with ours
    #[arg(long, value_name = "PATH")]
    peer_socket: Option<PathBuf>,

    /// Process id of the other backend, to measure its CPU time
    #[arg(long, value_name = "PID", requires = "peer_socket")]
    peer_pid: Option<u32>,

    /// Folder for report.json and report.html [default: bench, where cargo builds]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,

    /// Run as the floor's server
    #[arg(long, hide = true, value_enum)]
    floor: Option<floor::Kind>,
}

/// What measuring needs.
struct Bench {
    args: Args,
    program: PathBuf,
    cpus: Cpus,
    /// Whether the backend has the option `--poll-max-us`.
    polls: bool,
    report: Report,
}

impl Bench {
    /// The first number, or with `--quick` the second.
    fn count(&self, thorough: usize, quick: usize) -> usize {
        if self.args.quick { quick } else { thorough }
    }

    /// A backend whose worker polls as by default, or not at all.
    fn backend(&self, polling: bool, args: &[&str]) -> io::Result<BackendProcess> {
        let mut all = vec!["--log-level=error"];
        if self.polls && !polling {
            all.push("--poll-max-us=0");
        }
        all.extend(args);
        BackendProcess::launch_program(&self.program, &all)
    }
}

/// Runs the program.
pub fn run(args: Args) -> ExitCode {
    let result = match args.floor {
        Some(kind) => floor::serve(kind),
        None => measure(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The default of `--out`. This program is `release/bench` in the folder where cargo builds.
fn beside_the_builds() -> io::Result<PathBuf> {
    let this = std::env::current_exe()?;
    let target = this.ancestors().nth(2).unwrap_or(&this);
    Ok(target.join("bench"))
}

fn measure(args: Args) -> io::Result<()> {
    let program = args.backend.clone().map_or_else(find_program, Ok)?;
    let help = Command::new(&program).arg("--help").output()?;
    let polls = String::from_utf8_lossy(&help.stdout).contains("--poll-max-us");
    let mut bench = Bench {
        cpus: Cpus::find()?,
        program,
        polls,
        report: Report::default(),
        args,
    };
    println!("{}", report::head());
    for (number, row) in (1_u8..).zip(rows::ALL) {
        if bench.args.rows.is_empty() || bench.args.rows.contains(&number) {
            row(&mut bench)?;
            bench.cpus.free()?;
        }
    }
    let out = bench.args.out.map_or_else(beside_the_builds, Ok)?;
    bench.report.write(&out)?;
    println!("{}/report.html", out.display());
    Ok(())
}
