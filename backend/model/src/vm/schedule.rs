//! What a RUNNING VM's timers are about to do: which are due next, and which expiries the
//! frontend has yet to be told of.
//!
//! A line that rises by the passing of time is told once. A line that a register write raises
//! is not: the write's own answer says so.

use alloc::vec;
use alloc::vec::Vec;

use alloc::collections::VecDeque;
use core::hash::{Hash, Hasher};

use vhost_user_timer_protocol::Timeline;

use super::deadlines::Deadlines;
use super::timer::Timer;

/// The timers of every vCPU, by [`Timeline::index`].
pub(super) type Timers = [Timer; 2];

/// How far one timer's expiry is on its way to the frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Expiry {
    /// The line rose and nobody was told.
    untold: bool,
    /// The timer has its place in the queue; it has one at most.
    queued: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Schedule {
    deadlines: [Deadlines; 2],
    /// The counts up to which expiries have been found.
    seen: [u64; 2],
    expiries: Vec<[Expiry; 2]>,
    queue: VecDeque<(u32, Timeline)>,
}

impl Schedule {
    /// The schedule of a VM that begins to run at these counts. Every line that stands high
    /// is told.
    pub(super) fn start<'a>(
        timers: impl ExactSizeIterator<Item = &'a Timers> + Clone,
        counts: [u64; 2],
    ) -> Self {
        let vcpus = timers.len();
        let mut schedule = Schedule {
            deadlines: [Deadlines::new(vcpus), Deadlines::new(vcpus)],
            seen: counts,
            expiries: vec![Default::default(); vcpus],
            queue: VecDeque::with_capacity(2 * vcpus),
        };
        for clock in Timeline::ALL {
            schedule.begin_lap(clock, timers.clone(), counts[clock.index()], |_| true);
        }
        schedule
    }

    /// Finds all expiries up to these counts. Constant time where there are none.
    pub(super) fn advance<'a>(
        &mut self,
        timers: impl ExactSizeIterator<Item = &'a Timers> + Clone,
        counts: [u64; 2],
    ) {
        for clock in Timeline::ALL {
            let count = counts[clock.index()];
            let seen = core::mem::replace(&mut self.seen[clock.index()], count);
            if count < seen {
                // The count wrapped, and with that every line fell but those that every count
                // holds high.
                self.deadlines[clock.index()].clear();
                self.begin_lap(clock, timers.clone(), count, |timer| timer.cval > 0);
            } else {
                while let Some(vcpu) = self.deadlines[clock.index()].pop_due(count) {
                    self.tell(vcpu, clock);
                }
            }
        }
    }

    /// Takes all armed timers in: of those that are due at `count` the ones that `rose` are
    /// told, the rest wait.
    fn begin_lap<'a>(
        &mut self,
        clock: Timeline,
        timers: impl Iterator<Item = &'a Timers>,
        count: u64,
        rose: impl Fn(Timer) -> bool,
    ) {
        for (vcpu, timers) in (0_u32..).zip(timers) {
            let timer = timers[clock.index()];
            if !timer.line(count) {
                self.expiries[vcpu as usize][clock.index()].untold = false;
                if timer.armed() {
                    self.deadlines[clock.index()].set(vcpu, timer.cval);
                }
            } else if rose(timer) {
                self.tell(vcpu, clock);
            }
        }
    }

    /// Takes in that a register write changed this timer. What it did before was found by
    /// [`advance`](Self::advance) at the same counts.
    pub(super) fn rewritten(&mut self, vcpu: u32, clock: Timeline, timer: Timer) {
        let deadlines = &mut self.deadlines[clock.index()];
        if timer.line(self.seen[clock.index()]) {
            deadlines.remove(vcpu);
        } else {
            self.expiries[vcpu as usize][clock.index()].untold = false;
            if timer.armed() {
                deadlines.set(vcpu, timer.cval);
            } else {
                deadlines.remove(vcpu);
            }
        }
    }

    /// Notes that the line is high and the frontend must hear of it.
    pub(super) fn tell(&mut self, vcpu: u32, clock: Timeline) {
        let expiry = &mut self.expiries[vcpu as usize][clock.index()];
        expiry.untold = true;
        if !core::mem::replace(&mut expiry.queued, true) {
            self.queue.push_back((vcpu, clock));
        }
    }

    /// Takes out the next timer of which the frontend must hear. Its line may have fallen
    /// since, if the count wrapped.
    pub(super) fn next_untold(&mut self) -> Option<(u32, Timeline)> {
        loop {
            let (vcpu, clock) = self.queue.pop_front()?;
            let expiry = core::mem::take(&mut self.expiries[vcpu as usize][clock.index()]);
            if expiry.untold {
                return Some((vcpu, clock));
            }
        }
    }

    /// Whether [`next_untold`](Self::next_untold) may have something.
    pub(super) fn has_untold(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Ticks from these counts to the next instant at which something can happen: a timer falls
    /// due, or a count wraps and lines fall. 0 where that has happened since the last
    /// [`advance`](Self::advance).
    pub(super) fn ticks_to_next(&self, counts: [u64; 2]) -> u64 {
        let ticks = |clock: Timeline| {
            let seen = self.seen[clock.index()];
            let due = self.deadlines[clock.index()].first().unwrap_or(0);
            match due.wrapping_sub(seen) {
                // A whole lap of 2^64 ticks.
                0 => u64::MAX,
                ticks => ticks.saturating_sub(counts[clock.index()].wrapping_sub(seen)),
            }
        };
        ticks(Timeline::Virtual).min(ticks(Timeline::Physical))
    }
}

/// The deadlines follow from the timers and the counts seen, and how their heap is laid out
/// from how they got there: it is no part of what a schedule is.
impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        (self.seen, &self.expiries, &self.queue) == (other.seen, &other.expiries, &other.queue)
    }
}

impl Eq for Schedule {}

impl Hash for Schedule {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.seen, &self.expiries, &self.queue).hash(state);
    }
}
