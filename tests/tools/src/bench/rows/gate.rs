//! Row 5: how far apart the vCPUs are released.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::thread::futex;
use vhost_user_timer_frontend::{Error, Options, RequestQueue, RestoreOptions};

use super::{Bench, LIMIT, configured, other};
use crate::bench::stats::Pair;

/// By then all vCPU threads sleep.
const ASLEEP: Duration = Duration::from_millis(5);

/// How a vCPU waits.
type Wait = fn(&RequestQueue, u32) -> Result<(), Error>;

/// With a request of its own.
fn by_queue(queue: &RequestQueue, vcpu: u32) -> Result<(), Error> {
    queue.wait_run(vcpu, LIMIT).map(drop)
}

fn by_page(queue: &RequestQueue, vcpu: u32) -> Result<(), Error> {
    queue.wait_run_by_page(vcpu, LIMIT).map(drop)
}

/// The vCPU threads. They live through all rounds, because starting and ending threads is not
/// what is measured.
struct Crew<'a> {
    queue: &'a RequestQueue,
    wait: Wait,
    start: Barrier,
    end: Barrier,
    over: AtomicBool,
    /// In this round they wait on the futex instead of a restore.
    bare: AtomicBool,
    futex: AtomicU32,
    epoch: Instant,
    /// By vCPU, when it was released, ns.
    released: Vec<AtomicU64>,
    failure: Mutex<Option<Error>>,
}

impl<'a> Crew<'a> {
    fn new(queue: &'a RequestQueue, wait: Wait, threads: u32) -> Self {
        let all = threads as usize + 1;
        Crew {
            queue,
            wait,
            start: Barrier::new(all),
            end: Barrier::new(all),
            over: AtomicBool::new(false),
            bare: AtomicBool::new(false),
            futex: AtomicU32::new(0),
            epoch: Instant::now(),
            released: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            failure: Mutex::new(None),
        }
    }

    fn live(&self, vcpu: u32) {
        loop {
            self.start.wait();
            if self.over.load(Ordering::Acquire) {
                return;
            }
            if self.bare.load(Ordering::Acquire) {
                while self.futex.load(Ordering::Acquire) == 0 {
                    let _ = futex::wait(&self.futex, futex::Flags::PRIVATE, 0, None);
                }
            } else if let Err(error) = (self.wait)(self.queue, vcpu) {
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                *failure = Some(error);
            }
            let now = self.epoch.elapsed().as_nanos() as u64;
            self.released[vcpu as usize].store(now, Ordering::Release);
            self.end.wait();
        }
    }

    /// Makes all of them wait, and releases them. Returns the time from first to last, ns.
    fn round(&self, bare: bool, release: impl FnOnce() -> io::Result<()>) -> io::Result<f64> {
        self.bare.store(bare, Ordering::Release);
        self.futex.store(0, Ordering::Release);
        self.start.wait();
        std::thread::sleep(ASLEEP);
        // If that fails, they return at their time-out.
        let released = release();
        self.end.wait();
        released?;
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = failure.take() {
            return Err(other(error));
        }
        let times = || self.released.iter().map(|at| at.load(Ordering::Acquire));
        let (first, last) = (times().min(), times().max());
        Ok(last.unwrap_or(0).saturating_sub(first.unwrap_or(0)) as f64)
    }

    /// Releases them by a restore, which ends when the last vCPU is done.
    fn by_restore(&self) -> io::Result<f64> {
        let (queue, threads) = (self.queue, self.released.len() as u32);
        let options = RestoreOptions::default().autorun(true);
        queue.restore_begin(options, LIMIT).map_err(other)?;
        let rows = queue.get_vm(0, threads, LIMIT).map_err(other)?.vcpus;
        queue.set_vm(&rows, LIMIT).map_err(other)?;
        for vcpu in 1..threads {
            queue.restore_done(vcpu, LIMIT).map_err(other)?;
        }
        let apart = self.round(false, || {
            queue.restore_done(0, LIMIT).map(drop).map_err(other)
        })?;
        queue.pause(LIMIT).map_err(other)?;
        Ok(apart)
    }

    /// Releases them by one futex.
    fn by_futex(&self) -> io::Result<f64> {
        self.round(true, || {
            self.futex.store(1, Ordering::Release);
            futex::wake(&self.futex, futex::Flags::PRIVATE, i32::MAX as u32)?;
            Ok(())
        })
    }

    fn rounds(&self, count: usize) -> io::Result<Pair> {
        self.by_restore()?;
        self.by_futex()?;
        let mut pair = Pair::default();
        for _ in 0..count {
            let ours = self.by_restore()?;
            pair.add(vec![ours], vec![self.by_futex()?]);
        }
        Ok(pair)
    }
}

/// See the module.
pub(super) fn skew(bench: &mut Bench) -> io::Result<()> {
    for threads in [8, 64] {
        let ways: [(&str, Wait); 2] = [("queue", by_queue), ("time page", by_page)];
        for (way, wait) in ways {
            let backend = bench.backend(true, &[])?;
            let frontend = configured(&backend, threads, Options::default())?;
            let queue = frontend.queue();
            if way == "time page" {
                let page = frontend.time_page();
                page.start(queue, LIMIT).map_err(other)?;
            }
            let crew = Crew::new(queue, wait, threads);
            let pair = std::thread::scope(|scope| {
                for vcpu in 0..threads {
                    let crew = &crew;
                    scope.spawn(move || crew.live(vcpu));
                }
                let pair = crew.rounds(bench.count(300, 30));
                crew.over.store(true, Ordering::Release);
                crew.start.wait();
                pair
            })?;
            let name = format!("5 gate skew, {threads} threads, by {way}");
            let reach = [Some("ratio ≤ 1.2"), None];
            bench.report.latency(&name, &pair, reach);
        }
    }
    Ok(())
}
