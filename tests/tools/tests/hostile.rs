//! The tool `hostile` itself: what holds is OK, and what does not is reported with the command that
//! repeats it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use vhost_user_timer_kit::raw_driver::release_program;

fn hostile(args: &[&str]) -> (Output, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_hostile"))
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text)
}

#[test]
fn a_round_of_each_campaign_leaves_the_backend_unharmed_and_is_counted() {
    let (program, _) = release_program().unwrap();
    let backend = program.to_str().unwrap();
    let (output, text) = hostile(&["--seed=7", "--round=1", "--backend", backend]);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for campaign in [
        "control", "rings", "gate", "crowd", "races", "clock", "limits", "states",
    ] {
        let row = text.lines().find(|line| line.starts_with(campaign));
        let columns: Vec<_> = row.expect("a row").split_whitespace().collect();
        assert_eq!(columns[1], "1", "its rounds: {text}");
        assert_ne!(columns[2], "0", "its acts: {text}");
    }
    assert!(text.contains("hostile: OK seed=7"), "{text}");
}

#[test]
fn a_backend_that_dies_is_a_violation_with_the_command_that_repeats_it() {
    let (program, _) = release_program().unwrap();
    let mut tool = Command::new(env!("CARGO_BIN_EXE_hostile"))
        .args(["--seed=7", "--campaign=gate", "--backend"])
        .arg(program)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(tool.stdout.take().unwrap()).lines();
    let pid = lines.by_ref().find_map(|line| {
        let line = line.unwrap();
        let pid = line.strip_prefix("hostile: the backend is process ")?;
        Pid::from_raw(pid.parse().unwrap())
    });
    kill_process(pid.expect("the backend"), Signal::KILL).unwrap();
    let text: Vec<_> = lines.map(Result::unwrap).collect();
    let text = text.join("\n");
    assert_eq!(tool.wait().unwrap().code(), Some(1), "{text}");
    for part in [
        "hostile: the backend has ended: signal: 9 (SIGKILL)",
        "hostile: to repeat: hostile --seed 7 --campaign gate --round ",
        "hostile: FAILED seed=7",
    ] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}
