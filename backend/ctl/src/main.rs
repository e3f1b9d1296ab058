//! `vhost-user-timer-ctl`: shows the VM of a running backend.
//!
//! Both commands only read. Connecting and disconnecting change nothing in the VM.

mod error;
mod show;
mod target;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;
use vhost_user_timer_ctl::args::{Args, Command, Target};
use vhost_user_timer_protocol::Phase;

use error::Error;
use show::{Dump, Summary};
use target::connect;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        // --help and --version.
        Err(text) if !text.use_stderr() => return end(printed(text.print())),
        Err(wrong) => {
            let _ = wrong.print();
            return ExitCode::from(2);
        }
    };
    end(match &args.command {
        Command::Info(target) => {
            info(target).and_then(|info| show(&info, args.json, Summary::text))
        }
        Command::Dump(target) => dump(target).and_then(|dump| show(&dump, args.json, Dump::text)),
    })
}

fn end(result: Result<(), Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where stderr takes nothing, the exit code says it alone.
            let _ = writeln!(
                io::stderr(),
                "vhost-user-timer-ctl: {}",
                error.with_causes()
            );
            ExitCode::FAILURE
        }
    }
}

fn info(target: &Target) -> Result<Summary, Error> {
    let frontend = connect(target)?;
    let info = frontend.queues()[0]
        .info(target.timeout())
        .map_err(Error::failed_to("read the VM's state"))?;
    Ok(Summary::from(&info))
}

fn dump(target: &Target) -> Result<Dump, Error> {
    let frontend = connect(target)?;
    let queue = &frontend.queues()[0];
    let info = queue
        .info(target.timeout())
        .map_err(Error::failed_to("read the VM's state"))?;
    if info.phase == Phase::New {
        return Err(Error::NotConfigured);
    }
    let vm = queue
        .get_vm(0, info.vcpus, target.timeout())
        .map_err(Error::failed_to("read the VM's registers"))?;
    Ok(Dump::new(&info, &vm))
}

/// Prints the answer.
fn show<T: Serialize>(
    answer: &T,
    json: bool,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Error> {
    let text = if json {
        serde_json::to_string_pretty(answer).expect("plain data serialises")
    } else {
        text(answer)
    };
    printed(writeln!(io::stdout(), "{text}"))
}

/// What came of printing to stdout. A reader that has closed the pipe, as `head` does, is not a
/// failure.
fn printed(result: io::Result<()>) -> Result<(), Error> {
    match result.and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Print(error)),
        _ => Ok(()),
    }
}
