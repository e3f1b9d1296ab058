//! For how long to poll rings before sleeping: as long as it has paid off recently.
//!
//! Sleeping and being woken costs more than a request does, most of all where the driver's CPU has
//! to wake this one. So after a request the worker keeps polling for a window of time, as KVM does
//! before it halts a vCPU. The window grows when work arrives soon after the worker went to sleep,
//! and shrinks when work arrives late.
//!
//! While the worker polls, nothing else runs on its CPU, possibly not even the driver. The kernel
//! does not say who is waiting, so that is inferred: others had the CPU for a good part of the time
//! spent polling, or polling was fruitless several times in a row and each time work arrived at
//! once when it ended. Then polling backs off for a while, and for longer each time. The alarm and
//! other descriptors wait for at most the longest window.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::time::ClockId;
use vhost_user_timer_counter::clock_ticks;
use vhost_user_timer_protocol::counter::NS_PER_SEC;

use crate::sys::lock;

/// Shorter windows are treated as zero, ns.
const MIN_WINDOW: u64 = 10_000;

/// How often in a row polling may be fruitless before it backs off.
const MAX_FRUITLESS: u32 = 4;

/// For how long polling backs off, ns: at first, and at most.
const BACK_OFF: u64 = 10_000_000;
const MAX_BACK_OFF: u64 = 1_000_000_000;

/// Other tasks may have the CPU for one part in this many of the time spent polling. A kernel
/// thread that runs now and then takes less.
const CPU_SHARE: u64 = 4;

/// After how much polling the share is judged, ns: long enough to include a scheduler tick.
const TRIAL: u64 = 4_000_000;

/// How often the rings are read between two checks for interruption, each of which takes as long.
const READS_PER_CHECK: usize = 4;

/// Nanoseconds of CLOCK_MONOTONIC.
pub(crate) fn now() -> u64 {
    clock_ticks(ClockId::Monotonic, NS_PER_SEC)
}

/// A ring that is polled.
#[derive(Clone, Copy)]
pub(crate) struct RingToPoll<'a> {
    /// The available index, as it is in memory: little-endian.
    pub(crate) index: &'a AtomicU16,
    /// The index up to which its chains were taken.
    pub(crate) taken: u16,
}

impl RingToPoll<'_> {
    fn has_chains(&self) -> bool {
        self.index.load(Ordering::Relaxed) != self.taken.to_le()
    }
}

/// Polls rings until one of them has chains, and returns which, as bits; or until `interrupted`,
/// and returns 0. At most 32 rings are polled.
pub(crate) fn poll_rings(
    rings: &[Option<RingToPoll<'_>>],
    mut interrupted: impl FnMut() -> bool,
) -> u32 {
    loop {
        for _ in 0..READS_PER_CHECK {
            let available = rings.iter().zip(0..u32::BITS).fold(0, |bits, (ring, n)| {
                let has_chains = ring.is_some_and(|ring| ring.has_chains());
                bits | u32::from(has_chains) << n
            });
            if available != 0 {
                return available;
            }
            std::hint::spin_loop();
        }
        if interrupted() {
            return 0;
        }
    }
}

/// The policy; see the module. All times are ns.
#[derive(Debug)]
pub(crate) struct Polling {
    max: u64,
    window: Mutex<Window>,
}

/// A span of polling that has begun.
#[derive(Debug)]
pub(crate) struct Span {
    /// When, ns of CLOCK_MONOTONIC.
    pub(crate) began: u64,
    /// Where the previous span was paused, if the worker has not slept since.
    since: Instant,
}

/// An instant in a thread's life.
#[derive(Clone, Copy, Debug)]
struct Instant {
    /// ns of CLOCK_MONOTONIC.
    now: u64,
    /// For how long the thread had run, ns.
    ran: u64,
}

impl Instant {
    fn here() -> Self {
        Instant {
            now: now(),
            ran: clock_ticks(ClockId::ThreadCPUTime, NS_PER_SEC),
        }
    }
}

impl Polling {
    /// Polls for `max` ns at most; 0 turns polling off.
    pub(crate) fn new(max: u64) -> Self {
        Polling {
            max,
            window: Mutex::new(Window::new(max)),
        }
    }

    /// The longest window.
    pub(crate) fn max(&self) -> u64 {
        self.max
    }

    /// Work came by a kick. Returns for how long to poll when it is done.
    pub(crate) fn kicked(&self) -> u64 {
        if self.max == 0 {
            return 0;
        }
        let now = now();
        let mut window = lock(&self.window);
        window.woken(now);
        window.at(now)
    }

    /// For how long to poll at present.
    pub(crate) fn window(&self) -> u64 {
        if self.max == 0 {
            return 0;
        }
        lock(&self.window).at(now())
    }

    /// Polling begins, or goes on after a pause.
    pub(crate) fn begin(&self) -> Span {
        let here = Instant::here();
        Span {
            began: here.now,
            since: lock(&self.window).paused.take().unwrap_or(here),
        }
    }

    /// Polling ends and the worker sleeps. Whether anything was `found`, and for how long nothing
    /// had been available.
    pub(crate) fn ended(&self, span: &Span, found: bool, idle: u64) {
        let here = Instant::here();
        let mut window = lock(&self.window);
        window.polled(here.now, found);
        window.sleeps(here.now, idle);
        window.judge_cpu_share(span.since, here);
    }

    /// Polling pauses until others had their turn.
    pub(crate) fn paused(&self, span: &Span) {
        let here = Instant::here();
        let mut window = lock(&self.window);
        window.polled(here.now, true);
        window.judge_cpu_share(span.since, here);
        window.paused = Some(here);
    }

    /// The worker sleeps without having polled.
    pub(crate) fn sleeps(&self) {
        if self.max != 0 {
            lock(&self.window).sleeps(now(), 0);
        }
    }
}

/// The window's length, as it follows from what came of polling.
#[derive(Debug)]
struct Window {
    max: u64,
    length: u64,
    /// Since when the worker sleeps, and for how long it had polled fruitlessly before.
    asleep: Option<(u64, u64)>,
    /// How often in a row polling was fruitless.
    fruitless: u32,
    backs_off_until: u64,
    back_off: u64,
    /// For how long was polled since the share was last judged, and how much of it others had.
    polled_for: u64,
    lost: u64,
    /// Since when polling is paused.
    paused: Option<Instant>,
}

impl Window {
    fn new(max: u64) -> Self {
        Window {
            max,
            length: 0,
            asleep: None,
            fruitless: 0,
            backs_off_until: 0,
            back_off: BACK_OFF,
            polled_for: 0,
            lost: 0,
            paused: None,
        }
    }

    fn at(&self, now: u64) -> u64 {
        if now < self.backs_off_until {
            0
        } else {
            self.length
        }
    }

    fn polled(&mut self, now: u64, found: bool) {
        self.fruitless = if found { 0 } else { self.fruitless + 1 };
        if self.fruitless >= MAX_FRUITLESS {
            self.back_off(now);
        }
    }

    fn sleeps(&mut self, now: u64, idle: u64) {
        self.paused = None;
        self.asleep = Some((now, idle));
    }

    fn woken(&mut self, now: u64) {
        let Some((since, idle)) = self.asleep.take() else {
            return;
        };
        let idle = now.saturating_sub(since).saturating_add(idle);
        self.length = if idle <= self.max {
            let first = (self.max / 4).max(MIN_WINDOW);
            self.length.saturating_mul(2).max(first).min(self.max)
        } else if self.length / 2 < MIN_WINDOW {
            0
        } else {
            self.length / 2
        };
    }

    /// Whenever the thread did not run while it was polling, others had the CPU.
    fn judge_cpu_share(&mut self, since: Instant, here: Instant) {
        let took = here.now.saturating_sub(since.now);
        let ran = here.ran.saturating_sub(since.ran);
        self.polled_for += took;
        self.lost += took.saturating_sub(ran);
        if self.polled_for < TRIAL {
            return;
        }
        if self.lost > self.polled_for / CPU_SHARE {
            self.back_off(here.now);
        }
        (self.polled_for, self.lost) = (0, 0);
    }

    /// Others need the CPU: no polling for a while, and for longer the sooner it happens again.
    fn back_off(&mut self, now: u64) {
        let again =
            self.backs_off_until != 0 && now < self.backs_off_until.saturating_add(self.back_off);
        self.back_off = if again {
            self.back_off.saturating_mul(2).min(MAX_BACK_OFF)
        } else {
            BACK_OFF
        };
        self.backs_off_until = now.saturating_add(self.back_off);
        self.length = 0;
        self.fruitless = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = 160_000;
    const FIRST: u64 = MAX / 4;

    /// Requests that each arrive `idle` ns after the worker had nothing left to do.
    fn requests(window: &mut Window, now: &mut u64, count: usize, idle: u64) {
        for _ in 0..count {
            let length = window.at(*now);
            let found = length > idle;
            *now += length.min(idle);
            if length != 0 {
                window.polled(*now, found);
            }
            if !found {
                window.sleeps(*now, length);
                *now += idle - length;
                window.woken(*now);
            }
        }
    }

    #[test]
    fn the_window_grows_until_it_pays_off_and_no_further() {
        let (mut window, mut now) = (Window::new(MAX), 1);
        requests(&mut window, &mut now, 1, FIRST + 1);
        assert_eq!(window.length, FIRST);
        requests(&mut window, &mut now, 50, FIRST + 1);
        assert_eq!(window.length, 2 * FIRST);
        requests(&mut window, &mut now, 50, MAX - 1);
        assert_eq!(window.length, MAX);
    }

    #[test]
    fn the_window_shrinks_to_nothing_where_work_comes_late() {
        let (mut window, mut now) = (Window::new(MAX), 1);
        requests(&mut window, &mut now, 50, FIRST + 1);
        requests(&mut window, &mut now, 1, 10 * MAX);
        assert_eq!(window.length, FIRST);
        requests(&mut window, &mut now, 3, 10 * MAX);
        assert_eq!(window.length, 0);
        requests(&mut window, &mut now, 100, 2 * MAX);
        assert_eq!(window.length, 0);
    }

    #[test]
    fn where_others_need_the_cpu_polling_backs_off_for_longer_each_time() {
        let (mut window, mut now) = (Window::new(MAX), 1);
        requests(&mut window, &mut now, 10, FIRST + 1);
        for backs_off in [BACK_OFF, 2 * BACK_OFF, 4 * BACK_OFF] {
            window.back_off(now);
            assert_eq!(window.at(now + backs_off - 1), 0);
            now += backs_off;
            requests(&mut window, &mut now, 10, FIRST + 1);
            assert_ne!(window.at(now), 0);
        }
        // After a long time undisturbed it is as at the start.
        now += 100 * MAX_BACK_OFF;
        window.back_off(now);
        assert_eq!(window.backs_off_until, now + BACK_OFF);
    }

    #[test]
    fn polling_backs_off_for_a_task_that_needs_the_cpu_and_not_for_one_that_runs_now_and_then() {
        let start = Instant { now: 1, ran: 1 };
        let after = |now, ran| Instant { now, ran };
        // Another task's scheduler slice within a span of polling.
        let mut window = Window::new(MAX);
        window.judge_cpu_share(start, after(MAX + 4_000_000, MAX));
        assert_eq!(window.backs_off_until, MAX + 4_000_000 + BACK_OFF);
        // A short turn in each of many spans, and then long ones.
        let mut window = Window::new(MAX);
        for _ in 0..1000 {
            window.judge_cpu_share(start, after(MAX, MAX - MAX / 10));
        }
        assert_eq!(window.backs_off_until, 0);
        for _ in 0..1000 {
            window.judge_cpu_share(start, after(MAX, MAX / 2));
        }
        assert_ne!(window.backs_off_until, 0);
    }

    #[test]
    fn a_driver_that_runs_only_while_the_worker_sleeps_gets_to_run() {
        let (mut window, mut now) = (Window::new(MAX), 1);
        let mut polled = 0;
        let begin = now;
        while now < begin + 20 * MAX_BACK_OFF {
            let length = window.at(now);
            now += length;
            polled += length;
            if length != 0 {
                window.polled(now, false);
            }
            window.sleeps(now, length);
            now += 5_000;
            window.woken(now);
        }
        assert!(polled < 20 * MAX_BACK_OFF / 1000, "{polled}");
    }

    #[test]
    fn with_a_longest_window_of_zero_there_is_no_polling() {
        let polling = Polling::new(0);
        polling.sleeps();
        assert_eq!((polling.kicked(), polling.window()), (0, 0));
    }

    #[test]
    fn polling_reports_which_rings_have_chains_and_ends_when_interrupted() {
        let indices = [7_u16, 8, 9].map(|index| AtomicU16::new(index.to_le()));
        let rings = |taken: [u16; 3]| {
            [0, 1, 2].map(|n| {
                let index = &indices[n];
                // The second is not started.
                (n != 1).then_some(RingToPoll {
                    index,
                    taken: taken[n],
                })
            })
        };
        let never = || panic!("there are chains");
        assert_eq!(poll_rings(&rings([6, 0, 9]), never), 0b001);
        assert_eq!(poll_rings(&rings([7, 0, 8]), never), 0b100);
        assert_eq!(poll_rings(&rings([0, 0, 0]), never), 0b101);
        let mut checks = 0;
        let available = poll_rings(&rings([7, 0, 9]), || {
            checks += 1;
            checks == 3
        });
        assert_eq!((available, checks), (0, 3));
    }
}
