//! The frontend library against a backend in another process: what a kill does, and what is left
//! behind.

#[path = "library/fake/mod.rs"]
mod fake;

use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

use fake::{Fake, LONG, hold_wait_run, socket_path};
use vhost_user_timer_frontend::{Deadline, Error, Frontend, Operation, Options, Reconnect};

const SOCKET: &str = "TIMER_FRONTEND_TEST_SOCKET";

/// The tests have no harness, so that nothing else opens descriptors in this process, and so that
/// the other process can be this program too.
fn main() {
    if let Some(path) = std::env::var_os(SOCKET) {
        backend(Path::new(&path));
    }
    println!("running 1 test");
    a_killed_backend_ends_the_waits_and_nothing_is_left_behind();
    println!("test a_killed_backend_ends_the_waits_and_nothing_is_left_behind ... ok");
    println!("test result: ok. 1 passed; 0 failed");
}

/// The other process.
fn backend(path: &Path) -> ! {
    loop {
        let serving = fake::serve(Arc::new(Fake::new(hold_wait_run)), path);
        serving.0.join().unwrap();
    }
}

struct Backend(Child);

impl Backend {
    fn start(path: &Path) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
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

fn connect(path: &Path) -> Frontend {
    connect_with(path, Options::default())
}

/// The backend needs a moment to listen; one that listens again may close the backlog of the
/// listener before.
fn connect_with(path: &Path, options: Options) -> Frontend {
    let deadline: Deadline = LONG.into();
    loop {
        match fake::connect(path, options.clone()) {
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
    wait_for("/proc/self/task", count);
}

/// Returns once a directory has so many entries.
fn wait_for(directory: &str, count: usize) {
    wait_until(directory, || entries(directory) == count);
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline: Deadline = LONG.into();
    while !is_so() {
        assert!(!deadline.has_passed(), "{what} is not as it must be");
        std::thread::yield_now();
    }
}

/// Tells one connection from another: the number of its socket's inode.
fn connection(frontend: &Frontend) -> u64 {
    rustix::fs::fstat(frontend).unwrap().st_ino
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.contains("memfd:vhost-user-timer"))
        .count()
}

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
                let ticket = queue.submit(&Operation::wait_run(vcpu)).unwrap();
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

    over_reconnects(&path, threads);
    assert_eq!(mappings(), 0);
    assert_eq!(entries("/proc/self/fd"), before);
    wait_for_threads(threads);
    let _ = std::fs::remove_file(&path);
}

/// Ten backends are killed, and a hundred connections broken, while vCPUs wait. `threads` are there
/// without them.
fn over_reconnects(path: &Path, threads: usize) {
    let mut backend = Backend::start(path);
    let patient = Reconnect::default()
        .patience(LONG)
        .delays(Duration::from_millis(1), Duration::from_millis(10));
    let frontend = connect_with(path, Options::default().reconnect(patient));
    std::thread::scope(|scope| {
        let waits: Vec<_> = (0..4)
            .map(|vcpu| {
                let ticket = frontend.queue_of(vcpu).submit(&Operation::wait_run(vcpu));
                scope.spawn(|| ticket.unwrap().wait(Deadline::NEVER))
            })
            .collect();
        let _end = fake::EndOfWaits(frontend.shutdown_handle());
        let queues = frontend.queues();
        let all_there = || {
            for queue in queues {
                queue.info(LONG).unwrap();
            }
        };
        all_there();
        let (fds, threads) = (entries("/proc/self/fd"), threads + waits.len());
        for round in 0..110 {
            let lost = connection(&frontend);
            if round % 11 == 0 {
                backend.kill();
                backend = Backend::start(path);
            } else {
                rustix::net::shutdown(&frontend, rustix::net::Shutdown::Both).unwrap();
            }
            // Until then the old backend may answer.
            wait_until("the connection", || connection(&frontend) != lost);
            all_there();
            wait_for("/proc/self/fd", fds);
            assert_eq!(mappings(), 1);
            wait_for_threads(threads);
        }
        frontend.shutdown_handle().shut_down();
        for wait in waits {
            assert!(matches!(wait.join().unwrap(), Err(Error::ShutDown)));
        }
    });
}
