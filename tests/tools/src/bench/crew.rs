//! Threads that stand for vCPUs. They live through all rounds of a row, because starting and ending
//! threads is not what is measured.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::thread::futex;
use vhost_user_timer_frontend::Error;

/// What a vCPU's thread does in a round: which job, and its vCPU.
type Work<'a> = &'a (dyn Fn(usize, u32) -> Result<(), Error> + Sync);

/// A thread's stack. Nothing on it is large, and there may be thousands of them.
const STACK: usize = 128 * 1024;

/// Sleeps while the word has this value.
fn sleep_while(word: &AtomicU32, value: u32) {
    while word.load(Ordering::Acquire) == value {
        let _ = futex::wait(word, futex::Flags::PRIVATE, value, None);
    }
}

/// See the module.
pub(super) struct Crew<'a> {
    work: Work<'a>,
    /// The number of the round: a futex. A barrier would have each thread take a lock on its way.
    round: AtomicU32,
    /// How many threads are still in it: a futex as well.
    left: AtomicU32,
    over: AtomicBool,
    job: AtomicUsize,
    epoch: Instant,
    /// By vCPU, when its work of this round was done, ns.
    done: Vec<AtomicU64>,
    failure: Mutex<Option<Error>>,
}

/// When the threads were done, in ns since they started.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) first: f64,
    pub(super) last: f64,
}

impl<'a> Crew<'a> {
    /// Starts this many threads, which do `work` in each round, and calls `rounds`.
    ///
    /// # Errors
    ///
    /// Those of `rounds`, and of starting threads.
    pub(super) fn run<T>(
        threads: u32,
        work: Work<'a>,
        rounds: impl FnOnce(&Crew<'a>) -> io::Result<T>,
    ) -> io::Result<T> {
        let crew = Crew {
            work,
            round: AtomicU32::new(0),
            left: AtomicU32::new(0),
            over: AtomicBool::new(false),
            job: AtomicUsize::new(0),
            epoch: Instant::now(),
            done: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            failure: Mutex::new(None),
        };
        thread::scope(|scope| {
            for vcpu in 0..threads {
                let crew = &crew;
                thread::Builder::new()
                    .stack_size(STACK)
                    .spawn_scoped(scope, move || crew.live(vcpu))
                    .expect("a thread can be started");
            }
            let result = rounds(&crew);
            crew.over.store(true, Ordering::Release);
            crew.start();
            result
        })
    }

    /// How many threads there are.
    pub(super) fn threads(&self) -> u32 {
        self.done.len() as u32
    }

    /// Starts a round.
    fn start(&self) {
        self.left.store(self.threads(), Ordering::Release);
        self.round.fetch_add(1, Ordering::AcqRel);
        // It cannot fail for an address that is mapped.
        let _ = futex::wake(&self.round, futex::Flags::PRIVATE, i32::MAX as u32);
    }

    fn live(&self, vcpu: u32) {
        for round in 0.. {
            sleep_while(&self.round, round);
            if self.over.load(Ordering::Acquire) {
                return;
            }
            if let Err(error) = (self.work)(self.job.load(Ordering::Acquire), vcpu) {
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                *failure = Some(error);
            }
            let now = self.epoch.elapsed().as_nanos() as u64;
            self.done[vcpu as usize].store(now, Ordering::Release);
            if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                let _ = futex::wake(&self.left, futex::Flags::PRIVATE, 1);
            }
        }
    }

    /// Has all of them do a job, does something `meanwhile`, and waits until they are done.
    ///
    /// # Errors
    ///
    /// Those of `meanwhile`, and then a thread's. The threads must not need what `meanwhile` failed
    /// to do for longer than a time-out.
    pub(super) fn round(
        &self,
        job: usize,
        meanwhile: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Done> {
        self.job.store(job, Ordering::Release);
        let began = self.epoch.elapsed().as_nanos() as u64;
        self.start();
        let meanwhile = meanwhile();
        loop {
            match self.left.load(Ordering::Acquire) {
                0 => break,
                left => sleep_while(&self.left, left),
            }
        }
        meanwhile?;
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = failure.take() {
            return Err(io::Error::other(error));
        }
        let times = || self.done.iter().map(|at| at.load(Ordering::Acquire));
        let since = |at: Option<u64>| at.unwrap_or(began).saturating_sub(began) as f64;
        Ok(Done {
            first: since(times().min()),
            last: since(times().max()),
        })
    }
}
