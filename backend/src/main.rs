//! The backend process: see `vhost-user-timer --help`.

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use vhost_user_timer::args::Args;
use vhost_user_timer::capabilities::capabilities;
use vhost_user_timer::device::{ClockConfig, ClockDevice, TimerConfig, TimerDevice};
use vhost_user_timer::pid_file::PidFile;
use vhost_user_timer::places::Places;
use vhost_user_timer::server::{
    self, Access, Endpoint, Manager, Passed, ServerError, Signals, Supervision,
};
use vhost_user_timer::{logging, with_causes};

fn main() -> ExitCode {
    server::unblock_all();
    // Ignores whatever else the command line says.
    if std::env::args_os().any(|arg| arg == "--print-capabilities") {
        let printed = writeln!(io::stdout(), "{}", capabilities());
        return after_printing(printed);
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        // --help and --version.
        Err(text) if !text.use_stderr() => return after_printing(text.print()),
        Err(wrong) => {
            if logging::is_journal() {
                logging::say(&wrong.to_string());
            } else {
                let _ = wrong.print();
            }
            return ExitCode::from(2);
        }
    };
    let passed = match Passed::from_environment() {
        Ok(passed) => passed,
        Err(error) => return fail(&error.to_string()),
    };
    let places = Places::of(&args, passed).and_then(|places| {
        places.check(&args)?;
        Ok(places)
    });
    let places = match places {
        Ok(places) => places,
        Err(wrong) => {
            let _ = fail(&wrong.to_string());
            return ExitCode::from(2);
        }
    };
    if places.are_none() {
        let _ = Args::no_socket().print();
        return ExitCode::from(2);
    }
    match run(&args, &places) {
        Ok(()) => {
            logging::finish();
            ExitCode::SUCCESS
        }
        // Also where logging is off: the launcher must learn why it failed.
        Err(error) => fail(&with_causes(&*error)),
    }
}

/// The end after something was printed to standard output. A reader that has closed its pipe, as
/// `head` does, is no failure.
fn after_printing(printed: io::Result<()>) -> ExitCode {
    match printed.and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            fail(&format!("printing to stdout failed: {error}"))
        }
        _ => ExitCode::SUCCESS,
    }
}

fn fail(why: &str) -> ExitCode {
    logging::say(why);
    ExitCode::FAILURE
}

fn run(args: &Args, places: &Places) -> Result<(), Box<dyn Error>> {
    logging::start(args.log_level, args.name.as_deref())
        .map_err(|error| format!("starting the log's thread failed: {error}"))?;
    let device = Arc::new(TimerDevice::new(&TimerConfig {
        max_vcpus: args.max_vcpus,
        request_queues: args.request_queues,
        frequency: args.counter_frequency,
        source: args.counter_source,
        state_file: args.state_file.clone(),
    })?);
    let poll_max = Duration::from_micros(args.poll_max_us.into());
    let access = Access {
        group: args.socket_group.clone(),
        mode: args.socket_mode,
        users: args.allow_uid.clone(),
    };
    // Before there is a socket, whose path a signal must not leave behind.
    let signals = Signals::catch().map_err(ServerError::Prepare)?;
    let mut endpoints = Vec::new();
    if let Some(place) = &places.timer {
        let socket = place.open(&access)?;
        endpoints.push(Endpoint::timer(Arc::clone(&device), socket).polling(poll_max));
    }
    if let Some(place) = &places.clock {
        let socket = place.open(&access)?;
        let config = ClockConfig {
            utc: args.rtc_clock,
            counter_offset: args.rtc_counter_offset,
        };
        let store = device.store();
        let clock = Arc::new(ClockDevice::new(Arc::clone(&device), store, config)?);
        endpoints.push(Endpoint::clock(clock, socket).polling(poll_max));
    }
    let _pid_file = args.pid_file.as_deref().map(PidFile::write).transpose()?;
    let supervision = Manager::from_environment().map(|manager| Supervision::new(manager, device));
    server::serve(endpoints, &signals, args.terminate, supervision)?;
    Ok(())
}
