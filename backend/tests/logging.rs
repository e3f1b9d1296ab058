//! The log where nobody reads standard error: nothing waits, and what is lost is counted.
//!
//! Each test runs this program again, as the process that logs. A panic ends its thread only there:
//! the tests are not built to abort.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use log::LevelFilter;
use vhost_user_timer::logging;
use vhost_user_timer_kit::backend_process::exit_within;
use vhost_user_timer_kit::raw_driver::fill;

/// Only a failure takes this long: what waits for a reader of stderr waits forever.
const DEADLINE: Duration = Duration::from_secs(30);

/// Set in the process that logs: the log's level there.
const LEVEL: &str = "LOGS_WITH_LEVEL";

/// The exit code of a process that did as it should.
const DONE: i32 = 7;

/// Whether this is the process that logs. The log is started then.
fn started() -> bool {
    let Ok(level) = std::env::var(LEVEL) else {
        return false;
    };
    logging::start(level.parse::<LevelFilter>().unwrap()).unwrap();
    true
}

/// This program again, to run one test as the process that logs.
fn again(test: &str, level: &str, stderr: impl Into<Stdio>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]);
    command.env(LEVEL, level).env_remove("RUST_BACKTRACE");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(stderr);
    command
}

#[track_caller]
fn ends(mut command: Command) {
    let mut child = command.spawn().unwrap();
    // Its end of the pipe.
    drop(command);
    let status = exit_within(&mut child, DEADLINE);
    let _ = child.kill();
    assert_eq!(status.expect("it ends in time").code(), Some(DONE));
}

#[test]
fn a_panic_is_reported_and_never_waits_for_the_reader_of_stderr() {
    const NAME: &str = "a_panic_is_reported_and_never_waits_for_the_reader_of_stderr";
    if started() {
        let thread = thread::Builder::new().name("worker".to_owned());
        let panicked = thread.spawn(|| panic!("what happened")).unwrap().join();
        assert!(panicked.is_err());
        std::process::exit(DONE);
    }
    for level in ["info", "off"] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        ends(again(NAME, level, writer));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let told = "vhost-user-timer: thread 'worker': panicked at backend/tests/logging.rs:";
        assert!(text.starts_with(told), "{level}: {text}");
        assert!(text.ends_with(":\nwhat happened\n"), "{level}: {text}");

        let (_reader, mut writer) = std::io::pipe().unwrap();
        fill(&mut writer);
        ends(again(NAME, level, writer));
    }
}

/// Lines that one place may log at once.
const OF_EACH: usize = 100;

/// Logs from more places than the queue has room for, and returns how many lines those are.
fn log_from_many_places() -> usize {
    let mut lines = 0;
    macro_rules! place {
        ($place:literal) => {
            for line in 0..OF_EACH {
                log::info!("line {line} of place {}", $place);
                lines += 1;
            }
        };
    }
    // A place is a file and a line.
    place!(1);
    place!(2);
    place!(3);
    place!(4);
    place!(5);
    place!(6);
    place!(7);
    place!(8);
    place!(9);
    place!(10);
    place!(11);
    place!(12);
    lines
}

#[test]
fn lines_that_an_unread_stderr_has_no_room_for_are_counted_and_told_when_it_is_read() {
    const NAME: &str =
        "lines_that_an_unread_stderr_has_no_room_for_are_counted_and_told_when_it_is_read";
    const FULL: &str = "nothing more fits";
    if started() {
        let lines = log_from_many_places();
        println!("\n{FULL}: {lines}");
        // Until the test has read what was dropped.
        let _ = std::io::stdin().read_line(&mut String::new());
        log::info!("the last line");
        logging::finish();
        std::process::exit(DONE);
    }
    let (reader, mut writer) = std::io::pipe().unwrap();
    fill(&mut writer);
    let mut command = again(NAME, "info", writer);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let logged = said.find_map(|line| line.unwrap().strip_prefix(FULL)?.get(2..)?.parse().ok());
    let logged: usize = logged.expect("logging did not wait");
    let mut log = BufReader::new(reader).lines().map(Result::unwrap);
    let (mut lines, mut dropped) = (0, None);
    while lines < logged && dropped.is_none() {
        let line = log.next().expect("a line");
        lines += usize::from(line.contains(" of place "));
        dropped = line
            .strip_suffix(" lines were dropped: stderr was not read")
            .and_then(|line| line.rsplit(' ').next()?.parse::<usize>().ok());
    }
    assert_eq!(lines + dropped.expect("a count"), logged);
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let last = log.next().expect("a line");
    assert!(
        last.ends_with("INFO  vhost-user-timer] the last line"),
        "{last}"
    );
    let status = exit_within(&mut child, DEADLINE);
    assert_eq!(status.expect("it ends in time").code(), Some(DONE));
}

#[test]
fn a_place_has_a_limit_at_info_and_none_at_debug() {
    const NAME: &str = "a_place_has_a_limit_at_info_and_none_at_debug";
    const TIMES: usize = 3 * OF_EACH / 2;
    if started() {
        for line in 0..TIMES {
            log::debug!("detail {line}");
            log::info!("line {line}");
        }
        logging::finish();
        std::process::exit(DONE);
    }
    let (mut reader, writer) = std::io::pipe().unwrap();
    let begun = Instant::now();
    ends(again(NAME, "debug", writer));
    // One line more every 5 s, where this took as long.
    let more = (begun.elapsed().as_secs() / 5) as usize;
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let said = |what| text.lines().filter(|line| line.contains(what)).count();
    assert_eq!(said("] detail "), TIMES, "{text}");
    let lines = said("] line ");
    assert!((OF_EACH..=OF_EACH + more).contains(&lines), "{text}");
    let left_out = text.lines().filter_map(|line| {
        let (head, _) = line.split_once(" more lines like this one in ")?;
        head.rsplit(' ').next()?.parse::<usize>().ok()
    });
    assert_eq!(left_out.sum::<usize>(), TIMES - lines, "{text}");
}
