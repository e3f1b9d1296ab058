//! How long a worker looks at its rings before it sleeps: for as long as that has paid of late.
//!
//! To sleep and to be woken costs more than a request does, most of all where the driver's CPU has to
//! wake this one. So after work the worker goes on looking for a while, as KVM does before it halts a
//! vCPU: longer each time where work came soon after it had slept, shorter where it came late.
//!
//! A driver that has no CPU but this one gets nowhere while the worker looks; so does whoever else wants
//! it. Nobody can be asked who that is (a worker with a CPU of its own has no other either), but it
//! shows: others have the CPU for a good part of the time in which the worker looks, or it looks in vain
//! time and again and then work comes at once. Then it does not look for a while, and for longer each
//! time. What else the worker waits for waits no longer than the longest such while.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::time::ClockId;
use vhost_user_timer_counter::clock_ticks;
use vhost_user_timer_protocol::counter::NS_PER_SEC;

/// Less than this is nothing, ns.
const LEAST: u64 = 10_000;

/// How often in a row to look in vain.
const VAIN: u32 = 4;

/// For how long not to look then, ns: at first, and at most.
const HOLD: u64 = 10_000_000;
const LONGEST_HOLD: u64 = 1_000_000_000;

/// Others may have the CPU for one part in so many of the time in which the worker looks. A kernel
/// thread that runs now and then has less.
const OTHERS: u64 = 4;

/// After how long a time of looking that is judged, ns: a scheduler's tick falls into it.
const TRIAL: u64 = 4_000_000;

/// Nanoseconds of a clock that does not go back.
pub(crate) fn now() -> u64 {
    clock_ticks(ClockId::Monotonic, NS_PER_SEC)
}

/// See the module. All times are ns.
#[derive(Debug)]
pub(crate) struct Polling {
    max: u64,
    window: Mutex<Window>,
}

/// A while of looking that has begun.
#[derive(Debug)]
pub(crate) struct Look {
    /// When, ns of CLOCK_MONOTONIC.
    pub(crate) began: u64,
    /// Where the one before ended, if the worker has not slept since.
    since: Mark,
}

/// An instant of a thread's.
#[derive(Clone, Copy, Debug)]
struct Mark {
    /// ns of CLOCK_MONOTONIC.
    now: u64,
    /// How long the thread had run, ns.
    ran: u64,
}

impl Mark {
    fn here() -> Self {
        Mark {
            now: now(),
            ran: clock_ticks(ClockId::ThreadCPUTime, NS_PER_SEC),
        }
    }
}

impl Polling {
    /// Looks for `max` ns at most; 0 is not to look at all.
    pub(crate) fn new(max: u64) -> Self {
        Polling {
            max,
            window: Mutex::new(Window::new(max)),
        }
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest while.
    pub(crate) fn max(&self) -> u64 {
        self.max
    }

    /// RingScratch came. Returns for how long to look for more when it is done.
    pub(crate) fn kicked(&self) -> u64 {
        if self.max == 0 {
            return 0;
        }
        let now = now();
        let mut window = self.window();
        window.woken(now);
        window.at(now)
    }

    /// For how long to look, as things are.
    pub(crate) fn length(&self) -> u64 {
        if self.max == 0 {
            return 0;
        }
        self.window().at(now())
    }

    /// The worker begins to look, or goes on.
    pub(crate) fn begin(&self) -> Look {
        let here = Mark::here();
        Look {
            began: here.now,
            since: self.window().goes_on.take().unwrap_or(here),
        }
    }

    /// The worker stops looking: it `found` something or not, and has looked in vain for so long since.
    pub(crate) fn over(&self, look: &Look, found: bool, in_vain: u64) {
        let here = Mark::here();
        let mut window = self.window();
        window.looked(here.now, found);
        window.sleeps(here.now, in_vain);
        window.shared(look.since, here);
    }

    /// The worker looks again when others had their turn.
    pub(crate) fn goes_on(&self, look: &Look) {
        let here = Mark::here();
        let mut window = self.window();
        window.looked(here.now, true);
        window.shared(look.since, here);
        window.goes_on = Some(here);
    }

    /// The worker sleeps without having looked.
    pub(crate) fn sleeps(&self) {
        if self.max != 0 {
            self.window().sleeps(now(), 0);
        }
    }
}

/// How long to look, as it follows from what became of it.
#[derive(Debug)]
struct Window {
    max: u64,
    length: u64,
    /// Since when the worker sleeps, and how long it had looked in vain before.
    asleep: Option<(u64, u64)>,
    /// How often in a row it was looked in vain.
    vain: u32,
    held_until: u64,
    hold: u64,
    /// How long it was looked since that was judged last, and for how much of it others had the CPU.
    took: u64,
    lost: u64,
    /// Since when the worker is about to look again.
    goes_on: Option<Mark>,
}

impl Window {
    fn new(max: u64) -> Self {
        Window {
            max,
            length: 0,
            asleep: None,
            vain: 0,
            held_until: 0,
            hold: HOLD,
            took: 0,
            lost: 0,
            goes_on: None,
        }
    }

    fn at(&self, now: u64) -> u64 {
        if now < self.held_until {
            0
        } else {
            self.length
        }
    }

    fn looked(&mut self, now: u64, found: bool) {
        self.vain = if found { 0 } else { self.vain + 1 };
        if self.vain >= VAIN {
            self.disturbed(now);
        }
    }

    fn sleeps(&mut self, now: u64, in_vain: u64) {
        self.goes_on = None;
        self.asleep = Some((now, in_vain));
    }

    fn woken(&mut self, now: u64) {
        let Some((since, in_vain)) = self.asleep.take() else {
            return;
        };
        let idle = now.saturating_sub(since).saturating_add(in_vain);
        self.length = if idle <= self.max {
            let first = (self.max / 4).max(LEAST);
            self.length.saturating_mul(2).max(first).min(self.max)
        } else if self.length / 2 < LEAST {
            0
        } else {
            self.length / 2
        };
    }

    /// The thread was about looking, and whenever it did not run others had the CPU.
    fn shared(&mut self, since: Mark, here: Mark) {
        let took = here.now.saturating_sub(since.now);
        let ran = here.ran.saturating_sub(since.ran);
        self.took += took;
        self.lost += took.saturating_sub(ran);
        if self.took < TRIAL {
            return;
        }
        if self.lost > self.took / OTHERS {
            self.disturbed(here.now);
        }
        (self.took, self.lost) = (0, 0);
    }

    /// Others want the CPU: no more of it for a while, and for longer the sooner it happens again.
    fn disturbed(&mut self, now: u64) {
        let again = self.held_until != 0 && now < self.held_until.saturating_add(self.hold);
        self.hold = if again {
            self.hold.saturating_mul(2).min(LONGEST_HOLD)
        } else {
            HOLD
        };
        self.held_until = now.saturating_add(self.hold);
        self.length = 0;
        self.vain = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = 160_000;
    const FIRST: u64 = MAX / 4;

    /// Each time a request comes so long after the worker had nothing to do.
    fn requests(window: &mut Window, now: &mut u64, count: usize, idle: u64) {
        for _ in 0..count {
            let length = window.at(*now);
            let found = length > idle;
            *now += length.min(idle);
            if length != 0 {
                window.looked(*now, found);
            }
            if !found {
                window.sleeps(*now, length);
                *now += idle - length;
                window.woken(*now);
            }
        }
    }

    #[test]
    fn it_grows_until_it_pays_and_no_further() {
        let (mut window, mut now) = (Window::new(MAX), 1);
        requests(&mut window, &mut now, 1, FIRST + 1);
        assert_eq!(window.length, FIRST);
        requests(&mut window, &mut now, 50, FIRST + 1);
        assert_eq!(window.length, 2 * FIRST);
        requests(&mut window, &mut now, 50, MAX - 1);
        assert_eq!(window.length, MAX);
    }

    #[test]
    fn it_shrinks_to_nothing_where_work_comes_late() {
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
    fn where_others_want_the_cpu_it_waits_longer_and_longer() {
        let (mut window, mut now) = (Window::new(MAX), 1);
        requests(&mut window, &mut now, 10, FIRST + 1);
        for held in [HOLD, 2 * HOLD, 4 * HOLD] {
            window.disturbed(now);
            assert_eq!(window.at(now + held - 1), 0);
            now += held;
            requests(&mut window, &mut now, 10, FIRST + 1);
            assert_ne!(window.at(now), 0);
        }
        // Long undisturbed, it is as in the beginning.
        now += 100 * LONGEST_HOLD;
        window.disturbed(now);
        assert_eq!(window.held_until, now + HOLD);
    }

    #[test]
    fn it_gives_way_to_one_who_wants_the_cpu_and_not_to_one_who_runs_now_and_then() {
        let start = Mark { now: 1, ran: 1 };
        let after = |now, ran| Mark { now, ran };
        // A scheduler's slice of somebody else's in a while of looking.
        let mut window = Window::new(MAX);
        window.shared(start, after(MAX + 4_000_000, MAX));
        assert_eq!(window.held_until, MAX + 4_000_000 + HOLD);
        // A short turn in each of many such whiles, and then long ones.
        let mut window = Window::new(MAX);
        for _ in 0..1000 {
            window.shared(start, after(MAX, MAX - MAX / 10));
        }
        assert_eq!(window.held_until, 0);
        for _ in 0..1000 {
            window.shared(start, after(MAX, MAX / 2));
        }
        assert_ne!(window.held_until, 0);
    }

    #[test]
    fn a_driver_that_runs_only_when_the_worker_sleeps_is_let_run() {
        let (mut window, mut now) = (Window::new(MAX), 1);
        let mut looked = 0;
        let begin = now;
        while now < begin + 20 * LONGEST_HOLD {
            let length = window.at(now);
            now += length;
            looked += length;
            if length != 0 {
                window.looked(now, false);
            }
            window.sleeps(now, length);
            now += 5_000;
            window.woken(now);
        }
        assert!(looked < 20 * LONGEST_HOLD / 1000, "{looked}");
    }

    #[test]
    fn without_a_longest_while_there_is_none() {
        let polling = Polling::new(0);
        polling.sleeps();
        assert_eq!((polling.kicked(), polling.length()), (0, 0));
    }
}
