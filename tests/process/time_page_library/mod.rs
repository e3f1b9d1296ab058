//! The library's use of the time page: counts without a request, and the gate by the page.
//!
//! A failure names its seed. `VUT_SEED=<seed>` repeats that order.

mod counts;
mod outages;
mod race;
mod waits;

use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::scope;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::thread::gettid;
use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_frontend::{
    Counts, Deadline, Error, Frontend, GuestClock, HostClock, Offsets, Options, Reconnect,
    RegValue, RequestQueue, RestoreOptions,
};
use vhost_user_timer_kit::backend_process::{BackendProcess, find_program};
use vhost_user_timer_kit::raw_driver::seed;
use vhost_user_timer_kit::time_out::with_a_time_out;
use vhost_user_timer_kit::watch::{HOST_FREQUENCY, host_count};
use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::{Abi, Phase, Register, Status};

/// A wait that takes longer is a hang.
const LIMIT: Duration = Duration::from_secs(30);

/// Options of backends that are killed.
const QUEUES: [&str; 1] = ["--request-queues=2"];

struct Served {
    backend: BackendProcess,
    frontend: Frontend,
}

impl Served {
    fn new(vcpus: u32) -> Self {
        Self::with(vcpus, HOST_FREQUENCY, &[])
    }

    fn with(vcpus: u32, frequency: u64, args: &[&str]) -> Self {
        let backend = BackendProcess::launch(args).unwrap();
        let options = Options::default().timeout(LIMIT);
        let frontend = Frontend::connect(backend.socket_path(), options).unwrap();
        let served = Served { backend, frontend };
        let queue = served.queue();
        queue
            .configure(vcpus, Abi::Arm64, NonZeroU64::new(frequency), LIMIT)
            .unwrap();
        served.start();
        served
    }

    /// With a state file, and a library that reconnects.
    fn kept(vcpus: u32) -> Self {
        let program = find_program().unwrap();
        let backend = BackendProcess::launch_with_state(&program, &QUEUES).unwrap();
        let reconnect = Reconnect::default()
            .patience(LIMIT)
            .delays(Duration::from_millis(1), Duration::from_millis(10));
        let options = Options::default().timeout(LIMIT).reconnect(reconnect);
        let frontend = Frontend::connect(backend.socket_path(), options).unwrap();
        let served = Served { backend, frontend };
        let queue = served.queue();
        queue
            .configure(vcpus, Abi::Arm64, NonZeroU64::new(HOST_FREQUENCY), LIMIT)
            .unwrap();
        served.start();
        served
    }

    fn start(&self) {
        self.frontend
            .time_page()
            .start(self.queue(), LIMIT)
            .unwrap();
    }

    fn queue(&self) -> &RequestQueue {
        self.frontend.queue()
    }

    fn clock(&self) -> GuestClock {
        self.queue()
            .guest_clock(HostClock::MONOTONIC, LIMIT)
            .unwrap()
    }

    fn begin(&self, timeout: Option<Duration>) {
        let mut options = RestoreOptions::default().autorun(true);
        options.timeout = timeout;
        self.queue().restore_begin(options, LIMIT).unwrap();
    }

    fn bring(&self, vcpu: u32, count: u64) {
        bring(self.queue(), vcpu, count);
    }

    /// Has the first `count` vCPUs wait by the page.
    fn waiting<T>(
        &self,
        count: u32,
        deadline: Deadline,
        meanwhile: impl FnOnce(&Waiters) -> T,
    ) -> T {
        waiting(&self.frontend, count, deadline, meanwhile)
    }
}

/// vCPU threads that wait by the page.
struct Waiters {
    gotten: Receiver<(u32, Result<Offsets, Error>)>,
    /// Their thread ids, once they are about to wait.
    threads: Mutex<Vec<i32>>,
    count: usize,
}

fn waiting<T>(
    frontend: &Frontend,
    count: u32,
    deadline: Deadline,
    meanwhile: impl FnOnce(&Waiters) -> T,
) -> T {
    let (got, gotten) = channel();
    let waiters = Waiters {
        gotten,
        threads: Mutex::default(),
        count: count as usize,
    };
    scope(|scope| {
        for vcpu in 0..count {
            let (got, waiters) = (got.clone(), &waiters.threads);
            scope.spawn(move || {
                let thread = gettid().as_raw_nonzero().get();
                waiters.lock().unwrap().push(thread);
                let result = frontend.queue_of(vcpu).wait_run_by_page(vcpu, deadline);
                got.send((vcpu, result))
            });
        }
        let meanwhile = AssertUnwindSafe(|| meanwhile(&waiters));
        catch_unwind(meanwhile).unwrap_or_else(|panic| {
            frontend.shutdown_handle().shut_down();
            resume_unwind(panic)
        })
    })
}

impl Waiters {
    fn next(&self) -> (u32, Result<Offsets, Error>) {
        self.gotten.recv_timeout(LIMIT).expect("nobody hangs")
    }

    fn nobody_came(&self) {
        let got = self.gotten.try_recv();
        assert!(got.is_err(), "{got:?}");
    }

    /// Returns once all of them sleep: they have read the page and wait.
    fn come_to_rest(&self) {
        let deadline = Instant::now() + LIMIT;
        assert!(
            self.rest_before(|| Instant::now() >= deadline),
            "some do not sleep"
        );
        self.nobody_came();
    }

    /// Waits until all of them sleep. Returns whether they do before it is too late.
    fn rest_before(&self, is_too_late: impl Fn() -> bool) -> bool {
        let mut last = None;
        while !is_too_late() {
            let threads = self.threads.lock().unwrap().clone();
            let all = threads.len() == self.count;
            let now: Option<Vec<_>> = threads.iter().map(|thread| asleep(*thread)).collect();
            if all && now.is_some() && now == last {
                return !is_too_late();
            }
            last = now.filter(|_| all);
            std::thread::yield_now();
        }
        false
    }

    fn refused(&self, count: u32) -> Vec<Status> {
        let status = |_| {
            let (vcpu, got) = self.next();
            let error = got.unwrap_err();
            let refusal = error.refusal().unwrap_or_else(|| panic!("{error}"));
            assert_eq!(refusal.vcpu, Some(vcpu));
            refusal.status
        };
        (0..count).map(status).collect()
    }

    fn all_run(&self) -> Vec<Offsets> {
        (0..self.count).map(|_| self.next().1.unwrap()).collect()
    }
}

/// How often this thread was switched from, if it sleeps. If two readings of all threads are equal,
/// all slept at one time in between, so none holds what another waits for.
fn asleep(thread: i32) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).ok()?;
    let line = |name: &str| status.lines().find(|line| line.starts_with(name));
    line("State:")?.starts_with("State:\tS").then_some(())?;
    line("voluntary_ctxt_switches:").map(str::to_owned)
}

fn bring(queue: &RequestQueue, vcpu: u32, count: u64) {
    let values = [
        (Register::TimerCtl, 0),
        (Register::TimerCnt, count),
        (Register::TimerCval, u64::MAX),
    ]
    .map(|(register, value)| RegValue::new(register.id(Abi::Arm64), value));
    queue.set_regs(vcpu, &values, LIMIT).unwrap();
}
