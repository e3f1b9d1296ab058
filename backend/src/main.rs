//! The backend process: see `vhost-user-timer --help`.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use vhost_user_timer::args::{Args, CAPABILITIES};
use vhost_user_timer::counter::Counter;
use vhost_user_timer::device::TimerDevice;
use vhost_user_timer::server::{self, Port, Socket};
use vhost_user_timer::vm::Profile;

fn main() -> ExitCode {
    // Whatever else the command line says.
    if std::env::args_os().any(|arg| arg == "--print-capabilities") {
        println!("{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    let args = Args::parse();
    env_logger::Builder::new()
        .filter_level(args.log_level)
        .format_target(false)
        .init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text += &format!(": {error}");
                cause = error.source();
            }
            // Also where logging is off: the launcher must learn why it failed.
            eprintln!("vhost-user-timer: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let counter = Counter::open(args.counter_source)?;
    let profile = Profile {
        max_vcpus: args.max_vcpus,
        request_queues: args.request_queues,
        frequency: args.counter_frequency.unwrap_or(counter.native_frequency()),
        frequency_fixed: args.counter_frequency.is_some(),
    };
    let device = Arc::new(TimerDevice::new(
        profile,
        counter,
        args.state_file.as_deref(),
    )?);
    let socket = match (&args.socket_path, args.fd) {
        (Some(path), _) => Socket::bind(path)?,
        (None, Some(fd)) => Socket::from_fd(fd)?,
        (None, None) => return Err("neither --socket-path nor --fd was given".into()),
    };
    server::serve(vec![Port::timer(device, socket)])?;
    Ok(())
}
