//! The process's life: the file with its number, and what ends it but a signal.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;

use vhost_user_timer_kit::backend_process::{BackendProcess, Devices, Launch, find_program};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::{Control, PATIENCE, Rig};

use crate::launch::fails;

fn making(devices: Devices, args: &[&str]) -> Rig {
    let launch = Launch::new(&find_program().unwrap(), devices).args(args);
    Rig::watch(launch.start().unwrap())
}

/// Has a frontend ask for the device's features (GET_FEATURES), which is answered.
#[track_caller]
fn features(frontend: &mut Control) {
    frontend.message(1, false, &[], &[]).unwrap();
    assert_eq!(frontend.reply().unwrap().0, 1);
}

/// A frontend of the clock device that has been served.
fn clock_frontend(stream: UnixStream) -> Control {
    let mut control = Control::over(stream);
    features(&mut control);
    control
}

/// Checks that it ends by itself, with 0, and says why.
#[track_caller]
fn ends(rig: &mut Rig, why: &str) {
    assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
    rig.log_with(&format!("Ending, since {why}\n"));
}

const TERMINATED: &str = "the last frontend disconnected (--terminate)";

#[test]
fn with_terminate_it_ends_with_the_frontend_of_a_path_and_removes_the_socket() {
    let mut rig = making(Devices::Timer, &["--terminate"]);
    let path = rig.backend.socket_path().to_owned();
    Client::connect(&rig).configure(1);
    ends(&mut rig, TERMINATED);
    assert!(!path.exists());
}

#[test]
fn with_terminate_it_ends_with_the_frontend_of_a_listening_descriptor() {
    let mut rig = Rig::launch(&["--terminate"]);
    Client::connect(&rig).configure(1);
    ends(&mut rig, TERMINATED);
}

#[test]
fn with_terminate_and_both_devices_it_ends_when_neither_has_a_frontend() {
    let mut rig = making(Devices::TimerAndClock, &["--terminate"]);
    let clock = clock_frontend(rig.clock_stream());
    for _ in 0..3 {
        Client::connect(&rig).configure(1);
        rig.backend
            .log_with("The frontend of the timer device disconnected");
    }
    let mut client = Client::connect(&rig);
    drop(clock);
    rig.backend
        .log_with("The frontend of the clock device disconnected");
    assert_eq!(client.info().vcpus, 1);
    drop(client);
    ends(&mut rig, TERMINATED);
}

#[test]
fn a_process_that_only_tries_whether_somebody_listens_does_not_end_it() {
    let mut rig = making(Devices::Timer, &["--terminate"]);
    for times in 1..=3 {
        drop(rig.stream());
        let left = "The frontend of the timer device disconnected";
        rig.backend.log_with_times(left, times);
    }
    let path = rig.backend.socket_path().to_str().unwrap().to_owned();
    let option = format!("--socket-path={path}");
    fails(&[&option], Stdio::null(), "another process listens");
    Client::connect(&rig).configure(1);
    ends(&mut rig, TERMINATED);
}

/// A backend whose timer device has one end of a socket pair, and whose clock device listens at the
/// returned path.
fn mixed(folder: &Path, args: &[&str]) -> (Rig, UnixStream, std::path::PathBuf) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let path = folder.join("clock");
    let listener = UnixListener::bind(&path).unwrap();
    let (timer, clock) = (Some(theirs.into()), Some(listener.into()));
    let backend = BackendProcess::launch_on_sockets(timer, clock, args).unwrap();
    (Rig::watch(backend), ours, path)
}

#[test]
fn without_terminate_a_connected_socket_ends_it_also_with_a_frontend_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let (mut rig, ours, path) = mixed(folder.path(), &[]);
    let clock = UnixStream::connect(&path).unwrap();
    let _clock = clock_frontend(clock);
    Client::over(ours).configure(1);
    ends(
        &mut rig,
        "the frontend of each connected socket disconnected",
    );
}

#[test]
fn with_terminate_a_connected_socket_does_not_end_it_while_another_has_a_frontend() {
    let folder = tempfile::tempdir().unwrap();
    let (mut rig, ours, path) = mixed(folder.path(), &["--terminate"]);
    let mut clock = clock_frontend(UnixStream::connect(&path).unwrap());
    Client::over(ours).configure(1);
    rig.backend
        .log_with("The frontend of the timer device disconnected");
    features(&mut clock);
    drop(clock);
    ends(&mut rig, TERMINATED);
}

#[test]
fn the_file_with_its_number_is_there_while_it_is_ready_and_gone_in_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let option = format!("--pid-file={}", file.display());
    let mut rig = making(Devices::TimerAndClock, &[&option]);
    let own = format!("{}\n", rig.backend.pid());
    assert_eq!(fs::read_to_string(&file).unwrap(), own);
    // Another one does not take it.
    let socket = format!("--socket-path={}", folder.path().join("socket").display());
    let why = format!(
        "vhost-user-timer: --pid-file {}: another process has this file, {}; name another file\n",
        file.display(),
        rig.backend.pid()
    );
    fails(&[&socket, &option], Stdio::null(), &why);
    assert!(!folder.path().join("socket").exists());
    assert_eq!(fs::read_to_string(&file).unwrap(), own);
    rig.backend.terminate();
    assert!(!file.exists());
}

#[test]
fn the_file_of_a_process_that_was_killed_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let option = format!("--pid-file={}", file.display());
    let mut rig = making(Devices::Timer, &[&option]);
    rig.backend.kill();
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        format!("{}\n", rig.backend.pid())
    );
    let rig = making(Devices::Timer, &[&option]);
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        format!("{}\n", rig.backend.pid())
    );
}

#[test]
fn a_file_that_cannot_be_written_is_an_error_and_leaves_no_socket() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let args = [
        format!("--socket-path={}", socket.display()),
        "--pid-file=/proc/pid".to_owned(),
    ];
    let why = "vhost-user-timer: --pid-file /proc/pid: writing it failed: No such file or directory \
               (os error 2)\n";
    fails(&[&args[0], &args[1]], Stdio::null(), why);
    assert!(!socket.exists());
}
