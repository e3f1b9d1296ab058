//! The frontend library against a backend in another process: what a kill does, and what is left
//! behind.

mod fake;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use fake::{Fake, hold_wait_run, socket_path};
use vhost_user_timer_protocol::frontend::{Call, Deadline, Error, Options, TimerFrontend};

const SOCKET: &str = "TIMER_FRONTEND_TEST_SOCKET";
const LONG: Duration = Duration::from_secs(30);

/// Not a test: the other process.
#[test]
#[ignore = "run by the other tests"]
fn backend() {
    let Some(path) = std::env::var_os(SOCKET) else {
        return;
    };
    let path = PathBuf::from(path);
    loop {
        let serving = fake::serve(Arc::new(Fake::new(hold_wait_run)), &path);
        serving.0.join().unwrap();
    }
}

struct Backend(Child);

impl Backend {
    fn start(path: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "backend", "--ignored"])
            .env(SOCKET, path)
            .spawn()
            .unwrap();
        Backend(child)
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The backend needs a moment to listen, and to listen again.
fn connect(path: &Path) -> TimerFrontend {
    let deadline: Deadline = LONG.into();
    loop {
        match TimerFrontend::connect(path, Options::default()) {
            Ok(frontend) => return frontend,
            Err(error) if deadline.has_passed() => panic!("{error}"),
            Err(_) => std::thread::yield_now(),
        }
    }
}

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// A thread that was joined is still listed for a moment.
fn wait_for_threads(count: usize) {
    let deadline: Deadline = LONG.into();
    while entries("/proc/self/task") != count {
        assert!(!deadline.has_passed(), "a thread is left");
        std::thread::yield_now();
    }
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.contains("memfd:vhost-user-timer"))
        .count()
}

// One test, so that nothing else opens descriptors in this process meanwhile.
#[test]
fn a_killed_backend_ends_the_waits_and_nothing_is_left_behind() {
    let path = socket_path();
    let threads = entries("/proc/self/task");
    let mut backend = Backend::start(&path);
    drop(connect(&path));
    let before = entries("/proc/self/fd");
    for _ in 0..5 {
        let mut frontend = connect(&path);
        let events = frontend.take_events();
        let queue = frontend.queues()[1].clone();
        queue.info(LONG).unwrap();
        assert_eq!(mappings(), 1);
        wait_for_threads(threads);
        frontend.close().unwrap();
        drop((events, queue));
        assert_eq!(mappings(), 0);
        assert_eq!(entries("/proc/self/fd"), before);
    }

    let frontend = connect(&path);
    std::thread::scope(|scope| {
        let waits: Vec<_> = (0..8)
            .map(|vcpu| {
                let queue = frontend.queue_of(vcpu);
                let ticket = queue.submit(&Call::wait_run(vcpu)).unwrap();
                queue.kick();
                scope.spawn(move || ticket.wait(Deadline::NEVER))
            })
            .collect();
        // The backend has taken up the WAIT_RUNs: it answers in order what it does not hold.
        for queue in frontend.queues() {
            queue.info(LONG).unwrap();
        }
        backend.kill();
        for wait in waits {
            assert!(matches!(wait.join().unwrap(), Err(Error::Disconnected)));
        }
    });
    drop(frontend);
    assert_eq!(mappings(), 0);
    assert_eq!(entries("/proc/self/fd"), before);
    let _ = std::fs::remove_file(&path);
}
