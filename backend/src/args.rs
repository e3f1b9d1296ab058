//! The command line.

use std::path::PathBuf;

use clap::{ArgGroup, Parser};
use log::LevelFilter;
use vhost_user_timer_protocol::{MAX_REQUEST_QUEUES, MAX_VCPUS};

use crate::counter::Source;
use crate::vm::MAX_FREQUENCY;

/// Keeps a VM's time: owns its counter offset, serves its vCPUs' timer registers over
/// vhost-user, and lets no vCPU run before every vCPU's timer is restored.
///
/// One process serves one VM and one frontend at a time. SIGTERM and SIGINT end it.
#[derive(Clone, Debug, Parser)]
#[command(name = "vhost-user-timer", version, max_term_width = 100)]
#[command(group(ArgGroup::new("socket").required(true).args(["socket_path", "fd"])))]
pub struct Args {
    /// Listen on a Unix socket at this path
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Serve on this inherited descriptor: a listening Unix stream socket, or a connected one
    /// (the process then ends when its frontend disconnects)
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(i32).range(0..))]
    pub fd: Option<i32>,

    /// Print what this program can do as JSON, and exit; all other options are ignored
    #[arg(long)]
    pub print_capabilities: bool,

    /// The most vCPUs that the VM may have, 1 to 4096
    #[arg(long, value_name = "N", default_value_t = 512,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub max_vcpus: u32,

    /// How many request queues to offer, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_REQUEST_QUEUES)))]
    pub request_queues: u16,

    /// The VM's counter frequency in Hz; a VM that wants another is refused [default: the
    /// counter source's own, and whatever the VM wants is taken]
    #[arg(long, value_name = "HZ", value_parser = clap::value_parser!(u64).range(1..=MAX_FREQUENCY))]
    pub counter_frequency: Option<u64>,

    /// What the host counter is derived from
    #[arg(long, value_name = "SOURCE", value_enum, default_value_t = Source::Monotonic)]
    pub counter_source: Source,

    /// Keep the VM in this file, so that it survives a crash of this process: the next one that is
    /// started with it goes on where this one was. Made with mode 0600; best on a tmpfs
    #[arg(long, value_name = "PATH")]
    pub state_file: Option<PathBuf>,

    /// How much to log on stderr: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LevelFilter,
}

/// What `--print-capabilities` prints (QEMU, docs/interop/vhost-user.rst, "Backend program
/// conventions"). That document's types have no timer; this one names itself all the same.
pub const CAPABILITIES: &str = r#"{
  "type": "timer",
  "features": []
}"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args, clap::error::ErrorKind> {
        Args::try_parse_from([&["vhost-user-timer"], args].concat()).map_err(|e| e.kind())
    }

    #[test]
    fn the_command_line_is_sound() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn exactly_one_socket_is_named() {
        use clap::error::ErrorKind::*;
        assert!(parse(&["--socket-path=/run/x"]).is_ok());
        assert_eq!(parse(&["--fd", "3"]).unwrap().fd, Some(3));
        assert_eq!(parse(&[]).unwrap_err(), MissingRequiredArgument);
        assert_eq!(
            parse(&["--fd=3", "--socket-path=/x"]).unwrap_err(),
            ArgumentConflict
        );
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for bad in [
            "--max-vcpus=0",
            "--max-vcpus=4097",
            "--request-queues=0",
            "--request-queues=17",
            "--counter-frequency=0",
            "--counter-frequency=10000000001",
            "--fd=-1",
            "--log-level=loud",
            "--counter-source=sundial",
        ] {
            let kind = parse(&["--socket-path=/x", bad]).unwrap_err();
            assert!(
                matches!(
                    kind,
                    clap::error::ErrorKind::ValueValidation
                        | clap::error::ErrorKind::InvalidValue
                        | clap::error::ErrorKind::ArgumentConflict
                ),
                "{bad}: {kind}"
            );
        }
    }
}
