//! The library's use of the time page: counts without a request, and the gate by the page.
//!
//! A failure names its seed. `VUT_SEED=<seed>` races in that order again.

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
use vhost_user_timer_kit::watch::{HOST_FREQUENCY, host_count};
use vhost_user_timer_protocol::counter::Anchor;
use vhost_user_timer_protocol::{Abi, Phase, Register, Status};

/// Something that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Of backends that are killed.
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
    /// Their thread ids, once they are about to.
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

    /// Returns once all of them sleep, and so have looked and wait.
    fn come_to_rest(&self) {
        let deadline = Instant::now() + LIMIT;
        let mut last = None;
        loop {
            let threads = self.threads.lock().unwrap().clone();
            let all = threads.len() == self.count;
            let now: Option<Vec<_>> = threads.iter().map(|thread| asleep(*thread)).collect();
            if all && now.is_some() && now == last {
                self.nobody_came();
                return;
            }
            last = now.filter(|_| all);
            assert!(Instant::now() < deadline, "{threads:?} do not sleep");
            std::thread::yield_now();
        }
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

/// How often this thread of ours was switched from, where it sleeps: where that is the same for all
/// of some threads at two looks, they all slept at once in between, and none holds what another one
/// waits for.
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

// Counts.

#[test]
fn counts_lie_between_two_of_get_regs_in_every_phase() {
    for frequency in [HOST_FREQUENCY, 62_500_000, 24_000_000, 1_000] {
        let served = Served::with(1, frequency, &[]);
        let (queue, clock) = (served.queue(), served.clock());
        let ids = [Register::TimerCnt, Register::PtimerCnt].map(|r| r.id(Abi::Arm64));
        let read = || {
            let values = queue.get_regs(0, &ids, LIMIT).unwrap();
            [values[0].value, values[1].value]
        };
        let agree = || {
            for _ in 0..200 {
                let before = read();
                let Counts {
                    virt_count,
                    phys_count,
                    host_count,
                } = clock.counts().unwrap();
                let after = read();
                assert!((before[0]..=after[0]).contains(&virt_count));
                assert!((before[1]..=after[1]).contains(&phys_count));
                assert!(queue.info(LIMIT).unwrap().host_count >= host_count);
            }
        };
        agree();
        queue.resume(LIMIT).unwrap();
        agree();
        queue.pause_vm_only(LIMIT).unwrap();
        agree();
        queue.set_counter_offset(1, LIMIT).unwrap();
        agree();
        served.begin(None);
        // What the vCPU brought is its own until the restore is over.
        let counts = clock.counts().unwrap();
        let vm = queue.get_vm(0, 1, LIMIT).unwrap();
        assert_eq!(
            (counts.virt_count, counts.phys_count),
            (vm.virt_count, vm.phys_count)
        );
        served.bring(0, 5_000_000);
        queue.restore_done(0, LIMIT).unwrap();
        agree();
    }
}

#[test]
fn no_thread_sees_a_count_go_back_while_the_vm_is_paused_and_resumed() {
    let served = Served::new(1);
    let (queue, clock) = (served.queue(), served.clock());
    let largest = [AtomicU64::new(0), AtomicU64::new(0)];
    let over = AtomicBool::new(false);
    let readings = AtomicU64::new(0);
    scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let seen = [0, 1].map(|n| largest[n].load(Ordering::SeqCst));
                    // A backend that has lost its CPU keeps the page open.
                    let Some(counts) = clock.counts() else {
                        continue;
                    };
                    let now = [counts.virt_count, counts.phys_count];
                    for n in 0..2 {
                        if now[n] < seen[n] {
                            over.store(true, Ordering::Relaxed);
                            panic!("clock {n}: {} after {}", now[n], seen[n]);
                        }
                        largest[n].fetch_max(now[n], Ordering::SeqCst);
                    }
                    readings.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let deadline = Instant::now() + LIMIT;
        while readings.load(Ordering::Relaxed) < 2_000_000 && Instant::now() < deadline {
            if over.load(Ordering::Relaxed) {
                return;
            }
            let run = queue.resume(LIMIT).unwrap();
            assert!(
                clock
                    .counts()
                    .is_none_or(|now| now.virt_count >= run.virt_count)
            );
            queue.pause(LIMIT).unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(readings.load(Ordering::Relaxed) > 1_000);
}

#[test]
fn another_host_counter_than_the_backends_is_refused() {
    let served = Served::new(1);
    let queue = served.queue();
    let refused = |host| {
        let error = queue.guest_clock(host, LIMIT).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    };
    refused(HostClock::Function(|_| 0));
    refused(HostClock::Function(|_| host_count() - 1_000_000_000));
    refused(HostClock::Function(|_| host_count() + 1_000_000_000));
    let now = Anchor {
        monotonic_ns: host_count(),
        count: host_count(),
    };
    refused(HostClock::Anchored(now));
    let right = HostClock::Function(|_| host_count());
    assert!(queue.guest_clock(right, LIMIT).unwrap().counts().is_some());
}

#[test]
fn an_anchored_vm_is_read_by_its_anchor_and_by_nothing_else() {
    let served = Served::with(1, 62_500_000, &[]);
    let queue = served.queue();
    let monotonic = served.clock();
    let anchor = Anchor {
        monotonic_ns: host_count(),
        count: 1 << 40,
    };
    queue
        .set_counter_anchor(anchor.monotonic_ns, anchor.count, LIMIT)
        .unwrap();
    assert_eq!(monotonic.counts(), None, "from now on another counter");
    assert!(queue.guest_clock(HostClock::MONOTONIC, LIMIT).is_err());
    let clock = queue.guest_clock(HostClock::Anchored(anchor), LIMIT);
    let clock = clock.unwrap();
    queue.resume(LIMIT).unwrap();
    for _ in 0..100 {
        let before = queue.info(LIMIT).unwrap();
        let counts = clock.counts().unwrap();
        let after = queue.info(LIMIT).unwrap();
        assert!((before.host_count..=after.host_count).contains(&counts.host_count));
        assert_eq!(counts.host_count - counts.virt_count, after.cntvoff);
    }
    served.frontend.reset_device().unwrap();
    assert_eq!(clock.counts(), None);
}

#[test]
fn the_counts_are_the_backends_to_the_tick_whatever_they_are_derived_from() {
    for (source, frequency) in [
        ("monotonic", 62_500_000),
        ("boottime", 62_500_000),
        ("tsc", 0),
        ("tsc", 62_500_000),
    ] {
        let option = format!("--counter-source={source}");
        let Ok(backend) = BackendProcess::launch(&[&option]) else {
            eprintln!("{source} is not to be had here");
            continue;
        };
        let options = Options::default().timeout(LIMIT);
        let frontend = Frontend::connect(backend.socket_path(), options).unwrap();
        let served = Served { backend, frontend };
        let queue = served.queue();
        let mut named = Source::ALL.iter().filter(|s| s.name() == source);
        let counter = HostCounter::open(*named.next().unwrap()).unwrap();
        let native = queue.info(LIMIT).unwrap().frequency;
        let host = HostClock::Counter(counter.at_rate(native));
        queue
            .configure(1, Abi::Arm64, NonZeroU64::new(frequency), LIMIT)
            .unwrap();
        served.start();
        queue.resume(LIMIT).unwrap();
        let clock = queue.guest_clock(host, LIMIT).unwrap();
        for _ in 0..100 {
            let before = queue.info(LIMIT).unwrap();
            let counts = clock.counts().unwrap();
            let after = queue.info(LIMIT).unwrap();
            let between = before.host_count..=after.host_count;
            assert!(between.contains(&counts.host_count), "{source}");
            assert_eq!(counts.host_count - counts.virt_count, after.cntvoff);
        }
    }
}

#[test]
fn without_a_page_there_is_no_count() {
    let served = Served::new(1);
    let clock = served.clock();
    assert!(clock.counts().is_some());
    let page = served.frontend.time_page();
    page.stop(served.queue(), LIMIT).unwrap();
    assert_eq!(clock.counts(), None);
    assert_eq!(page.read(), None);
    served.start();
    assert!(clock.counts().is_some());
}

#[test]
fn the_page_goes_on_after_a_reset() {
    let served = Served::new(1);
    served.frontend.reset_device().unwrap();
    let queue = served.queue();
    queue.configure(1, Abi::Arm64, None, LIMIT).unwrap();
    let page = served.frontend.time_page();
    // The library has asked for it before this: on whatever queue, it is done by now.
    for queue in served.frontend.queues() {
        queue.info(LIMIT).unwrap();
    }
    assert_eq!(page.read().unwrap().phase, Phase::Paused);
}

// The gate.

#[test]
fn running_is_told_by_the_page() {
    let served = Served::new(8);
    let run = served.queue().resume(LIMIT).unwrap();
    for vcpu in 0..8 {
        let queue = served.frontend.queue_of(vcpu);
        let offsets = queue.wait_run_by_page(vcpu, Duration::ZERO).unwrap();
        assert_eq!(offsets, Offsets::from(run));
    }
}

#[test]
fn without_a_page_the_request_tells() {
    let served = Served::new(1);
    let page = served.frontend.time_page();
    page.stop(served.queue(), LIMIT).unwrap();
    let error = served.queue().wait_run_by_page(0, Duration::ZERO);
    assert!(matches!(error, Err(Error::TimedOut { .. })));
    let run = served.queue().resume(LIMIT).unwrap();
    let offsets = served.queue().wait_run_by_page(0, LIMIT).unwrap();
    assert_eq!(offsets, run.into());
}

#[test]
fn in_new_and_for_no_such_vcpu_it_is_refused_as_the_request_is() {
    let served = Served::new(2);
    let queue = served.queue();
    let status = |vcpu| queue.wait_run_by_page(vcpu, LIMIT).unwrap_err().status();
    assert_eq!(status(2), Some(Status::NoSuchVcpu));
    served.frontend.reset_device().unwrap();
    assert_eq!(status(0), Some(Status::Busy));
}

#[test]
fn all_who_wait_go_at_resume_and_a_vcpu_that_is_none_keeps_nobody() {
    let served = Served::new(8);
    served.waiting(8, Deadline::from(LIMIT), |waiters| {
        let bad = served.queue().wait_run_by_page(8, Duration::from_millis(5));
        assert!(bad.is_err());
        waiters.come_to_rest();
        let run = served.queue().resume(LIMIT).unwrap();
        for offsets in waiters.all_run() {
            assert_eq!(offsets, Offsets::from(run));
        }
    });
}

#[test]
fn a_new_restore_is_estale_an_abort_ecanceled_and_a_time_out_etimedout_for_all_who_wait() {
    let served = Served::new(4);
    let queue = served.queue();
    for round in 0..20 {
        served.waiting(4, Deadline::from(LIMIT), |waiters| {
            if round % 2 == 0 {
                waiters.come_to_rest();
            }
            served.begin(None);
            // Whoever had not looked waits in the new restore, and goes with that.
            let early = waiters.refused(if round % 2 == 0 { 4 } else { 0 });
            assert!(early.iter().all(|status| *status == Status::Stale));
            if round % 2 == 1 {
                queue.restore_abort(LIMIT).unwrap();
                served.begin(None);
                queue.restore_abort(LIMIT).unwrap();
                queue.resume(LIMIT).unwrap();
                for _ in 0..4 {
                    match waiters.next().1 {
                        Ok(_) => {}
                        Err(error) => assert!(
                            matches!(error.status(), Some(Status::Stale | Status::Canceled)),
                            "{error}"
                        ),
                    }
                }
                queue.pause(LIMIT).unwrap();
            } else {
                queue.restore_abort(LIMIT).unwrap();
            }
        });
        served.begin(None);
        served.waiting(4, Deadline::from(LIMIT), |waiters| {
            waiters.come_to_rest();
            queue.restore_abort(LIMIT).unwrap();
            assert_eq!(waiters.refused(4), [Status::Canceled; 4]);
        });
    }
    served.begin(Some(Duration::from_secs(2)));
    served.waiting(4, Deadline::from(LIMIT), |waiters| {
        waiters.come_to_rest();
        assert_eq!(waiters.refused(4), [Status::TimedOut; 4]);
    });
    // Whoever comes later waits on.
    served.waiting(4, Deadline::from(LIMIT), |waiters| {
        waiters.come_to_rest();
        for vcpu in 0..4 {
            served.bring(vcpu, 99);
            queue.restore_done(vcpu, LIMIT).unwrap();
        }
        waiters.all_run();
    });
}

#[test]
fn the_end_of_a_restore_in_paused_lets_nobody_go() {
    let served = Served::new(2);
    let queue = served.queue();
    let options = RestoreOptions::default();
    queue.restore_begin(options, LIMIT).unwrap();
    served.waiting(2, Deadline::from(LIMIT), |waiters| {
        for vcpu in 0..2 {
            served.bring(vcpu, 7);
            queue.restore_done(vcpu, LIMIT).unwrap();
        }
        waiters.come_to_rest();
        let run = queue.resume(LIMIT).unwrap();
        assert_eq!(run.virt_count, 7);
        assert!(waiters.all_run().iter().all(|got| *got == run.into()));
    });
}

#[test]
fn whoever_leads_may_leave_and_another_one_leads() {
    let served = Served::new(4);
    let queue = served.queue();
    for turn in 0..100 {
        served.begin(None);
        scope(|scope| {
            // It comes first, mostly, and leads; and goes after the others have come, mostly.
            let leader = scope.spawn(|| {
                let short = Duration::from_micros(turn * 20);
                queue.wait_run_by_page(3, short)
            });
            served.waiting(3, Deadline::from(LIMIT), |waiters| {
                let left = leader.join().unwrap();
                assert!(matches!(left, Err(Error::TimedOut { .. })), "{left:?}");
                waiters.come_to_rest();
                queue.restore_abort(LIMIT).unwrap();
                assert_eq!(waiters.refused(3), [Status::Canceled; 3]);
            });
        });
    }
    let soon = Deadline::from(Duration::from_millis(30));
    served.waiting(4, soon, |waiters| {
        for _ in 0..4 {
            let got = waiters.next().1;
            assert!(matches!(got, Err(Error::TimedOut { .. })));
        }
    });
}

#[test]
fn the_shutdown_handle_ends_every_wait_by_the_page() {
    let served = Served::new(8);
    served.waiting(8, Deadline::NEVER, |waiters| {
        waiters.come_to_rest();
        served.frontend.shutdown_handle().shut_down();
        for _ in 0..8 {
            let got = waiters.next().1;
            assert!(matches!(got, Err(Error::ShutDown)), "{got:?}");
        }
    });
}

#[test]
fn a_dead_backend_is_an_error_for_all_who_wait_and_for_who_finds_running() {
    for running in [false, true] {
        let mut served = Served::new(8);
        if running {
            served.queue().resume(LIMIT).unwrap();
            served.backend.kill();
            let page = served.frontend.time_page().read().unwrap();
            assert_eq!(page.phase, Phase::Running, "it says what was last");
            let got = served.queue().wait_run_by_page(0, LIMIT);
            assert!(matches!(got, Err(Error::Disconnected)), "{got:?}");
            continue;
        }
        let Served { backend, frontend } = &mut served;
        waiting(frontend, 8, Deadline::NEVER, |waiters| {
            waiters.come_to_rest();
            backend.kill();
            for _ in 0..8 {
                let got = waiters.next().1;
                assert!(matches!(got, Err(Error::Disconnected)), "{got:?}");
            }
        });
    }
}

#[test]
fn who_waits_when_the_backend_is_killed_goes_once_with_the_offsets_of_the_next() {
    let program = find_program().unwrap();
    let mut served = Served::kept(8);
    for round in 0..8 {
        served.begin(None);
        let Served { backend, frontend } = &mut served;
        let queue = frontend.queue();
        waiting(frontend, 8, LIMIT.into(), |waiters| {
            if round % 2 == 0 {
                waiters.come_to_rest();
            }
            for vcpu in 0..8 {
                if vcpu == round {
                    backend.kill();
                    backend.relaunch_with_state(&program, &QUEUES).unwrap();
                }
                bring(queue, vcpu, 1 << 40 | u64::from(vcpu));
                waiters.nobody_came();
                queue.restore_done(vcpu, LIMIT).unwrap();
            }
            let info = queue.info(LIMIT).unwrap();
            assert_eq!(info.phase, Phase::Running);
            for offsets in waiters.all_run() {
                assert_eq!(offsets.cntvoff, info.cntvoff);
                assert_eq!(offsets.cntpoff, info.cntpoff);
            }
        });
        queue.pause(LIMIT).unwrap();
    }
    // An abort that comes before the outage, and one that falls into it.
    for killed_first in [false, true] {
        served.begin(None);
        let Served { backend, frontend } = &mut served;
        let queue = frontend.queue();
        waiting(frontend, 8, LIMIT.into(), |waiters| {
            waiters.come_to_rest();
            if !killed_first {
                queue.restore_abort(LIMIT).unwrap();
            }
            backend.kill();
            backend.relaunch_with_state(&program, &QUEUES).unwrap();
            if killed_first {
                queue.restore_abort(LIMIT).unwrap();
            }
            assert_eq!(waiters.refused(8), [Status::Canceled; 8]);
        });
    }
}

#[test]
fn a_page_of_before_the_outage_lets_nobody_run_after_it() {
    let program = find_program().unwrap();
    let mut served = Served::kept(1);
    for _ in 0..10 {
        served.queue().resume(LIMIT).unwrap();
        served.backend.kill();
        served
            .backend
            .relaunch_with_state(&program, &QUEUES)
            .unwrap();
        // The page may not have been written anew; but it does not say RUNNING any more.
        let queue = &served.frontend.queues()[1];
        queue.pause(LIMIT).unwrap();
        let got = queue.wait_run_by_page(0, Duration::ZERO);
        assert!(matches!(got, Err(Error::TimedOut { .. })), "{got:?}");
    }
}

#[test]
fn eight_vcpus_race_through_the_gate_by_the_page_a_thousand_times() {
    const VCPUS: u32 = 8;
    let seed = seed();
    println!("seed {seed}");
    let served = Served::with(VCPUS, HOST_FREQUENCY, &["--request-queues=3"]);
    let clock = served.clock();
    let queue = served.queue();
    let mut rng = Rng::with_seed(seed);
    let largest = AtomicU64::new(0);
    for round in 0..1_000 {
        queue.pause(LIMIT).unwrap();
        let saved = queue.save(LIMIT).unwrap();
        served.begin(None);
        let done_sent = AtomicU32::new(0);
        let straggler = rng.u32(..2 * VCPUS);
        let waiting = AtomicU32::new(0);
        let releases = Mutex::new(Vec::new());
        scope(|scope| {
            for vcpu in saved.vcpus() {
                let mut rng = rng.fork();
                let (done_sent, waiting, releases, largest, clock, frontend) = (
                    &done_sent,
                    &waiting,
                    &releases,
                    &largest,
                    &clock,
                    &served.frontend,
                );
                scope.spawn(move || {
                    let index = vcpu.index();
                    let queue = frontend.queue_of(index);
                    for _ in 0..rng.u32(..10) {
                        std::thread::yield_now();
                    }
                    queue.set_vm(std::slice::from_ref(vcpu), LIMIT).unwrap();
                    if index == straggler {
                        let deadline = Instant::now() + LIMIT;
                        while waiting.load(Ordering::SeqCst) < VCPUS - 1 {
                            assert!(Instant::now() < deadline);
                            std::thread::yield_now();
                        }
                        for _ in 0..rng.u32(..50) {
                            std::thread::yield_now();
                        }
                    }
                    done_sent.fetch_add(1, Ordering::SeqCst);
                    queue.restore_done(index, LIMIT).unwrap();
                    waiting.fetch_add(1, Ordering::SeqCst);
                    let offsets = queue.wait_run_by_page(index, LIMIT).unwrap();
                    let early = done_sent.load(Ordering::SeqCst) < VCPUS;
                    let seen = largest.load(Ordering::SeqCst);
                    let count = host_count().wrapping_sub(offsets.cntvoff);
                    largest.fetch_max(count, Ordering::SeqCst);
                    let by_page = clock.counts().map_or(count, |counts| counts.virt_count);
                    let back = count < seen || by_page < count;
                    releases.lock().unwrap().push((offsets, early, back));
                });
            }
        });
        let releases = releases.into_inner().unwrap();
        for (offsets, early, back) in &releases {
            assert!(!early, "round {round}, seed {seed}");
            assert!(!back, "round {round}, seed {seed}");
            assert_eq!(*offsets, releases[0].0, "round {round}, seed {seed}");
        }
    }
}
