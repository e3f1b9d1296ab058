//! The commands.

use std::error::Error;
use std::process::ExitCode;

use kvm_ioctls::{Cap, Kvm};
use serde_json::{Value, json};
use vhost_user_timer_counter::{HostCounter, Source};

const USAGE: &str = "\
usage: kvm-agent COMMAND
  kvm        what this kernel's KVM is";

type Result<T> = std::result::Result<T, Box<dyn Error>>;

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
            eprintln!("kvm-agent {}: {error}", args.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[&str]) -> Result<Value> {
    match *args {
        ["kvm"] => kvm(),
        _ => Err(USAGE.into()),
    }
}

fn kvm() -> Result<Value> {
    let kvm = Kvm::new()?;
    Ok(json!({
        "api": kvm.get_api_version(),
        "counter_offset": kvm.check_extension(Cap::CounterOffset),
        "frequency": HostCounter::open(Source::Cntvct)?.native_frequency(),
    }))
}
