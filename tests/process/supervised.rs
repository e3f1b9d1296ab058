//! The program under a service manager: sockets that it is passed (sd_listen_fds(3)), and what it
//! reports (sd_notify(3)).

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use vhost_user_timer_frontend::{Frontend, Options};
use vhost_user_timer_kit::backend_process::{Devices, Launch, find_program};
use vhost_user_timer_kit::clock_driver::ClockDriver;
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::{PATIENCE, Rig};

/// Runs the program with these sockets as descriptors 3 and 4, as a service manager does.
struct Activated {
    child: Child,
    directory: TempDir,
}

impl Activated {
    /// With a socket at "first" and one at "second", and these names for them.
    fn start(names: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = |name| UnixListener::bind(directory.path().join(name)).unwrap();
        let script = "export LISTEN_PID=$$; exec \"$0\" \"$@\" 3<&0 4<&1 </dev/null >/dev/null";
        let child = Command::new("sh")
            .args(["-c", script])
            .arg(find_program().unwrap())
            .arg("--counter-source=monotonic")
            .envs([("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", names)])
            .stdin(OwnedFd::from(socket("first")))
            .stdout(OwnedFd::from(socket("second")))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Activated { child, directory }
    }

    fn serves(&self, timer: &str, clock: &str) {
        let path = |name| self.directory.path().join(name);
        let options = Options::default().timeout(PATIENCE);
        let frontend = Frontend::connect(path(timer), options).unwrap();
        frontend.queue().info(PATIENCE).unwrap();
        let clock = UnixStream::connect(path(clock)).unwrap();
        ClockDriver::over(clock, ClockDriver::setup()).reads_the_hosts(0);
    }
}

impl Drop for Activated {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn sockets_that_are_passed_are_served_by_their_names() {
    Activated::start("timer:clock").serves("first", "second");
    Activated::start("clock:timer").serves("second", "first");
}

/// Runs the program to its end with these variables, as the process that they are meant for.
fn run(variables: &[(&str, &str)], args: &[&str]) -> Output {
    let script = "export LISTEN_PID=$$; exec \"$0\" \"$@\" 3</dev/null";
    Command::new("sh")
        .args(["-c", script])
        .arg(find_program().unwrap())
        .args(args)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn without_any_socket_the_error_names_both_ways_to_have_one() {
    for variables in [&[][..], &[("LISTEN_FDS", "0")]] {
        let output = run(variables, &[]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        for way in ["--socket-path", "--fd", "LISTEN_FDS"] {
            assert!(said.contains(way), "{said}");
        }
    }
}

#[test]
fn sockets_that_are_passed_to_another_process_are_ignored_and_the_error_says_so() {
    for (variable, whose) in [
        (None, "LISTEN_PID is not set"),
        (Some(("LISTEN_PID", "1")), "LISTEN_PID=1"),
    ] {
        let output = Command::new(find_program().unwrap())
            .env("LISTEN_FDS", "1")
            .env_remove("LISTEN_PID")
            .envs(variable)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("\nLISTEN_FDS=1 is ignored: "), "{said}");
        assert!(said.contains(&format!(", and {whose}\n")), "{said}");
    }
}

#[test]
fn sockets_that_cannot_be_served_as_passed_are_an_error_that_says_why() {
    let two = [("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "timer:other")];
    let clock = [("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "clock")];
    let one = [("LISTEN_FDS", "1")];
    for (code, variables, args, why) in [
        (1, &[("LISTEN_FDS", "many")][..], &[][..], "\"many\""),
        (1, &two[..1], &[], "FileDescriptorName"),
        (1, &two, &[], "timer:other"),
        (1, &one, &[], "3: not a Unix stream socket"),
        (2, &one, &["--socket-path=/x"], "leave one of them out"),
        (2, &clock, &["--rtc-fd=0"], "leave one of them out"),
        (2, &clock, &["--fd=3"], "the same descriptor"),
    ] {
        let output = run(variables, args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{variables:?}: {said}");
        assert!(said.contains(why), "{variables:?}: {said}");
    }
}

/// A service manager's end of notifications.
struct Manager {
    socket: UnixDatagram,
    directory: TempDir,
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Manager { socket, directory }
    }

    fn address(&self) -> String {
        self.directory.path().join("notify").display().to_string()
    }

    /// Starts a backend of these devices that notifies this manager.
    fn launch(&self, devices: Devices, variables: &str) -> Rig {
        launch(&self.address(), devices, variables)
    }

    fn next(&self) -> String {
        next(&self.socket)
    }
}

fn next(socket: &UnixDatagram) -> String {
    let mut bytes = [0; 512];
    let length = receive(socket, &mut bytes).expect("a notification");
    String::from_utf8(bytes[..length].to_vec()).unwrap()
}

/// Receives, also where a signal interrupts that: recv(2) with a time-out is not restarted.
fn receive(socket: &UnixDatagram, bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.recv(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => return received,
        }
    }
}

/// Starts a backend with this `NOTIFY_SOCKET`.
fn launch(address: &str, devices: Devices, variables: &str) -> Rig {
    let script = format!("export NOTIFY_SOCKET='{address}' {variables}; exec \"$@\"");
    let launch = Launch::new(&find_program().unwrap(), devices).script(&script);
    Rig::watch(launch.start().unwrap())
}

#[test]
fn the_manager_is_told_of_readiness_of_each_change_and_of_the_end() {
    let manager = Manager::new();
    let mut rig = manager.launch(Devices::TimerAndClock, "");
    assert_eq!(
        manager.next(),
        "READY=1\nSTATUS=No VM yet; no frontend connected"
    );
    let mut client = Client::connect(&rig);
    assert_eq!(manager.next(), "STATUS=No VM yet; connected: timer");
    client.configure(2);
    assert_eq!(
        manager.next(),
        "STATUS=VM PAUSED, 2 vCPUs, epoch 1; connected: timer"
    );
    let clock = ClockDriver::connect(&rig);
    assert_eq!(
        manager.next(),
        "STATUS=VM PAUSED, 2 vCPUs, epoch 1; connected: timer, clock"
    );
    drop(client);
    assert_eq!(
        manager.next(),
        "STATUS=VM PAUSED, 2 vCPUs, epoch 1; connected: clock"
    );
    rig.backend.signal(Signal::TERM);
    assert_eq!(manager.next(), "STOPPING=1");
    assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
    drop(clock);
}

#[test]
fn an_open_restore_is_reported_as_it_progresses() {
    let manager = Manager::new();
    let rig = manager.launch(Devices::Timer, "");
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.restore_begin(2, 0);
    // What of the status before it is sent depends on which thread is faster.
    let wait_for = |restored| {
        let wanted = format!(
            "STATUS=VM RESTORING, {restored} of 2 vCPUs restored, epoch 2; connected: timer"
        );
        while manager.next() != wanted {}
    };
    wait_for(0);
    client.bring(1, 1_000);
    client.restore_done(1);
    wait_for(1);
}

#[test]
fn the_managers_address_can_be_an_abstract_name() {
    let name = format!("vhost-user-timer-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let socket = UnixDatagram::bind_addr(&address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let _rig = launch(&format!("@{name}"), Devices::Timer, "");
    assert!(next(&socket).starts_with("READY=1\n"));
}

#[test]
fn a_start_that_fails_is_not_reported_as_ready() {
    let manager = Manager::new();
    let output = Command::new(find_program().unwrap())
        .arg("--socket-path=/nowhere/at/all")
        .env("NOTIFY_SOCKET", manager.address())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    manager.socket.set_nonblocking(true).unwrap();
    let nothing = manager.socket.recv(&mut [0; 64]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
}

/// Fills the manager's queue, until a message more would wait.
fn fill(address: &Path) {
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    let full = loop {
        if let Err(error) = sender.send_to(b"STATUS=noise", address) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_manager_that_does_not_read_delays_nobody_and_has_the_newest_status_when_it_reads() {
    let manager = Manager::new();
    fill(Path::new(&manager.address()));
    let mut rig = manager.launch(Devices::Timer, "");
    Client::connect(&rig).configure(1);
    rig.log_with("disconnected");
    // It has no earlier status in hand, but waits until it can send the newest.
    assert!(rig.comes_to_rest());
    // Nothing comes between: READY is not lost, and earlier statuses are.
    let told = loop {
        let message = manager.next();
        if message != "STATUS=noise" {
            break message;
        }
    };
    assert!(
        told.starts_with("READY=1\nSTATUS=VM PAUSED, 1 vCPU"),
        "{told}"
    );
    fill(Path::new(&manager.address()));
    rig.backend.signal(Signal::TERM);
    assert_eq!(rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn the_watchdog_hears_from_a_process_that_lives_and_not_from_one_that_hangs() {
    let manager = Manager::new();
    let mut rig = manager.launch(Devices::Timer, "WATCHDOG_USEC=100000");
    assert!(manager.next().starts_with("READY=1\n"));
    for _ in 0..3 {
        assert_eq!(manager.next(), "WATCHDOG=1");
    }
    rig.backend.signal(Signal::STOP);
    let stat = format!("/proc/{}/stat", rig.backend.pid());
    while !std::fs::read_to_string(&stat).unwrap().contains(") T ") {
        std::thread::yield_now();
    }
    manager.socket.set_nonblocking(true).unwrap();
    while receive(&manager.socket, &mut [0; 64]).is_ok() {}
    // Several times as long as it would take.
    let limit = Some(Duration::from_millis(500));
    manager.socket.set_nonblocking(false).unwrap();
    manager.socket.set_read_timeout(limit).unwrap();
    let silence = receive(&manager.socket, &mut [0; 64]).unwrap_err();
    assert_eq!(silence.kind(), ErrorKind::WouldBlock);
}

#[test]
fn an_address_that_is_none_is_logged_and_the_frontends_are_served() {
    let rig = launch("vsock:2:1", Devices::Timer, "");
    rig.log_with("The service manager is not notified");
    Client::connect(&rig).configure(1);
}

#[test]
fn a_manager_that_is_not_there_is_logged_once_and_the_frontends_are_served() {
    let rig = launch("/nowhere/notify", Devices::Timer, "");
    let failed = "Notifying the service manager (NOTIFY_SOCKET) failed: No such file or directory";
    let log = rig.log_with(failed);
    let line = log.lines().find(|line| line.contains(failed)).unwrap();
    assert!(line.contains("Z WARN  "), "{line}");
    Client::connect(&rig).configure(1);
    rig.log_with("disconnected");
    assert_eq!(rig.said(failed), 1);
}

#[test]
fn a_watchdog_that_is_another_processs_is_not_fed() {
    let manager = Manager::new();
    let rig = manager.launch(Devices::Timer, "WATCHDOG_USEC=1000 WATCHDOG_PID=1");
    assert!(manager.next().starts_with("READY=1\n"));
    drop(Client::connect(&rig));
    assert_eq!(manager.next(), "STATUS=No VM yet; connected: timer");
    assert_eq!(manager.next(), "STATUS=No VM yet; no frontend connected");
}
