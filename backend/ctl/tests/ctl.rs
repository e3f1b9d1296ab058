//! `vhost-user-timer-ctl` as a program, against a running backend: what it prints, and how it
//! exits.

use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use vhost_user_timer_frontend::{Frontend, Options, RegValue};
use vhost_user_timer_kit::backend_process::BackendProcess;
use vhost_user_timer_kit::confirming::{CONFIRM, ONE_OFFSET};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_protocol::wire::ctl;
use vhost_user_timer_protocol::{Abi, Register};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-timer-ctl"));
    command.args(args);
    command
}

fn run(args: &[&str]) -> Output {
    command(args).output().expect("vhost-user-timer-ctl runs")
}

/// Only a failure takes this long.
const LIMIT: Duration = Duration::from_secs(30);
const PATIENCE: &str = "--timeout=30";

fn show(what: &str, socket: &Path, more: &[&str]) -> Output {
    let socket = socket.to_str().expect("a path in UTF-8");
    let mut args = [&[what, "--socket-path", socket], more].concat();
    if !more.iter().any(|arg| arg.starts_with("--timeout")) {
        args.push(PATIENCE);
    }
    run(&args)
}

fn stdout(output: &Output) -> &str {
    str::from_utf8(&output.stdout).expect("UTF-8")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// Asserts that the program failed, printed nothing on stdout, and said this on stderr.
fn assert_fails(output: &Output, text: &str) {
    let stderr = str::from_utf8(&output.stderr).expect("UTF-8");
    assert!(stderr.starts_with("vhost-user-timer-ctl: "), "{stderr}");
    assert!(stderr.contains(text), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert_eq!(stdout(output), "");
    assert_eq!(output.status.code(), Some(1));
}

/// Configures three vCPUs, and arms both timers of vCPU 1.
fn configure(socket: &Path) {
    let options = Options::default().timeout(LIMIT);
    let frontend = Frontend::connect(socket, options).expect("a connection");
    let queue = frontend.queue();
    queue
        .configure(3, Abi::Arm64, NonZeroU64::new(1_000_000_000), LIMIT)
        .unwrap();
    let id = |register: Register| register.id(Abi::Arm64);
    let armed = [
        (id(Register::TimerCtl), ctl::ENABLE),
        (id(Register::TimerCval), 0xabcd),
        (id(Register::PtimerCtl), ctl::ENABLE | ctl::IMASK),
        (id(Register::PtimerCval), 1),
    ]
    .map(|(id, value)| RegValue::new(id, value));
    queue.set_regs(1, &armed, LIMIT).unwrap();
}

#[test]
fn info_shows_a_vm_that_is_not_configured_yet() {
    let backend = BackendProcess::launch(&["--max-vcpus=4"]).expect("a backend");
    let output = show("info", backend.socket_path(), &["--json"]);
    let info = json(&output);
    assert_eq!((&info["phase"], &info["vcpus"]), (&"NEW".into(), &0.into()));
    assert_eq!((&info["max_vcpus"], &info["epoch"]), (&4.into(), &1.into()));
    assert_eq!(info["cntvoff"], "0x0");
    assert_eq!(info["counter_source"], "monotonic");
    assert_eq!(
        (&info["confirm"], &info["one_offset"]),
        (&false.into(), &false.into())
    );
    assert!(output.status.success());
    assert_eq!(output.stderr, b"");
}

#[test]
fn info_as_text_has_a_line_for_each_value() {
    let backend = BackendProcess::launch(&["--max-vcpus=4"]).expect("a backend");
    configure(backend.socket_path());
    let output = show("info", backend.socket_path(), &[]);
    let text = stdout(&output);
    for line in [
        "phase           PAUSED",
        "epoch           1",
        "vCPUs           3 of at most 4",
        "request queues  1",
        "frequency       1,000,000,000 Hz",
        "host counter    monotonic",
        "flags           none",
    ] {
        assert!(text.lines().any(|printed| printed == line), "{text}");
    }
    assert!(output.status.success());
}

#[test]
fn an_armed_vm_is_shown_with_what_it_waits_for_and_its_flags() {
    let backend = BackendProcess::launch(&["--max-vcpus=4"]).expect("a backend");
    let path = backend.socket_path();
    let mut client = Client::over(UnixStream::connect(path).expect("a connection"));
    assert_eq!(client.configure_flags(2, CONFIRM | ONE_OFFSET), (0, 0));
    let armed = client.resume();
    drop(client);
    let text = show("info", path, &[]);
    for line in [
        "phase           ARMED: waits for the VMM's CONFIRM_RUN",
        "flags           physical count virtualised, confirm, one offset",
    ] {
        let text = stdout(&text);
        assert!(text.lines().any(|printed| printed == line), "{text}");
    }
    let info = json(&show("info", path, &["--json"]));
    assert_eq!(info["phase"], "ARMED");
    assert_eq!(
        (&info["confirm"], &info["one_offset"]),
        (&true.into(), &true.into())
    );
    for (name, offset) in [("cntvoff", armed.cntvoff), ("cntpoff", armed.cntpoff)] {
        assert_eq!(info[name], format!("{offset:#x}"));
    }
}

#[test]
fn dump_shows_every_vcpus_timers() {
    let backend = BackendProcess::launch(&["--max-vcpus=4"]).expect("a backend");
    let path = backend.socket_path();
    configure(path);

    let dump = json(&show("dump", path, &["--json"]));
    assert_eq!(dump["vm"]["phase"], "PAUSED");
    assert_eq!(dump["virt_count"], "0x0");
    assert_eq!(dump["vcpu"].as_array().map(Vec::len), Some(3));
    assert_eq!(dump["vcpu"][1]["virtual"]["cval"], "0xabcd");
    assert_eq!(dump["vcpu"][1]["physical"]["ctl"], "0x7");

    let table = show("dump", path, &[]);
    let rows: Vec<Vec<_>> = (stdout(&table).lines().rev().take(3))
        .map(|row| row.split_whitespace().collect())
        .collect();
    let row = ["1", "armed", "abcd", "masked,", "due", "1"];
    assert_eq!(rows[1], row, "{}", stdout(&table));
    assert_eq!(rows[0], ["2", "off", "0", "off", "0"]);
}

#[test]
fn reading_changes_nothing() {
    let backend = BackendProcess::launch(&["--max-vcpus=4"]).expect("a backend");
    let path = backend.socket_path();
    configure(path);
    // A paused VM's virtual count stands still; its physical count goes on.
    let frozen = || {
        let dump = json(&show("dump", path, &["--json"]));
        let timers: Vec<_> = (dump["vcpu"].as_array().expect("vCPUs").iter())
            .map(|vcpu| vcpu["virtual"].clone())
            .collect();
        let vm = ["phase", "epoch", "vcpus", "restored"].map(|name| dump["vm"][name].clone());
        (vm, dump["virt_count"].clone(), timers)
    };
    let before = frozen();
    show("info", path, &[]);
    assert_eq!(frozen(), before);
}

#[test]
fn there_is_nothing_to_dump_before_the_vm_is_configured() {
    let backend = BackendProcess::launch(&["--max-vcpus=4"]).expect("a backend");
    let output = show("dump", backend.socket_path(), &[]);
    assert_fails(&output, "not configured yet");
}

#[test]
fn a_backend_that_serves_another_frontend_is_said_to_be_busy() {
    let backend = BackendProcess::launch(&["--max-vcpus=1"]).expect("a backend");
    let path = backend.socket_path();
    let options = Options::default().timeout(LIMIT);
    let _vmm = Frontend::connect(path, options).expect("a connection");
    let output = show("info", path, &["--timeout", "0.2"]);
    assert_fails(&output, "one frontend at a time");
}

#[test]
fn a_socket_that_is_not_there_is_named() {
    let output = show("info", Path::new("/nowhere/timer.sock"), &[]);
    let why = "vhost-user-timer-ctl: cannot connect to the backend at /nowhere/timer.sock: No such \
               file or directory (os error 2)\n";
    assert_fails(&output, why);
}

#[test]
fn a_timeout_out_of_range_is_refused() {
    for timeout in ["0", "-1", "3601", "NaN", "soon"] {
        let timeout = format!("--timeout={timeout}");
        let output = show("info", Path::new("/nowhere/timer.sock"), &[&timeout]);
        assert_eq!(output.status.code(), Some(2), "{timeout}");
    }
}

#[test]
fn a_reader_that_closes_the_pipe_is_not_a_failure() {
    let backend = BackendProcess::launch(&["--max-vcpus=1"]).expect("a backend");
    let socket = backend.socket_path().to_str().expect("a path in UTF-8");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = command(&["info", PATIENCE, "--socket-path", socket])
        .stdout(Stdio::from(writer))
        .output()
        .expect("vhost-user-timer-ctl runs");
    assert_eq!(output.stderr, b"");
    assert!(output.status.success());
}

/// A descriptor that takes nothing.
fn full() -> Stdio {
    let device = std::fs::File::options().write(true).open("/dev/full");
    device.expect("/dev/full").into()
}

#[test]
fn what_cannot_be_printed_is_a_failure_and_no_abort() {
    let backend = BackendProcess::launch(&["--max-vcpus=1"]).expect("a backend");
    let socket = backend.socket_path().to_str().expect("a path in UTF-8");
    for args in [
        &["info", PATIENCE, "--socket-path", socket][..],
        &["info", PATIENCE, "--json", "--socket-path", socket],
        &["--help"],
        &["--version"],
    ] {
        let output = command(args).stdout(full()).output().expect("an output");
        assert_fails(
            &output,
            "printing to stdout failed: No space left on device",
        );
    }
    // Nor is the reason.
    let nowhere = ["info", "--socket-path", "/nowhere/timer.sock"];
    for (args, code) in [(&nowhere[..], 1), (&["--no-such-option"], 2)] {
        let status = command(args).stderr(full()).status().expect("a status");
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}
