//! The library's examples, run against the released backend as a reader would.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use vhost_user_timer_kit::backend_process::{BackendProcess, find_program};

/// Cargo builds the examples beside the tests.
fn example(name: &str) -> Command {
    let this = std::env::current_exe().unwrap();
    let profile = this.ancestors().nth(2).unwrap();
    let program: PathBuf = profile.join("examples").join(name);
    assert!(
        program.exists(),
        "{} is missing: cargo build --examples -p vhost-user-timer-frontend",
        program.display()
    );
    Command::new(program)
}

fn text(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// Runs an example on these sockets. Returns the lines that it prints.
fn run(name: &str, sockets: &[&Path]) -> Vec<String> {
    let output = example(name).args(sockets).output().unwrap();
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    text.lines().map(str::to_owned).collect()
}

fn backend() -> BackendProcess {
    BackendProcess::launch(&["--counter-source=monotonic"]).unwrap()
}

/// The number behind `word`.
fn number(line: &str, word: &str) -> u64 {
    let (_, rest) = line.split_once(word).unwrap_or_else(|| panic!("{line}"));
    let digits = rest.trim_start().split(|c: char| !c.is_ascii_digit());
    digits.clone().next().unwrap().parse().unwrap()
}

#[test]
fn save_restore_moves_a_vm_from_one_backend_to_another() {
    let (source, destination) = (backend(), backend());
    let lines = run(
        "save_restore",
        &[source.socket_path(), destination.socket_path()],
    );
    let paused = number(&lines[1], "paused at virtual count");
    assert!(lines[2].starts_with("saved 284 bytes from "), "{lines:?}");
    assert_eq!(lines[3], "all 4 vCPUs are back; none runs yet");
    let mut ran = lines[4..].to_vec();
    ran.sort();
    assert_eq!(ran.len(), 4, "{lines:?}");
    for (vcpu, line) in ran.iter().enumerate() {
        assert!(
            line.starts_with(&format!("vCPU {vcpu} runs from")),
            "{line}"
        );
        assert!(number(line, "virtual count") >= paused, "{lines:?}");
    }
    let offset = |line: &String| line.split_once("cntvoff ").unwrap().1.to_owned();
    assert!(ran.iter().all(|line| offset(line) == offset(&ran[0])));
}

#[test]
fn save_restore_works_on_one_backend_and_says_why_it_does_not() {
    let backend = backend();
    for _ in 0..2 {
        let lines = run("save_restore", &[backend.socket_path()]);
        assert!(lines.last().unwrap().starts_with("vCPU "), "{lines:?}");
    }
    let output = example("save_restore")
        .arg("/dev/null/nowhere")
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("/nowhere"), "{}", text(&output));
}

#[test]
fn event_loop_sees_its_timer_expire() {
    let lines = run("event_loop", &[backend().socket_path()]);
    let last = lines.last().unwrap();
    assert!(last.contains("expired"), "{lines:?}");
}

#[test]
fn time_page_reads_counts_that_never_decrease() {
    let lines = run("time_page", &[backend().socket_path()]);
    assert!(lines[1].starts_with("1000000 readings of "), "{lines:?}");
    let read = number(&lines[1], " to ");
    assert!(number(&lines[2], "virtual count") >= read, "{lines:?}");
}

#[test]
fn reconnect_goes_on_with_the_next_backend() {
    let program = find_program().unwrap();
    let args = ["--counter-source=monotonic"];
    let mut backend = BackendProcess::launch_with_state(&program, &args).unwrap();
    let mut vmm = example("reconnect")
        .arg(backend.socket_path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(vmm.stdout.take().unwrap()).lines();
    let mut ask = vmm.stdin.take().unwrap();
    let mut line = || lines.next().unwrap().unwrap();
    assert!(line().starts_with("the VM runs"));
    let mut last = 0;
    for _ in 0..3 {
        writeln!(ask).unwrap();
        let count = number(&line(), "virtual count");
        assert!(count > last);
        last = count;
        backend.kill();
        backend.relaunch_with_state(&program, &args).unwrap();
    }
    drop(ask);
    assert!(vmm.wait().unwrap().success());
}
