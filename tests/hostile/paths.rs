//! Paths that others use too.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read as _};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use rustix::process::Signal;
use tempfile::TempDir;
use vhost_user_timer_kit::backend_process::{Devices, Launch};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::Rig;
use vhost_user_timer_kit::victim::DEADLINE;

use crate::printing::{ends, program};

/// A backend that was started at a path. Killed and reaped when it is dropped.
struct Starter {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Starter {
    fn at(path: &Path) -> Self {
        let mut command = Command::new(program());
        command.arg("--socket-path").arg(path);
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Starter { child, stderr }
    }

    /// Whether it listens, once that is decided.
    fn listens(&mut self) -> bool {
        let lines = self.stderr.by_ref().lines();
        lines
            .map_while(Result::ok)
            .any(|line| line.contains("Ready for a frontend"))
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A socket on which nobody listens. Nobody ever did: a child that another test starts now has all
/// our descriptors until it executes its program, so a socket that listened might listen on.
fn stale_socket(path: &Path) {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
}

/// A backend that has bound its socket itself.
fn bound() -> Rig {
    let launch = Launch::new(&program(), Devices::Timer);
    Rig::watch(launch.start().expect("a backend"))
}

/// Ends a backend whose socket's path is not its own any more.
#[track_caller]
fn ends_quietly(rig: &mut Rig) -> String {
    rig.backend.signal(Signal::TERM);
    let status = rig.backend.exit_within(DEADLINE).expect("it ends");
    assert_eq!(status.code(), Some(0));
    let log = rig.log_with("Ending on SIGTERM");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    log
}

#[test]
fn a_socket_that_took_the_place_of_the_own_one_is_not_removed() {
    let mut rig = bound();
    let path = rig.backend.socket_path().to_owned();
    fs::remove_file(&path).unwrap();
    let mut other = Starter::at(&path);
    assert!(other.listens());
    ends_quietly(&mut rig);
    let mut client = Client::over(UnixStream::connect(&path).expect("the other one listens"));
    client.configure(1);
}

#[test]
fn a_file_that_took_the_place_of_the_own_socket_is_not_removed() {
    let mut rig = bound();
    let path = rig.backend.socket_path().to_owned();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    ends_quietly(&mut rig);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn a_path_that_is_gone_is_no_warning() {
    let mut rig = bound();
    fs::remove_file(rig.backend.socket_path()).unwrap();
    ends_quietly(&mut rig);
}

#[test]
fn nothing_but_the_socket_is_left_in_the_folder_and_in_the_end_not_even_that() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let names = || {
        let entries = fs::read_dir(folder.path()).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        names.collect::<Vec<_>>()
    };
    let mut starter = Starter::at(&path);
    assert!(starter.listens());
    assert_eq!(names(), ["socket"]);
    let pid = rustix::process::Pid::from_child(&starter.child);
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(starter.child.wait().unwrap().code(), Some(0));
    assert!(names().is_empty());
}

#[test]
fn of_two_that_find_a_stale_socket_one_listens_and_is_reached() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    for round in 0..100 {
        stale_socket(&path);
        let mut starters = [Starter::at(&path), Starter::at(&path)];
        let listening = starters.iter_mut().filter_map(|starter| {
            let listens = starter.listens();
            listens.then_some(starter)
        });
        let listening: Vec<_> = listening.collect();
        assert_eq!(listening.len(), 1, "round {round}");
        let client = Client::over(UnixStream::connect(&path).expect("it is reached"));
        drop(client);
        drop(starters);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_path_at_which_another_process_is_about_to_listen_is_in_use() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    stale_socket(&path);
    let before = fs::symlink_metadata(&path).unwrap().ino();
    // As that process holds it.
    let lock = File::create(folder.path().join("socket.lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let mut starter = Starter::at(&path);
    assert!(!starter.listens());
    assert_eq!(starter.child.wait().unwrap().code(), Some(1));
    assert_eq!(fs::symlink_metadata(&path).unwrap().ino(), before);
    // The lock of one that was killed is none. Closing it here might not end it, as above.
    flock(&lock, FlockOperation::Unlock).unwrap();
    assert!(Starter::at(&path).listens());
}

#[test]
fn a_socket_with_a_full_queue_is_in_use_and_the_start_does_not_wait() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    let mut command = Command::new(program());
    command.arg("--socket-path").arg(&path);
    assert_eq!(ends(command), 1);
    assert!(path.exists());
}
