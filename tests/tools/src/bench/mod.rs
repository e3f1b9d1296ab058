//! The bench: what a request, a restore, a timer and a reading cost, beside what two processes cannot do
//! better.
//!
//! Each number that has a floor is measured in turns with it, in one run: what disturbs a machine
//! disturbs both, so ratios hold where the numbers themselves do not. That is also why the parts
//! within one process (the model's operations) go through this harness, and not through another
//! that would run at another time; that other (`benches/model.rs`) compares them with themselves.

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
use vhost_user_timer_protocol::{Op, wire};
use zerocopy::{Immutable, IntoBytes};

use place::Cpus;
use report::Report;
use vhost_user_timer_kit::backend_process::{BackendProcess, find_program};

/// Measures the backend beside its floors, in one run, and says how many times the floor it costs
///
/// The table goes to stdout; report.json and report.html to the folder of --out.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// Under a minute, for a first impression: fewer rounds
    #[arg(long)]
    quick: bool,

    /// The rows to measure, as numbers [default: all]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    rows: Vec<u8>,

    /// The backend program [default: the one beside this program]
    #[arg(long, value_name = "PATH")]
    backend: Option<PathBuf>,

    /// Another backend with a virtio-rtc device, listening there, to be measured in turns with ours
    #[arg(long, value_name = "PATH")]
    peer_socket: Option<PathBuf>,

    /// Its process id, for what it uses
    #[arg(long, value_name = "PID", requires = "peer_socket")]
    peer_pid: Option<u32>,

    /// Where report.json and report.html go
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    out: PathBuf,

    /// Be the floor's server
    #[arg(long, hide = true, value_enum)]
    floor: Option<floor::Kind>,
}

/// What measuring needs.
struct Bench {
    args: Args,
    program: PathBuf,
    cpus: Cpus,
    /// Whether the backend knows of adaptive polling.
    polls: bool,
    report: Report,
}

impl Bench {
    /// So many, or where it is to be quick, so many.
    fn count(&self, thorough: usize, quick: usize) -> usize {
        if self.args.quick { quick } else { thorough }
    }

    /// A backend; its worker polls as it does by default, or not at all.
    fn backend(&self, polling: bool, args: &[&str]) -> io::Result<BackendProcess> {
        let mut all = vec!["--log-level=error"];
        if self.polls && !polling {
            all.push("--poll-max-us=0");
        }
        all.extend(args);
        BackendProcess::launch_program(&self.program, &all)
    }
}

/// A request's bytes.
pub fn request(op: Op, vcpu: u32, body: &(impl IntoBytes + Immutable + ?Sized)) -> Vec<u8> {
    let header = wire::RequestHeader {
        op: op.code().into(),
        vcpu: vcpu.into(),
        ..Default::default()
    };
    [header.as_bytes(), body.as_bytes()].concat()
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
    bench.report.write(&bench.args.out)?;
    println!("{}/report.html", bench.args.out.display());
    Ok(())
}
