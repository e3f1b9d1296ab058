//! A backend that the library launches: connected by a socket pair, replaced when it is killed,
//! and never left behind.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use vhost_user_timer_frontend::{
    Abi, Backend, Error, InvalidArgument, Options, Phase, Reconnect, SpawnOptions,
};
use vhost_user_timer_kit::backend_process::{find_program, kill_and_wait};

/// Something that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn options() -> SpawnOptions {
    SpawnOptions::default()
        .arg("--log-level=warn")
        .frontend(Options::default().timeout(LIMIT))
}

pub(crate) fn spawn(options: SpawnOptions) -> Result<Backend, Error> {
    Backend::spawn(find_program().unwrap(), options)
}

/// With a state file, and a library that launches the next backend.
pub(crate) fn replaced(directory: &TempDir) -> SpawnOptions {
    let reconnect = Reconnect::default().patience(LIMIT);
    options()
        .state_file(directory.path().join("state"))
        .frontend(Options::default().timeout(LIMIT).reconnect(reconnect))
}

/// Whether the process exists, be it as a zombie.
fn exists(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[test]
fn a_spawned_backend_serves_and_ends_by_itself_when_it_is_closed() {
    let backend = spawn(options()).unwrap();
    let info = backend.frontend().queue().info(LIMIT).unwrap();
    assert_eq!(info.phase, Phase::New);
    let pid = backend.pid().unwrap();
    assert_eq!(backend.exit_status(Duration::ZERO), None);
    let status = backend.close().unwrap().unwrap();
    assert!(status.success(), "{status}");
    assert!(!exists(pid));
}

#[test]
fn a_spawned_backend_does_not_report_to_the_manager_of_the_vmm() {
    let options = options().prepare(|command| {
        let own: Vec<_> = command.get_envs().collect();
        for variable in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"] {
            assert!(own.contains(&(variable.as_ref(), None)), "{own:?}");
        }
    });
    assert!(spawn(options).unwrap().close().unwrap().unwrap().success());
}

#[test]
fn to_drop_a_spawned_backend_kills_it_and_leaves_no_zombie() {
    let backend = spawn(options()).unwrap();
    let queue = backend.frontend().queue().clone();
    let pid = backend.pid().unwrap();
    assert!(exists(pid));
    drop(backend);
    assert!(!exists(pid));
    assert!(matches!(queue.info(LIMIT), Err(Error::ShutDown)));
}

#[test]
fn a_backend_that_ends_before_it_serves_is_an_error_with_its_exit_status() {
    let quiet = |command: &mut std::process::Command| {
        command.stderr(std::process::Stdio::null());
    };
    let error = spawn(options().arg("--max-vcpus=0").prepare(quiet)).unwrap_err();
    let program = find_program().unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "the backend program {} ended before it served, with exit status: 2: its stderr says \
             why",
            program.display()
        )
    );
    assert!(!error.ends_queue());
}

#[test]
fn a_program_that_cannot_be_started_is_an_error_that_names_it() {
    let nowhere = PathBuf::from("/nowhere/vhost-user-timer");
    let error = Backend::spawn(&nowhere, options()).unwrap_err();
    assert!(
        matches!(&error, Error::Spawn { program, .. } if *program == nowhere),
        "{error:?}"
    );
}

#[test]
fn a_spawned_backend_that_is_killed_is_disconnected_and_tells_how_it_ended() {
    let backend = spawn(options()).unwrap();
    kill_and_wait(backend.pid().unwrap());
    let error = backend.frontend().queue().info(LIMIT).unwrap_err();
    assert!(matches!(error, Error::Disconnected), "{error}");
    let status = backend.exit_status(LIMIT).unwrap();
    assert_eq!(status.to_string(), "signal: 9 (SIGKILL)");
    assert_eq!(backend.pid(), None);
}

#[test]
fn a_spawned_backend_that_is_killed_is_replaced_and_the_vm_continues() {
    let directory = TempDir::new().unwrap();
    let backend = spawn(replaced(&directory)).unwrap();
    let queue = backend.frontend().queue();
    queue.configure(3, Abi::Arm64, None, LIMIT).unwrap();
    let resumed = queue.resume(LIMIT).unwrap();
    let mut pids = vec![backend.pid().unwrap()];
    for _ in 0..3 {
        kill_and_wait(*pids.last().unwrap());
        let info = queue.info(LIMIT).unwrap();
        assert_eq!((info.phase, info.vcpus), (Phase::Running, 3));
        assert_eq!(info.cntvoff, resumed.cntvoff);
        pids.push(backend.pid().unwrap());
    }
    drop(backend);
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 4, "each was another process");
    assert!(!pids.into_iter().any(exists));
}

#[test]
fn a_backend_without_a_state_file_cannot_be_replaced() {
    let reconnecting = Options::default().reconnect(Reconnect::default());
    let error = spawn(options().frontend(reconnecting)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::InvalidArgument(InvalidArgument::ReconnectWithoutState)
        ),
        "{error}"
    );
}
