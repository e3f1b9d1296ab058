//! Standard streams that take nothing.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use vhost_user_timer_kit::backend_process::exit_within;
use vhost_user_timer_kit::raw_driver::release_program;
use vhost_user_timer_kit::victim::DEADLINE;

pub(crate) fn program() -> PathBuf {
    release_program().expect("a backend program").0
}

/// Runs a program to its end, which must come in time, and returns its exit code.
#[track_caller]
pub(crate) fn ends(mut command: Command) -> i32 {
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    // The child has what it inherits.
    drop(command);
    let status = exit_within(&mut child, DEADLINE);
    let _ = child.kill();
    let status = status.expect("it ends in time");
    status.code().unwrap_or_else(|| panic!("{status}"))
}

/// A descriptor that takes nothing.
fn full() -> Stdio {
    File::options()
        .write(true)
        .open("/dev/full")
        .unwrap()
        .into()
}

#[test]
fn what_cannot_be_printed_is_1_and_a_message() {
    for option in ["--print-capabilities", "--help", "--version"] {
        let output = Command::new(program()).arg(option).stdout(full()).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1), "{option}: {}", output.status);
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            "vhost-user-timer: printing to stdout failed: No space left on device (os error 28)\n",
            "{option}"
        );
    }
}

#[test]
fn a_reader_that_closes_the_pipe_is_no_failure() {
    for option in ["--print-capabilities", "--help", "--version"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(program()).arg(option).stdout(writer).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(0), "{option}: {}", output.status);
        assert_eq!(output.stderr, b"", "{option}");
    }
}

#[test]
fn an_error_that_cannot_be_printed_has_its_exit_code() {
    for (args, code) in [
        (&["--fd=77"][..], 1),
        (&["--fd=77", "--log-level=off"], 1),
        (&["--fd=77", "--no-such-option"], 2),
    ] {
        let mut command = Command::new(program());
        command.args(args).stdout(full()).stderr(full());
        assert_eq!(ends(command), code, "{args:?}");
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" >&- 2>&-", "sh"]);
        command.arg(program()).args(args);
        assert_eq!(ends(command), code, "{args:?}, closed");
        let mut command = Command::new(program());
        command.args(["--print-capabilities"]);
        command.stdout(full()).stderr(full());
        assert_eq!(ends(command), 1);
    }
}
