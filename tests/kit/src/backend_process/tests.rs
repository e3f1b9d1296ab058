use super::*;
use std::num::NonZeroU64;

use vhost_user_timer_frontend::{Error, Frontend, Options};
use vhost_user_timer_protocol::{Abi, Phase};

fn options() -> Options {
    Options::default().timeout(GRACE)
}

fn phase(frontend: Result<Frontend, Error>) -> Phase {
    frontend.and_then(|f| f.config()).expect("an answer").phase
}

#[test]
fn a_launched_backend_serves_at_once_and_ends_well_on_sigterm() {
    let mut backend = BackendProcess::launch(&["--max-vcpus=1"]).unwrap();
    let frontend = Frontend::connect(backend.socket_path(), options());
    assert_eq!(phase(frontend), Phase::New);
    assert!(backend.try_wait().unwrap().is_none());
    assert!(backend.terminate().success(), "{}", backend.log());
}

#[test]
fn a_backend_that_binds_its_socket_is_ready_when_launched() {
    let mut backend = BackendProcess::launch_binding(&["--max-vcpus=1"]).unwrap();
    let frontend = Frontend::connect(backend.socket_path(), options());
    assert_eq!(phase(frontend), Phase::New);
    assert!(backend.terminate().success(), "{}", backend.log());
}

#[test]
fn a_backend_is_ready_when_each_of_its_sockets_is() {
    for devices in [Devices::Clock, Devices::TimerAndClock] {
        let program = find_program().unwrap();
        let mut backend =
            BackendProcess::launch_devices(&program, devices, &["--max-vcpus=1"]).unwrap();
        assert!(backend.clock_path().exists());
        let timer = backend.socket_path().exists();
        assert_eq!(timer, devices == Devices::TimerAndClock);
        assert!(backend.terminate().success(), "{}", backend.log());
    }
}

#[test]
fn a_relaunched_backend_has_the_vm_of_the_one_that_was_killed() {
    let program = find_program().unwrap();
    let args = ["--max-vcpus=1"];
    let mut backend = BackendProcess::launch_with_state(&program, &args).unwrap();
    let frontend = Frontend::connect(backend.socket_path(), options()).unwrap();
    let queue = frontend.queue();
    queue
        .configure(1, Abi::Arm64, NonZeroU64::new(1_000_000_000), GRACE)
        .unwrap();
    assert_eq!(backend.kill().code(), None);

    backend.relaunch_with_state(&program, &args).unwrap();
    let frontend = Frontend::connect(backend.socket_path(), options());
    assert_eq!(phase(frontend), Phase::Paused);
    assert!(backend.terminate().success(), "{}", backend.log());
}

#[test]
fn the_log_of_a_backend_that_has_ended_is_whole() {
    const END: &str = "Ending on SIGTERM";
    let program = find_program().unwrap();
    let mut backend = BackendProcess::launch_with_state::<&str>(&program, &[]).unwrap();
    for starts in 1..=3 {
        assert_eq!(backend.log().matches(END).count(), starts - 1);
        assert!(backend.terminate().success(), "{}", backend.log());
        assert_eq!(backend.log().matches(END).count(), starts);
        backend.relaunch_with_state::<&str>(&program, &[]).unwrap();
    }
    let again = backend.relaunch_with_state::<&str>(&program, &[]);
    assert!(again.unwrap_err().to_string().contains("still runs"));
}

#[test]
fn a_line_is_not_taken_for_the_next_one_like_it() {
    const LEFT: &str = "The frontend of the timer device disconnected";
    let backend = BackendProcess::launch::<&str>(&[]).unwrap();
    for times in 1..=3 {
        drop(Frontend::connect(backend.socket_path(), options()).unwrap());
        assert_eq!(backend.log_with(LEFT).matches(LEFT).count(), times);
    }
}

#[test]
fn a_backend_that_cannot_get_ready_says_why() {
    let error = BackendProcess::launch_binding(&["--max-vcpus=0"]).unwrap_err();
    assert!(error.to_string().contains("--max-vcpus"), "{error}");
}

#[test]
fn a_backend_on_a_connected_socket_ends_with_its_frontend() {
    let (mut backend, socket) = BackendProcess::launch_connected(&["--max-vcpus=1"]).unwrap();
    let frontend = Frontend::connect(socket, options());
    assert_eq!(phase(frontend), Phase::New);
    assert!(backend.wait(GRACE).success(), "{}", backend.log());
}

#[test]
fn a_dropped_backend_is_gone() {
    let backend = BackendProcess::launch(&["--max-vcpus=1"]).unwrap();
    let (pid, directory) = (backend.pid(), backend.directory().to_owned());
    drop(backend);
    assert!(!directory.exists());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_killed_backend_has_no_exit_code() {
    let mut backend = BackendProcess::launch(&["--max-vcpus=1"]).unwrap();
    assert_eq!(backend.kill().code(), None);
}
