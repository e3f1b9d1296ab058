//! The commands.

mod best_effort;
mod counting;
mod refusals;
mod round_trip;

use std::process::ExitCode;

use kvm_ioctls::{Cap, Kvm};
use serde_json::{Value, json};

use crate::Result;
use crate::vm::host_counter;

const USAGE: &str = "\
usage: kvm-agent COMMAND
  kvm                    what this kernel's KVM is
  round-trip BACKEND     a VM's timers from KVM through the backend and back
  counting BACKEND N     N pauses through which the guest's time goes on
  refusals BACKEND       why an offset does not go into KVM
  protected BACKEND      the same, of a VM that the host cannot look into
  best-effort BACKEND    the counts of a VM into a KVM that has no ioctl for the offset";

/// Carries out the command on the command line.
pub(crate) fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&args) {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kvm-agent {}: {}", args.join(" "), chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result<Value> {
    match *args {
        ["kvm"] => kvm(),
        ["round-trip", backend] => round_trip::run(backend),
        ["counting", backend, rounds] => counting::run(backend, rounds),
        ["refusals", backend] => refusals::run(backend),
        ["protected", backend] => refusals::run_protected(backend),
        ["best-effort", backend] => best_effort::run(backend),
        _ => Err(USAGE.into()),
    }
}

/// An error with its sources.
fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<_> = sources.map(ToString::to_string).collect();
    texts.join(": ")
}

fn kvm() -> Result<Value> {
    let kvm = Kvm::new()?;
    Ok(json!({
        "api": kvm.get_api_version(),
        "counter_offset": kvm.check_extension(Cap::CounterOffset),
        "frequency": host_counter()?.native_frequency(),
    }))
}
