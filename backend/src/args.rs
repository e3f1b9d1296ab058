//! The command line.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser};
use log::LevelFilter;
use vhost_user_timer_protocol::{MAX_REQUEST_QUEUES, MAX_VCPUS};

use crate::accounts::{Group, User};
use crate::device::{SourceChoice, UtcKind};
use crate::given::given;
use crate::server::SocketMode;
use vhost_user_timer_model::vm::MAX_FREQUENCY;

/// What each exit code means. The manual page has this list as well.
const EXIT_STATUS: &str = "Exit status:
  0  The process has ended as it should, also by a signal
  1  Something failed; a message is on stderr
  2  The command line is wrong; a message is on stderr";

/// Keeps a VM's time: owns its counter offset, serves its vCPUs' timer registers over vhost-user,
/// and lets no vCPU run before every vCPU's timer is restored.
///
/// One process serves one VM, and each device one frontend at a time. SIGTERM, SIGINT and SIGHUP
/// end it.
///
/// A service manager can pass the sockets instead (LISTEN_FDS, sd_listen_fds(3)): one is the timer
/// device's, and of two, named timer and clock, each is the device's of its name.
#[derive(Clone, Debug, Parser)]
#[command(name = "vhost-user-timer", version, max_term_width = 100)]
#[command(allow_negative_numbers = true)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// Listen on a Unix socket at this path. A socket there on which no process listens is replaced
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Serve on this inherited descriptor, a Unix stream socket. A listening socket is served like
    /// a path; a connected one has one frontend, and the process ends with the last frontend of its
    /// connected sockets
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(i32).range(0..),
          conflicts_with = "socket_path")]
    pub fd: Option<i32>,

    /// Give the guest a clock: listen at this path for a VMM's virtio-rtc device. Works beside the
    /// timer device or alone
    #[arg(long, value_name = "PATH")]
    pub rtc_socket_path: Option<PathBuf>,

    /// Give the guest a clock: serve on this inherited descriptor, as --fd does
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(i32).range(0..),
          conflicts_with = "rtc_socket_path")]
    pub rtc_fd: Option<i32>,

    /// Give sockets at a path to this group, by name or gid, so that a VMM of another user can
    /// connect. Their mode is then 0660, unless --socket-mode says otherwise
    #[arg(long, value_name = "GROUP", value_parser = Group::parse)]
    pub socket_group: Option<Group>,

    /// Make sockets at a path with this mode, octal. Connecting needs the write permission
    /// [default: 0600, or 0660 with --socket-group]
    #[arg(long, value_name = "MODE", value_parser = SocketMode::parse)]
    pub socket_mode: Option<SocketMode>,

    /// Serve frontends of this user only, by name or uid; repeat the option for more users. Others
    /// are disconnected, and the log says so: at once, or, as each socket serves one frontend at a
    /// time, when the frontend before them has left. Also on inherited sockets: the user of a
    /// connected one is the user that made the socket pair. Without the option every user that can
    /// reach the socket is served
    #[arg(long, value_name = "USER", value_parser = User::parse)]
    pub allow_uid: Vec<User>,

    /// End when the last frontend of all sockets has disconnected, as with a connected --fd.
    /// vhost-user-timer-ctl counts as a frontend; a process that connects and sends nothing does
    /// not. Not for a VMM that reconnects
    #[arg(long)]
    pub terminate: bool,

    /// Write the process id to this file once all sockets are ready, and remove the file in the
    /// end. A file there that a process has left behind is replaced
    #[arg(long, value_name = "PATH")]
    pub pid_file: Option<PathBuf>,

    /// Tell the guest what the host's wall clock does at a leap second [default: with a
    /// state file the kind of the clock in it, otherwise utc if the kernel knows TAI and
    /// maybe-smeared if not]. Linux guests make an RTC only of a smeared clock
    #[arg(long, value_name = "KIND", value_enum)]
    pub rtc_clock: Option<UtcKind>,

    /// Use this counter offset, in ticks, for a VM that is not configured over the timer device:
    /// its virtual counter is the host counter minus the offset. Lets the guest read a clock and
    /// its counter at one instant
    #[arg(long, value_name = "TICKS", value_parser = ticks)]
    pub rtc_counter_offset: Option<u64>,

    /// Print what this program can do as JSON, and exit. All other options are ignored
    #[arg(long)]
    pub print_capabilities: bool,

    /// Accept VMs with up to this many vCPUs, 1 to 4096
    #[arg(long, value_name = "N", default_value_t = 512,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub max_vcpus: u32,

    /// Offer this many request queues, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_REQUEST_QUEUES)))]
    pub request_queues: u16,

    /// Accept only VMs with this counter frequency, in Hz. Without the option any frequency is
    /// accepted, and a VM that names none gets the counter source's own
    #[arg(long, value_name = "HZ", value_parser = clap::value_parser!(u64).range(1..=MAX_FREQUENCY))]
    pub counter_frequency: Option<u64>,

    /// Derive the host counter from this source. A VMM that puts the VM's offset into KVM needs
    /// cntvct. auto: with a state file, the source of the VM in it; otherwise cntvct on AArch64, as
    /// the guest's counter is an offset of it, and monotonic elsewhere
    #[arg(long, value_name = "SOURCE", value_parser = source_parser(),
          default_value_t = SourceChoice::Auto)]
    pub counter_source: SourceChoice,

    /// Keep the VM in this file, so that it survives a crash of this process: a process started
    /// again with the file resumes the VM. Created with mode 0600; best on a tmpfs
    #[arg(long, value_name = "PATH")]
    pub state_file: Option<PathBuf>,

    /// Busy-poll for up to this many microseconds after a request before sleeping. Adapts to recent
    /// traffic; backs off when other tasks want the CPU; 0 turns it off
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 200,
          value_parser = clap::value_parser!(u32).range(..=10_000))]
    pub poll_max_us: u32,

    /// Name the VM in each line of the log: up to 255 bytes, without control characters
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,

    /// Log this much on stderr. debug adds each operation that changes the VM and why a request is
    /// refused, trace each request; both slow requests down
    #[arg(long, value_name = "LEVEL", default_value = "info", ignore_case = true,
          value_parser = level_parser())]
    pub log_level: LevelFilter,
}

impl Args {
    /// The error of a command line without a socket, where none was passed either, and why one that
    /// was passed does not count.
    pub fn no_socket(ignored: Option<&str>) -> clap::Error {
        let why = ignored.map(|why| format!("\n{why}")).unwrap_or_default();
        let text = format!(
            "no socket to serve on: name one with --socket-path, --fd, --rtc-socket-path or \
             --rtc-fd, or have a service manager pass one (LISTEN_FDS, sd_listen_fds(3)){why}"
        );
        Self::command().error(ErrorKind::MissingRequiredArgument, text)
    }
}

/// The counter sources by name.
fn source_parser() -> impl TypedValueParser<Value = SourceChoice> {
    PossibleValuesParser::new(SourceChoice::names())
        .try_map(|name| SourceChoice::from_name(&name).ok_or("unknown source"))
}

/// The log's levels by name.
fn level_parser() -> impl TypedValueParser<Value = LevelFilter> {
    PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
        .try_map(|name| name.parse::<LevelFilter>())
}

impl Args {
    /// This process's command line, and the options in it that differ from their defaults, as text.
    ///
    /// # Errors
    ///
    /// Where the command line is wrong, and where it asks for help or the version.
    pub fn read() -> Result<(Self, String), clap::Error> {
        let command = Self::command();
        let matches = command.clone().try_get_matches()?;
        let args = Self::from_arg_matches(&matches);
        let args = args.map_err(|error| error.format(&mut command.clone()))?;
        Ok((args, given(&command, &matches)))
    }
}

/// A number of ticks, decimal or, after 0x, hexadecimal.
fn ticks(text: &str) -> Result<u64, &'static str> {
    let ticks = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    ticks.map_err(|_| "an offset is 0 to 2^64 - 1 ticks, decimal or, after 0x, hexadecimal")
}

/// Most bytes of a VM's name: as systemd allows in a unit's.
const LONGEST_NAME: usize = 255;

/// A VM's name, which is printed as it is.
fn name(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("a name has one character or more".to_owned()),
        1..=LONGEST_NAME if text.contains(char::is_control) => {
            Err("a name has no control characters, such as a newline".to_owned())
        }
        1..=LONGEST_NAME => Ok(text.to_owned()),
        bytes => Err(format!("{bytes} bytes; a name has up to {LONGEST_NAME}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args, ErrorKind> {
        Args::try_parse_from([&["vhost-user-timer"], args].concat()).map_err(|e| e.kind())
    }

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn each_device_has_one_socket_at_most() {
        use ErrorKind::*;
        assert!(parse(&["--socket-path=/run/x"]).is_ok());
        assert_eq!(parse(&["--fd", "3"]).unwrap().fd, Some(3));
        assert!(parse(&[]).is_ok(), "a service manager may pass them");
        assert_eq!(Args::no_socket(None).kind(), MissingRequiredArgument);
        assert_eq!(
            parse(&["--fd=3", "--socket-path=/x"]).unwrap_err(),
            ArgumentConflict
        );
        assert_eq!(
            parse(&["--rtc-fd=3", "--rtc-socket-path=/x"]).unwrap_err(),
            ArgumentConflict
        );
        assert!(parse(&["--rtc-socket-path=/x"]).is_ok());
        assert!(parse(&["--rtc-fd=4", "--socket-path=/x"]).is_ok());
    }

    #[test]
    fn the_counter_source_is_auto_or_the_one_that_is_named() {
        let source = |args: &[&str]| {
            let args = [&["--fd=3"], args].concat();
            parse(&args).unwrap().counter_source
        };
        assert_eq!(source(&[]), SourceChoice::Auto);
        assert_eq!(source(&["--counter-source=auto"]), SourceChoice::Auto);
        let names: Vec<_> = SourceChoice::names().collect();
        assert_eq!(names, ["auto", "monotonic", "boottime", "tsc", "cntvct"]);
        for name in names {
            let named = source(&["--counter-source", name]);
            assert_eq!(named.to_string(), name);
        }
    }

    #[test]
    fn a_counter_offset_is_decimal_or_hexadecimal() {
        let offset = |text| parse(&["--rtc-fd=3", "--rtc-counter-offset", text]);
        assert_eq!(offset("12").unwrap().rtc_counter_offset, Some(12));
        let most = offset("0xffffffffffffffff").unwrap().rtc_counter_offset;
        assert_eq!(most, Some(u64::MAX));
        for bad in ["", "0x", "-1", "0x1ffffffffffffffff", "f"] {
            assert!(offset(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_is_short_and_has_no_control_characters() {
        let name = |name: &str| parse(&["--fd=3", "--name", name]);
        for good in ["vm1", "a b", "qemu-1-\u{fc}", &"x".repeat(LONGEST_NAME)] {
            assert_eq!(name(good).unwrap().name.as_deref(), Some(good));
        }
        for bad in [
            "",
            "a\nb",
            "\x1b[31m",
            "\u{85}",
            &"x".repeat(LONGEST_NAME + 1),
        ] {
            let kind = name(bad).unwrap_err();
            assert_eq!(kind, ErrorKind::ValueValidation, "{bad:?}");
        }
    }

    #[test]
    fn a_level_that_there_is_not_is_answered_with_those_there_are() {
        let wrong = Args::try_parse_from(["vhost-user-timer", "--fd=3", "--log-level=loud"]);
        let text = wrong.unwrap_err().to_string();
        assert!(
            text.contains("off, error, warn, info, debug, trace"),
            "{text}"
        );
        let shouted = parse(&["--fd=3", "--log-level=DEBUG"]).unwrap();
        assert_eq!(shouted.log_level, LevelFilter::Debug);
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
            "--rtc-fd -1",
            "--max-vcpus -1",
            "--log-level=loud",
            "--poll-max-us=10001",
            "--counter-source=sundial",
        ] {
            // Also as two words: a number is the value of the option before it.
            let words: Vec<_> = bad.split(' ').collect();
            let kind = parse(&[&["--socket-path=/x"], words.as_slice()].concat()).unwrap_err();
            assert!(
                matches!(
                    kind,
                    ErrorKind::ValueValidation
                        | ErrorKind::InvalidValue
                        | ErrorKind::ArgumentConflict
                ),
                "{bad}: {kind}"
            );
        }
    }
}
