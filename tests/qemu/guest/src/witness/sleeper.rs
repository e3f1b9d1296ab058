//! A thread that sleeps until set times, and notes how late it wakes.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use rustix::thread::{ClockId, Timespec, clock_nanosleep_absolute};
use rustix::time::clock_gettime;

use super::pin;

/// From one time to the next, ns.
const PERIOD: i64 = 10_000_000;

const SECOND: i64 = 1_000_000_000;

/// What a sleeper has seen.
#[derive(Debug, Default)]
pub(super) struct Sleeper {
    wakes: AtomicU64,
    /// Wakes before the time that was set.
    early: AtomicU64,
    /// The latest since the last report, ns.
    recent: AtomicI64,
    /// The latest of all, ns.
    latest: AtomicI64,
    /// The sum, ns.
    sum: AtomicI64,
}

impl Sleeper {
    /// Sleeps without end, on this CPU.
    pub(super) fn run(&self, cpu: usize) -> ! {
        let mut until = now();
        loop {
            pin(cpu);
            until += PERIOD;
            let request = Timespec {
                tv_sec: until / SECOND,
                tv_nsec: until % SECOND,
            };
            while clock_nanosleep_absolute(ClockId::Monotonic, &request).is_err() {}
            let woken = now();
            self.judge(woken - until);
            // The times that have passed are left out.
            until += (woken - until).max(0) / PERIOD * PERIOD;
        }
    }

    /// Takes a wake that was so late, ns.
    fn judge(&self, late: i64) {
        self.wakes.fetch_add(1, Ordering::Relaxed);
        self.early.fetch_add(u64::from(late < 0), Ordering::Relaxed);
        self.recent.fetch_max(late, Ordering::Relaxed);
        self.latest.fetch_max(late, Ordering::Relaxed);
        self.sum.fetch_add(late, Ordering::Relaxed);
    }

    /// All that is known, as `key=value`, in ns. The next report's `recent` begins here.
    pub(super) fn report(&self) -> String {
        let wakes = self.wakes.load(Ordering::Relaxed);
        let mean = self.sum.load(Ordering::Relaxed) / i64::try_from(wakes.max(1)).unwrap_or(1);
        format!(
            "wakes={wakes} early={} mean_ns={mean} recent_ns={} latest_ns={}",
            self.early.load(Ordering::Relaxed),
            self.recent.swap(0, Ordering::Relaxed),
            self.latest.load(Ordering::Relaxed),
        )
    }
}

/// CLOCK_MONOTONIC, in ns.
fn now() -> i64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec * SECOND + time.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wakes_are_judged_and_the_recent_latest_begins_again_with_each_report() {
        let sleeper = Sleeper::default();
        for late in [10, 40, -8] {
            sleeper.judge(late);
        }
        assert_eq!(
            sleeper.report(),
            "wakes=3 early=1 mean_ns=14 recent_ns=40 latest_ns=40"
        );
        sleeper.judge(30);
        assert_eq!(
            sleeper.report(),
            "wakes=4 early=1 mean_ns=18 recent_ns=30 latest_ns=40"
        );
    }
}
