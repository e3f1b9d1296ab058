//! The backend process: see `vhost-user-timer --help`.

use std::error::Error;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use vhost_user_timer::args::Args;
use vhost_user_timer::capabilities::capabilities;
use vhost_user_timer::device::{ClockConfig, ClockDevice, TimerConfig, TimerDevice};
use vhost_user_timer::server::{self, Endpoint, ServerError, Signals, Socket, SocketError};
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
    match run(&args) {
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

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    logging::start(args.log_level, args.name.as_deref())
        .map_err(|error| format!("starting the log's thread failed: {error}"))?;
    let device = Arc::new(TimerDevice::new(&TimerConfig {
        max_vcpus: args.max_vcpus,
        request_queues: args.request_queues,
        frequency: args.counter_frequency,
        source: args.counter_source,
        state_file: args.state_file.clone(),
    })?);
    if args.fd.is_some() && args.fd == args.rtc_fd {
        return Err("--fd and --rtc-fd name the same descriptor; each device needs its own".into());
    }
    let poll_max = Duration::from_micros(args.poll_max_us.into());
    // Before there is a socket, whose path a signal must not leave behind.
    let signals = Signals::catch().map_err(ServerError::Prepare)?;
    let mut endpoints = Vec::new();
    if let Some(socket) = socket(args.socket_path.as_deref(), "--fd", args.fd)? {
        endpoints.push(Endpoint::timer(Arc::clone(&device), socket).polling(poll_max));
    }
    if let Some(socket) = socket(args.rtc_socket_path.as_deref(), "--rtc-fd", args.rtc_fd)? {
        let config = ClockConfig {
            utc: args.rtc_clock,
            counter_offset: args.rtc_counter_offset,
        };
        let clock = Arc::new(ClockDevice::new(
            Arc::clone(&device),
            device.store(),
            config,
        )?);
        endpoints.push(Endpoint::clock(clock, socket).polling(poll_max));
    }
    server::serve(endpoints, &signals)?;
    Ok(())
}

/// The socket that one device's options name, where they name one.
fn socket(
    path: Option<&Path>,
    fd_option: &'static str,
    fd: Option<i32>,
) -> Result<Option<Socket>, SocketError> {
    match (path, fd) {
        (Some(path), _) => Socket::bind(path).map(Some),
        (None, Some(fd)) => Socket::from_fd(fd_option, fd).map(Some),
        (None, None) => Ok(None),
    }
}
