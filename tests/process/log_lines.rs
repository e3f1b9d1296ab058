//! What each line of the log has, on a plain stderr and in the journal.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use rustix::fs::fstat;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vhost_user_timer_kit::backend_process::{exit_within, find_program};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::{PATIENCE, Rig};

/// The program, with a stream as its stderr that the environment says is the journal's.
fn in_journal(args: &[&str]) -> (Command, UnixStream) {
    let (journal, stderr) = UnixStream::pair().unwrap();
    let found = fstat(&stderr).unwrap();
    let mut command = Command::new(find_program().unwrap());
    command.env(
        "JOURNAL_STREAM",
        format!("{}:{}", found.st_dev, found.st_ino),
    );
    command
        .args(args)
        .stdin(Stdio::null())
        .stderr(OwnedFd::from(stderr));
    journal.set_read_timeout(Some(PATIENCE)).unwrap();
    (command, journal)
}

/// What the program says to the journal until it ends with this exit code.
fn says(args: &[&str], code: i32) -> String {
    let (mut command, mut journal) = in_journal(args);
    let mut child = command.spawn().unwrap();
    // Its end of the stream.
    drop(command);
    let mut said = String::new();
    journal.read_to_string(&mut said).unwrap();
    let status = exit_within(&mut child, PATIENCE);
    assert_eq!(
        status.expect("it ends in time").code(),
        Some(code),
        "{said}"
    );
    said
}

#[test]
fn every_line_has_the_program_and_the_vm_and_a_connections_lines_its_device_and_number() {
    let rig = Rig::launch(&["--name=vm 1"]);
    let mut log = String::new();
    for number in [1, 2] {
        let mut client = Client::connect(&rig);
        if number == 1 {
            client.configure(1);
        }
        client.resume();
        client.pause();
        drop(client);
        let end = format!(" timer#{number}] The frontend of the timer device disconnected");
        log = rig.log_with(&end);
    }
    let mut changes = Vec::new();
    for line in log.lines() {
        let (head, text) = line.split_once("] ").expect("a line");
        let (_time, head) = head.split_once("Z INFO  ").expect("a level");
        let of_connection = head.strip_prefix("vhost-user-timer vm 1 timer#");
        if let Some(number) = of_connection.filter(|_| text.starts_with("VM ")) {
            changes.push(number.to_owned());
        } else if of_connection.is_none() {
            assert_eq!(head, "vhost-user-timer vm 1", "{line}");
            assert!(!text.contains("connected"), "{line}");
        }
    }
    changes.dedup();
    assert_eq!(changes, ["1", "2"], "{log}");
}

#[test]
fn a_line_of_the_journal_has_its_priority_and_no_time() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket").display().to_string();
    let (mut command, journal) = in_journal(&["--name=vm1", "--socket-path", &path]);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut lines = BufReader::new(journal).lines().map(Result::unwrap);
    let ready = lines.find(|line| line.contains("Ready")).expect("a line");
    let wanted = format!("<6>vm1: Ready for a frontend of the timer device on {path}");
    assert_eq!(ready, wanted);
    drop(UnixStream::connect(&path).unwrap());
    let gone = lines.find(|line| line.contains("disconnected"));
    let whose = "<6>vm1 timer#1: The frontend of the timer device disconnected";
    assert!(
        gone.as_ref().is_some_and(|line| line.starts_with(whose)),
        "{gone:?}"
    );
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let rest: Vec<_> = lines.collect();
    assert!(
        rest.iter().all(|line| line.starts_with("<6>vm1: ")),
        "{rest:?}"
    );
    assert!(
        rest.iter().any(|line| line.contains("Ending on SIGTERM")),
        "{rest:?}"
    );
    assert!(exit_within(&mut child, PATIENCE).is_some());
}

#[test]
fn what_ends_the_start_is_an_error_in_the_journal() {
    let said = says(&["--fd=77", "--log-level=off", "--name=vm1"], 1);
    assert!(said.starts_with("<3>vm1: --fd 77: "), "{said}");
    let said = says(&["--no-such-option"], 2);
    assert!(said.starts_with("<3>error: "), "{said}");
    assert!(said.lines().all(|line| line.starts_with("<3>")), "{said}");
}

#[test]
fn a_stderr_that_was_redirected_is_not_the_journals() {
    let (mut command, journal) = in_journal(&["--fd=77", "--name=vm1"]);
    let output = command.stderr(Stdio::piped()).output().unwrap();
    drop(journal);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.starts_with("vhost-user-timer vm1: --fd 77: "),
        "{said}"
    );
}
