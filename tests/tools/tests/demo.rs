//! The mock frontend as a program: what it prints, and how it exits.

use std::process::{Command, Output};

use serde_json::Value;
use vhost_user_timer_kit::backend_process::{find_program, write_script};

fn mock_frontend(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mock-frontend"))
        .args(args)
        .output()
        .expect("mock-frontend runs")
}

fn demo(args: &[&str]) -> Output {
    let program = find_program().expect("a backend");
    let program = program.to_str().expect("a path in UTF-8");
    mock_frontend(&[&["demo", "--backend", program], args].concat())
}

fn stdout(output: &Output) -> &str {
    str::from_utf8(&output.stdout).expect("UTF-8")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn the_demo_ends_with_ok() {
    let output = demo(&["--vcpus", "2", "--seed", "1"]);
    let text = stdout(&output);
    let ok = "demo: OK vcpus=2 early=0 backwards=0 offsets=1 lost=0";
    assert_eq!(text.lines().last(), Some(ok), "{text}");
    assert!(text.contains("seed 1"), "{text}");
    assert!(output.status.success());
    assert_eq!(output.stderr, b"");
}

#[test]
fn the_demo_tells_the_same_in_json() {
    let output = demo(&["--vcpus", "2", "--seed", "2", "--json"]);
    let value = json(&output);
    assert_eq!(value["ok"], true, "{value:#}");
    assert_eq!((&value["seed"], &value["vcpus"]), (&2.into(), &2.into()));
    assert_eq!(value["error"], Value::Null);
    for name in ["early", "backwards", "lost", "doubled"] {
        assert_eq!(value["verdict"][name], 0, "{name}");
    }
    assert_eq!(value["verdict"]["offsets"], 1);
    let rows = value["report"]["rows"].as_array().expect("a row by vCPU");
    assert_eq!(rows.len(), 2);
    let moved = &value["report"]["restores"][2];
    assert_eq!(moved["name"], "moved");
    let number = |value: &Value| value.as_u64().expect("a number");
    let [earliest, latest] = [0, 1].map(|n| number(&moved["decided_between"][n]));
    let metre = ["decided", "put_in", "confirmed", "first_reading"];
    let metre = metre.map(|name| number(&moved["metre"][name]));
    assert!(metre.is_sorted(), "{moved:#}");
    for row in rows {
        // The count continued from the saved one while the offsets were decided, and is released
        // as much later as the last metre took.
        let (saved, released) = (number(&row["saved_count"]), number(&row["released_count"]));
        assert_eq!(saved, number(&moved["largest_brought"]));
        assert!((earliest..=latest).contains(&metre[0]), "{moved:#}");
        assert_eq!(released - saved, metre[2] - metre[0]);
        let fired = ["fired_on_source", "fired_on_destination"]
            .iter()
            .flat_map(|side| [&row[side]["virtual"], &row[side]["physical"]])
            .map(|count| count.as_u64().expect("a count"));
        assert_eq!(Some(fired.sum()), row["programmed"].as_u64());
    }
    assert!(output.status.success());
}

/// Moves VMs of few and of many vCPUs in this way.
fn moves(args: &[&str], via: &str, killed: Option<&str>) {
    for vcpus in ["4", "64"] {
        let args = [&["--seed", "7", "--vcpus", vcpus], args].concat();
        let output = demo(&args);
        let text = stdout(&output);
        let ok = format!("demo: OK vcpus={vcpus} early=0 backwards=0 offsets=1 lost=0");
        assert_eq!(text.lines().last(), Some(&*ok), "{text}");
        assert_eq!(text.contains("device state"), via == "device-state");
        for when in ["in mid-restore", "before the offsets are confirmed"] {
            let kill = format!("is killed {when}");
            assert_eq!(text.contains(&kill), killed == Some(when), "{text}");
        }
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(output.stderr, b"");

        let output = demo(&[&args[..], &["--json"]].concat());
        let value = json(&output);
        assert_eq!(value["ok"], true, "{value:#}");
        assert_eq!(
            (&value["via"], &value["killed"]),
            (&via.into(), &killed.is_some().into())
        );
        assert_eq!(output.status.code(), Some(0));
    }
}

#[test]
fn a_vm_moves_by_requests() {
    moves(&[], "requests", None);
}

#[test]
fn a_vm_moves_as_a_device_state() {
    moves(&["--via", "device-state"], "device-state", None);
}

#[test]
fn a_destination_that_is_killed_in_mid_restore_keeps_every_promise() {
    moves(&["--kill"], "requests", Some("in mid-restore"));
}

#[test]
fn a_destination_that_is_killed_after_a_load_keeps_every_promise() {
    let way = ["--via", "device-state", "--kill=mid-restore"];
    moves(&way, "device-state", Some("in mid-restore"));
}

#[test]
fn a_destination_that_is_killed_before_the_offsets_are_confirmed_keeps_every_promise() {
    let killed = Some("before the offsets are confirmed");
    moves(&["--kill=armed"], "requests", killed);
    moves(
        &["--via", "device-state", "--kill=armed"],
        "device-state",
        killed,
    );
}

#[test]
fn a_backend_that_fails_fails_the_demo() {
    let output = mock_frontend(&["demo", "--backend", "/bin/false"]);
    let last = stdout(&output).lines().last().expect("a last line");
    assert!(
        last.starts_with("demo: FAILED the source's backend ended"),
        "{last}"
    );
    assert_eq!(output.status.code(), Some(1));

    let output = mock_frontend(&["demo", "--json", "--backend", "/bin/false"]);
    assert_eq!(json(&output)["ok"], false);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_destination_that_comes_back_without_the_vm_fails_the_demo() {
    // Whatever is asked of it, this one keeps its VM nowhere.
    let folder = tempfile::tempdir().expect("a folder");
    let forgetful = folder.path().join("forgetful");
    let program = find_program().expect("a backend");
    let script = format!(
        "for arg; do\n\
         shift\n\
         case $arg in --state-file) skip=1;; *) [ \"$skip\" ] || set -- \"$@\" \"$arg\"; skip=;; esac\n\
         done\n\
         exec '{}' \"$@\"\n",
        program.display()
    );
    write_script(&forgetful, &script);

    let forgetful = forgetful.to_str().expect("a path in UTF-8");
    let output = mock_frontend(&["demo", "--kill", "--seed", "7", "--backend", forgetful]);
    let last = stdout(&output).lines().last().expect("a last line");
    assert!(last.starts_with("demo: FAILED cannot"), "{last}");
    assert!(last.contains("without the VM's state"), "{last}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_backend_that_is_not_there_fails_the_demo() {
    let output = mock_frontend(&["demo", "--backend", "/nowhere/vhost-user-timer"]);
    let last = stdout(&output).lines().last().expect("a last line");
    assert!(last.contains("/nowhere/vhost-user-timer"), "{last}");
    assert_eq!(output.status.code(), Some(1));
}
