//! How a panic is reported. Here it ends its thread only: the tests are not built to abort.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use log::LevelFilter;
use vhost_user_timer::logging;
use vhost_user_timer_kit::backend_process::exit_within;
use vhost_user_timer_kit::raw_driver::fill;

const DEADLINE: Duration = Duration::from_secs(5);

/// Set in the process whose thread panics: the log's level there.
const LEVEL: &str = "PANICS_WITH_LOG_LEVEL";

const NAME: &str = "a_panic_is_reported_and_never_waits_for_the_reader_of_stderr";

/// This program again, to run this test as the process whose thread panics.
fn panicking(level: &str, stderr: impl Into<Stdio>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", NAME, "--nocapture"]);
    command.env(LEVEL, level).env_remove("RUST_BACKTRACE");
    command.stdout(Stdio::null()).stderr(stderr);
    command
}

#[track_caller]
fn ends(mut command: Command) {
    let mut child = command.spawn().unwrap();
    // Its end of the pipe.
    drop(command);
    let status = exit_within(&mut child, DEADLINE);
    let _ = child.kill();
    assert_eq!(status.expect("it ends in time").code(), Some(7));
}

#[test]
fn a_panic_is_reported_and_never_waits_for_the_reader_of_stderr() {
    if let Ok(level) = std::env::var(LEVEL) {
        logging::start(level.parse::<LevelFilter>().unwrap()).unwrap();
        let thread = std::thread::Builder::new().name("worker".to_owned());
        let panicked = thread.spawn(|| panic!("what happened")).unwrap().join();
        assert!(panicked.is_err());
        std::process::exit(7);
    }
    for level in ["info", "off"] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        ends(panicking(level, writer));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let told = "vhost-user-timer: thread 'worker': panicked at backend/tests/panics.rs:";
        assert!(text.starts_with(told), "{level}: {text}");
        assert!(text.ends_with(":\nwhat happened\n"), "{level}: {text}");

        let (_reader, mut writer) = std::io::pipe().unwrap();
        fill(&mut writer);
        ends(panicking(level, writer));
    }
}
