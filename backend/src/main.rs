//! The backend process: see `vhost-user-timer --help`.

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

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
    server::prepare_signals();
    // Ignores whatever else the command line says.
    if std::env::args_os().any(|arg| arg == "--print-capabilities") {
        let printed = writeln!(io::stdout(), "{}", capabilities());
        return after_printing(printed);
    }
    let (args, given) = match Args::read() {
        Ok(args) => args,
        // --help and --version.
        Err(text) if !text.use_stderr() => return after_printing(text.print()),
        Err(wrong) => return wrong_usage(&wrong),
    };
    logging::name_vm(args.name.as_deref());
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
        return wrong_usage(&Args::no_socket(server::passed_to_another().as_deref()));
    }
    match run(&args, &given, &places) {
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

/// The end of a start with a wrong command line.
fn wrong_usage(wrong: &clap::Error) -> ExitCode {
    if logging::is_journal() {
        logging::say(&wrong.to_string());
    } else {
        let _ = wrong.print();
    }
    ExitCode::from(2)
}

fn fail(why: &str) -> ExitCode {
    logging::say(why);
    ExitCode::FAILURE
}

fn run(args: &Args, given: &str, places: &Places) -> Result<(), Box<dyn Error>> {
    logging::start(args.log_level)
        .map_err(|error| format!("starting the log's thread failed: {error}"))?;
    logging::wait_for_first();
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
    logging::first(&first_line(args, given, &device, &endpoints));
    let supervision = Manager::from_environment().map(|manager| Supervision::new(manager, device));
    server::serve(endpoints, signals, args.terminate, supervision)?;
    Ok(())
}

/// What this process is, for those who read its log.
fn first_line(args: &Args, given: &str, device: &TimerDevice, endpoints: &[Endpoint]) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let serves: Vec<_> = endpoints.iter().map(ToString::to_string).collect();
    let (serves, counter) = (serves.join(", "), device.host_counter());
    let (source, given) = (
        args.counter_source,
        if given.is_empty() { "none" } else { given },
    );
    let file = match &args.state_file {
        Some(path) => format!("state file {}", path.display()),
        None => "no state file".to_owned(),
    };
    format!(
        "Version {version} serves the {serves}; host counter {counter} (--counter-source \
         {source}); {file}; options: {given}"
    )
}
