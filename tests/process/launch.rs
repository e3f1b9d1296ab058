//! The program as its launcher sees it: options, sockets, signals and exit codes (QEMU,
//! docs/interop/vhost-user.rst, "Backend program conventions").

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;
use vhost::VhostBackend;
use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_kit::backend_process::{BackendProcess, exit_within, find_program};
use vhost_user_timer_kit::contract::{Client, VM, op, phase, request, status};
use vhost_user_timer_kit::raw_driver::{
    Control, Driver, Layout, Memory, PATIENCE, REGION_GPA, REGION_SIZE, REGION_VA, Rig, Ring,
    Setup, fd_of, header,
};

/// Runs the program to its end, with nothing on its standard input.
fn run(args: &[&str]) -> Output {
    run_with(args, Stdio::null())
}

pub(crate) fn run_with(args: &[&str], stdin: Stdio) -> Output {
    let mut command = Command::new(find_program().unwrap());
    ends(command.args(args).stdin(stdin))
}

/// What a program writes until it ends, which it must do by itself.
#[track_caller]
pub(crate) fn ends(command: &mut Command) -> Output {
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // What it inherited is its own alone.
    command.stdin(Stdio::null());
    let ended = exit_within(&mut child, PATIENCE).is_some();
    let _ = child.kill();
    let output = child.wait_with_output().unwrap();
    assert!(ended, "{command:?} does not end");
    output
}

pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn binding() -> Rig {
    Rig::watch(BackendProcess::launch_binding::<&str>(&[]).unwrap())
}

/// Checks that the program exits with 1. Returns its message.
#[track_caller]
pub(crate) fn fails(args: &[&str], stdin: Stdio, why: &str) {
    let output = run_with(args, stdin);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
    assert!(said.contains(why), "{args:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn version_and_help_are_told_on_stdout() {
    let version = run(&["--version"]);
    assert_eq!(version.status.code(), Some(0));
    let wanted = format!("vhost-user-timer {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(text(&version.stdout), wanted);
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for option in [
        "--socket-path",
        "--fd",
        "--rtc-socket-path",
        "--rtc-fd",
        "--rtc-clock",
        "--rtc-counter-offset",
        "--print-capabilities",
        "--max-vcpus",
        "--request-queues",
        "--counter-frequency",
        "--counter-source",
    ] {
        assert!(text(&help.stdout).contains(option), "{option}");
    }
}

#[test]
fn a_wrong_command_line_is_2_and_a_message_that_names_the_option() {
    for (args, named) in [
        (&[][..], "--socket-path"),
        (&["--socket-path=/tmp/x", "--fd=0"], "--fd"),
        (&["--socket-path=/tmp/x", "--max-vcpus=0"], "--max-vcpus"),
        (&["--socket-path=/tmp/x", "--max-vcpus=4097"], "--max-vcpus"),
        (
            &["--socket-path=/tmp/x", "--request-queues=0"],
            "--request-queues",
        ),
        (
            &["--socket-path=/tmp/x", "--request-queues=17"],
            "--request-queues",
        ),
        (
            &["--socket-path=/tmp/x", "--counter-frequency=0"],
            "--counter-frequency",
        ),
        (
            &["--socket-path=/tmp/x", "--counter-source=sundial"],
            "--counter-source",
        ),
        (&["--socket-path=/tmp/x", "--log-level=loud"], "--log-level"),
        (&["--rtc-socket-path=/tmp/x", "--rtc-fd=0"], "--rtc-fd"),
        (&["--rtc-fd=-1"], "--rtc-fd"),
        (&["--rtc-fd=0", "--rtc-clock=sundial"], "--rtc-clock"),
        (
            &["--rtc-fd=0", "--rtc-counter-offset=-1"],
            "--rtc-counter-offset",
        ),
        (&["--fd=-1"], "--fd"),
        (&["--fd=three"], "--fd"),
        (&["--no-such-option"], "--no-such-option"),
        (&["--socket-path=/tmp/x", "stray"], "stray"),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(text(&output.stderr).contains(named), "{args:?}");
        assert_eq!(text(&output.stdout), "");
    }
}

#[test]
fn a_signal_ends_it_at_once_with_0_and_the_socket_is_gone() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut rig = binding();
        let path = rig.backend.socket_path().to_owned();
        assert!(path.exists());
        rig.backend.signal(signal);
        assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
        assert!(!path.exists());
    }
}

#[test]
fn a_signal_ends_it_with_a_frontend_connected_and_requests_held() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut rig = binding();
        let path = rig.backend.socket_path().to_owned();
        let mut client = Client::connect(&rig);
        client.configure(3);
        client.restore_begin(3, 0);
        for vcpu in 0..3 {
            client.wait_run(1, vcpu);
        }
        client.settle();
        // And another one that waits for its turn.
        let _next = rig.stream();
        rig.backend.signal(signal);
        assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
        assert!(!path.exists());
        assert!(client.driver.control.get_features().is_err());
    }
}

#[test]
fn a_signal_ends_it_in_the_middle_of_a_message() {
    let mut rig = binding();
    let control = Control::over(rig.stream());
    control.send(&header(1, false, 0)[..5], &[]).unwrap();
    assert_eq!(rig.backend.terminate().code(), Some(0));
}

#[test]
fn a_listening_descriptor_serves_one_frontend_after_the_other_and_its_path_stays() {
    let mut rig = Rig::launch(&[]);
    let path = rig.backend.socket_path().to_owned();
    let mut client = Client::connect(&rig);
    client.configure(2);
    drop(client);
    for _ in 0..3 {
        assert_eq!(Client::connect(&rig).info().vcpus, 2);
    }
    assert_eq!(rig.backend.terminate().code(), Some(0));
    assert!(path.exists(), "the process that bound it removes it");
}

#[test]
fn a_listening_descriptor_may_be_non_blocking() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut child = Command::new(find_program().unwrap())
        .args(["--fd=0", "--log-level=off"])
        .stdin(OwnedFd::from(listener))
        .spawn()
        .unwrap();
    let mut client = Client::over(UnixStream::connect(&path).unwrap());
    client.configure(1);
    drop(client);
    child.kill().unwrap();
    child.wait().unwrap();
}

fn connected() -> (Rig, UnixStream) {
    let (backend, stream) = BackendProcess::launch_connected::<&str>(&[]).unwrap();
    (Rig::watch(backend), stream)
}

#[test]
fn a_connected_descriptor_is_served_in_full_and_its_end_is_the_programs() {
    let (mut rig, stream) = connected();
    let mut client = Client::over(stream);
    client.configure(2);
    client.post_event_buffer();
    // Queues are served in no fixed order: the event is read before the phase changes again.
    assert_eq!(client.event().what().2, phase::PAUSED);
    client.restore_begin(2, 1);
    for vcpu in 0..2 {
        client.bring(vcpu, 9);
    }
    client.restore_done(0);
    let head = client.wait_run(1, 1);
    let done = request(op::RESTORE_DONE, 1, 0, &[]);
    let done = client.driver.submit(1, &done, 24, &Layout::plain());
    let answers = client.all_released(1, &[head, done]);
    assert_eq!(answers[0].status, status::OK);
    drop(client);
    assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_connected_descriptor_takes_memory_by_add_mem_reg_too() {
    let (mut rig, stream) = connected();
    let setup = Setup {
        add_mem_reg: true,
        ..Setup::default()
    };
    let mut client = Client::new(Driver::over(stream, setup));
    client.configure(1);
    drop(client);
    assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_signal_ends_it_on_a_connected_descriptor_too() {
    let (mut rig, stream) = connected();
    let mut client = Client::over(stream);
    client.configure(1);
    client.wait_run(1, 0);
    assert_eq!(rig.backend.terminate().code(), Some(0));
}

#[test]
fn a_connected_descriptor_whose_peer_is_gone_already_is_a_quiet_end() {
    let (mut rig, stream) = connected();
    drop(stream);
    assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
}

/// All messages that set a connection up, without waiting for answers: those with and without
/// descriptors directly after each other, as QEMU sends them.
fn pipelined(stream: UnixStream) {
    let mut control = Control::over(stream);
    let mut memory = Memory::new();
    let mut ring = Ring::new(1, 64, false);
    let word = |index: u32, value: u32| (u64::from(value) << 32 | u64::from(index)).to_le_bytes();
    let region: Vec<u8> = [1, REGION_GPA, REGION_SIZE, REGION_VA, 0]
        .iter()
        .flat_map(|word: &u64| word.to_le_bytes())
        .collect();
    let config = ring.config();
    let addresses: Vec<u8> = [
        1,
        config.desc_table_addr,
        config.used_ring_addr,
        config.avail_ring_addr,
        0,
    ]
    .iter()
    .flat_map(|word| word.to_le_bytes())
    .collect();
    let send = |code, body: &[u8]| control.message(code, false, body, &[]).unwrap();
    send(3, &[]);
    send(2, &(1u64 << 32).to_le_bytes());
    let file = memory.file().as_fd();
    control.message(5, false, &region, &[file]).unwrap();
    send(8, &word(1, 64));
    send(10, &word(1, 0));
    send(9, &addresses);
    let (kick, call) = (fd_of(ring.kick_fd()), fd_of(ring.call()));
    let one = 1u64.to_le_bytes();
    control.message(13, false, &one, &[call]).unwrap();
    control.message(12, false, &one, &[kick]).unwrap();
    send(1, &[]);
    assert_eq!(control.reply().unwrap().0, 1);
    let info = request(op::GET_INFO, VM, 0, &[]);
    ring.add(&mut memory, &info, 80, &Layout::plain());
    ring.kick(&memory);
    let used = ring.wait(&mut memory, PATIENCE).expect("an answer");
    assert_eq!(used.len, 80);
}

#[test]
fn messages_right_behind_each_other_are_taken_apart() {
    let rig = Rig::launch(&[]);
    for _ in 0..50 {
        pipelined(rig.stream());
    }
}

#[test]
fn messages_right_behind_each_other_are_taken_apart_on_a_connected_descriptor() {
    for _ in 0..20 {
        let (_rig, stream) = connected();
        pipelined(stream);
    }
}

#[test]
fn a_stale_socket_is_replaced() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    // A child that another thread starts may have the socket as well, for a moment.
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
    drop(listener);
    assert!(path.exists());
    let mut child = Command::new(find_program().unwrap())
        .arg("--socket-path")
        .arg(&path)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until_ready(&mut child);
    let mut client = Client::over(UnixStream::connect(&path).unwrap());
    client.configure(1);
    child.kill().unwrap();
    child.wait().unwrap();
}

fn wait_until_ready(child: &mut std::process::Child) {
    use std::io::{BufRead, BufReader};
    let stderr = child.stderr.take().unwrap();
    let ready = BufReader::new(stderr)
        .lines()
        .any(|line| line.unwrap().contains("Ready for a frontend"));
    assert!(ready);
}

#[test]
fn a_socket_at_which_another_process_listens_is_refused_and_left_alone() {
    let rig = binding();
    let path = rig.backend.socket_path().to_str().unwrap();
    let option = format!("--socket-path={path}");
    fails(&[&option], Stdio::null(), "another process listens");
    // The other one still listens, and is served.
    let mut client = Client::connect(&rig);
    client.configure(1);
    fails(&[&option], Stdio::null(), "another process listens");
    assert_eq!(client.info().vcpus, 1);
}

#[test]
fn without_a_state_file_the_default_counter_is_what_a_guests_counter_is_an_offset_of() {
    let rig = Rig::launch(&["--counter-source=auto"]);
    let mut client = Client::connect(&rig);
    let counter = HostCounter::open(if cfg!(target_arch = "aarch64") {
        Source::Cntvct
    } else {
        Source::Monotonic
    });
    let counter = counter.unwrap();
    let frequency = counter.native_frequency();
    let before = counter.read(frequency);
    let info = client.info();
    let after = counter.read(frequency);
    assert_eq!(info.frequency, frequency);
    assert!((before..=after).contains(&info.host_count));
}

#[test]
fn with_logging_off_nothing_is_said() {
    let mut rig = Rig::launch(&["--log-level=off"]);
    let mut client = Client::connect(&rig);
    client.configure(1);
    client.driver.call(1, &[1], 3, &Layout::plain());
    drop(client);
    assert_eq!(rig.backend.terminate().code(), Some(0));
    assert_eq!(rig.backend.log(), "");
}
