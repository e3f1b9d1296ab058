//! A backend under test, and what the system reports of it.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{Driver, Setup};
use crate::backend_process::{BACKEND_VARIABLE, BackendProcess, Devices, find_program};

/// After this time the backend is killed, which ends every wait for it. It is for a whole test, on
/// a slow machine.
const LIMIT: Duration = Duration::from_secs(600);

/// A running backend that cannot leave its test hanging.
pub struct Rig {
    /// The process.
    pub backend: BackendProcess,
    /// Dropping it ends the watch.
    _watch: Sender<()>,
}

impl Rig {
    /// Starts the backend.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn launch(args: &[&str]) -> Self {
        Self::watch(BackendProcess::launch(args).expect("a backend"))
    }

    /// Starts the release build of the backend if there is one: it is what ships, and the crates
    /// underneath have assertions that only a debug build makes.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn launch_release(args: &[&str]) -> Self {
        let (program, _) = release_program().expect("a backend program");
        let backend = BackendProcess::launch_program(&program, args).expect("a backend");
        Self::watch(backend)
    }

    /// Starts the backend (the release build if there is one) with a socket for each of these
    /// devices, and waits until it is ready.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn launch_devices(devices: Devices, args: &[&str]) -> Self {
        let (program, _) = release_program().expect("a backend program");
        let backend = BackendProcess::launch_devices(&program, devices, args);
        Self::watch(backend.expect("a backend"))
    }

    /// [`launch_devices`](Self::launch_devices), with a state file; see
    /// [`die_and_go_on`](Self::die_and_go_on).
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn launch_devices_with_state(devices: Devices, args: &[&str]) -> Self {
        let (program, _) = release_program().expect("a backend program");
        let backend = BackendProcess::launch_devices_with_state(&program, devices, args);
        Self::watch(backend.expect("a backend"))
    }

    /// Kills the backend, calls `meanwhile`, and starts another backend on its state file.
    ///
    /// # Panics
    ///
    /// If the other one does not start.
    pub fn die_and_go_on(self, meanwhile: impl FnOnce(), args: &[&str]) -> Self {
        let Rig {
            mut backend,
            _watch,
        } = self;
        backend.kill();
        drop(_watch);
        meanwhile();
        let (program, _) = release_program().expect("a backend program");
        let relaunched = backend.relaunch_with_state(&program, args);
        relaunched.expect("another backend");
        Self::watch(backend)
    }

    /// Watches over a backend that was started by other means.
    pub fn watch(backend: BackendProcess) -> Self {
        Self::watch_within(backend, LIMIT)
    }

    /// [`watch`](Self::watch), for a test that takes up to `limit`.
    pub fn watch_within(backend: BackendProcess, limit: Duration) -> Self {
        let (sender, receiver) = channel();
        let kill = kill_later(&backend);
        std::thread::spawn(move || {
            if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("the test hangs: killing its backend");
                kill();
            }
        });
        Rig {
            backend,
            _watch: sender,
        }
    }

    /// A driver on a new connection with the default set-up.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    pub fn connect(&self) -> Driver {
        self.connect_with(Setup::default())
    }

    /// A driver on a new connection.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    pub fn connect_with(&self, setup: Setup) -> Driver {
        Driver::connect(self.backend.socket_path(), setup)
    }

    /// A new connection on which nothing was sent.
    ///
    /// # Panics
    ///
    /// If nobody listens.
    pub fn stream(&self) -> UnixStream {
        UnixStream::connect(self.backend.socket_path()).expect("the backend listens")
    }

    /// A new connection to the clock device on which nothing was sent.
    ///
    /// # Panics
    ///
    /// If nobody listens.
    pub fn clock_stream(&self) -> UnixStream {
        UnixStream::connect(self.backend.clock_path()).expect("the backend listens")
    }

    /// [`BackendProcess::log_with`].
    ///
    /// # Panics
    ///
    /// If the text does not come.
    #[track_caller]
    pub fn log_with(&self, text: &str) -> String {
        self.backend.log_with(text)
    }

    /// [`BackendProcess::log_with_times`].
    ///
    /// # Panics
    ///
    /// If the text does not come.
    #[track_caller]
    pub fn log_with_times(&self, text: &str, times: usize) -> String {
        self.backend.log_with_times(text, times)
    }

    /// How often the log contains `text` so far.
    pub fn said(&self, text: &str) -> usize {
        self.backend.log().matches(text).count()
    }

    /// What the process uses now.
    ///
    /// # Panics
    ///
    /// If it is gone.
    pub fn usage(&self) -> Usage {
        Usage::of(self.backend.pid()).expect("the backend is alive")
    }

    /// Waits until all threads of the process sleep, and checks that none runs for a while. False
    /// if one never stops.
    ///
    /// # Panics
    ///
    /// If the process is gone.
    pub fn comes_to_rest(&self) -> bool {
        let deadline = Instant::now() + super::PATIENCE;
        let mut last = None;
        while Instant::now() < deadline {
            let now = asleep(self.backend.pid()).expect("the backend is alive");
            if now.is_some() && now == last {
                return true;
            }
            last = now;
            // Not a wait for something: time in which nothing must happen.
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Does something for which the backend has this long. A backend that takes longer is killed,
    /// so that every wait for it ends.
    ///
    /// # Panics
    ///
    /// If it takes longer, or if `act` panics.
    #[track_caller]
    pub fn in_time<T>(&self, limit: Duration, what: &str, act: impl FnOnce() -> T) -> T {
        let (done, wait) = channel::<()>();
        let kill = kill_later(&self.backend);
        let watch = std::thread::spawn(move || {
            let late = wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                kill();
            }
            late
        });
        let result = catch_unwind(AssertUnwindSafe(act));
        drop(done);
        let late = watch.join().expect("the watch does not panic");
        assert!(!late, "not within {limit:?}: {what}");
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Waits until the process has no more threads and descriptors than these. Returns what it uses
    /// then, or after the time limit.
    pub fn settled(&self, threads: usize, fds: usize) -> Usage {
        let deadline = Instant::now() + super::PATIENCE;
        loop {
            let usage = self.usage();
            if (usage.threads <= threads && usage.fds <= fds) || Instant::now() > deadline {
                return usage;
            }
            std::thread::yield_now();
        }
    }
}

/// Kills the backend when it is called, by a process descriptor: the id may be another process's by
/// then. Without effect where the backend has ended.
fn kill_later(backend: &BackendProcess) -> impl FnOnce() + Send + 'static {
    let pid = Pid::from_raw(backend.pid() as i32);
    let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    move || {
        if let Some(pidfd) = pidfd {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

/// How often each thread was switched to and from, if all of them sleep.
fn asleep(pid: u32) -> io::Result<Option<Vec<String>>> {
    let mut threads = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else {
            return Ok(None);
        };
        let line = |name: &str| {
            let found = status.lines().find(|line| line.starts_with(name));
            found.unwrap_or_default().to_owned()
        };
        if !line("State:").starts_with("State:\tS") {
            return Ok(None);
        }
        let names = [
            "Pid:",
            "voluntary_ctxt_switches",
            "nonvoluntary_ctxt_switches",
        ];
        threads.extend(names.map(line));
    }
    Ok(Some(threads))
}

/// What a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Open descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// Its own resident memory, KiB, without the memory that frontends share.
    pub anonymous_kib: u64,
    /// Resident memory that it shares, KiB: what frontends gave it, and mappings of /dev/zero.
    pub shared_kib: u64,
    /// Processor time so far, user and system, in clock ticks of 10 ms.
    pub cpu_ticks: u64,
}

impl Usage {
    /// Of the process with this id.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let count = |name: &str| fs::read_dir(proc.join(name)).map(Iterator::count);
        let status = fs::read_to_string(proc.join("status"))?;
        let kib = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name))?;
            value.split_whitespace().next()?.parse().ok()
        };
        let stat = fs::read_to_string(proc.join("stat"))?;
        // Fields 14 and 15. Field 2, in parentheses, may contain anything.
        let cpu_ticks = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse::<u64>().ok())
            .sum();
        Ok(Usage {
            fds: count("fd")?,
            threads: count("task")?,
            anonymous_kib: kib("RssAnon:").unwrap_or(0),
            shared_kib: kib("RssShmem:").unwrap_or(0),
            cpu_ticks,
        })
    }
}

/// The backend's release build if there is one beside this build, else what [`find_program`] finds;
/// and whether it is known to be a release build.
///
/// # Errors
///
/// If there is no backend at all.
pub fn release_program() -> io::Result<(PathBuf, bool)> {
    let program = find_program()?;
    if std::env::var_os(BACKEND_VARIABLE).is_some() {
        return Ok((program, false));
    }
    let name = program.file_name().unwrap_or_default();
    let release = program
        .parent()
        .and_then(|profile| profile.parent())
        .map(|target| target.join("release").join(name))
        .filter(|path| path.is_file());
    Ok(match release {
        Some(release) => (release, true),
        None => (program, false),
    })
}

/// The seed of a random test: `VUT_SEED`, or a fixed one. Tests print it when they fail.
///
/// # Panics
///
/// If `VUT_SEED` is no number: another seed would not repeat what was to be repeated.
pub fn seed() -> u64 {
    std::env::var("VUT_SEED").map_or(0x7133_5eed, |text| {
        text.parse().expect("VUT_SEED is a decimal number")
    })
}
