//! The timers of a RUNNING VM: which are due next, and which expiries are pending, that is not yet
//! reported to the frontend.
//!
//! A line that rises by the passing of time is reported once. A line that a register write raises
//! is not: the write's own answer says so.

use alloc::vec;
use alloc::vec::Vec;

use alloc::collections::VecDeque;
use core::hash::{Hash, Hasher};

use vhost_user_timer_protocol::Timeline;

use super::clock::ByTimeline;
use super::deadlines::Deadlines;
use super::timer::{Timer, Timers};

/// How far the report of one timer's expiry has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Expiry {
    /// The line rose, and that is not reported yet.
    pending: bool,
    /// The timer has its place in the queue; it has one at most.
    queued: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Schedule {
    deadlines: ByTimeline<Deadlines>,
    /// The counts up to which expiries have been found.
    seen: ByTimeline<u64>,
    expiries: Vec<ByTimeline<Expiry>>,
    queue: VecDeque<(u32, Timeline)>,
}

impl Schedule {
    /// The schedule of a VM that begins to run at these counts. Every line that is high
    /// is reported.
    pub(super) fn start<'a>(
        timers: impl ExactSizeIterator<Item = &'a Timers> + Clone,
        counts: ByTimeline<u64>,
    ) -> Self {
        let vcpus = timers.len();
        let mut schedule = Schedule {
            deadlines: Timeline::ALL.map(|_| Deadlines::new(vcpus)),
            seen: counts,
            expiries: vec![Default::default(); vcpus],
            queue: VecDeque::with_capacity(2 * vcpus),
        };
        for timeline in Timeline::ALL {
            schedule.begin_lap(timeline, timers.clone(), counts[timeline.index()], |_| true);
        }
        schedule
    }

    /// Finds all expiries up to these counts. Constant time where there are none.
    pub(super) fn advance<'a>(
        &mut self,
        timers: impl ExactSizeIterator<Item = &'a Timers> + Clone,
        counts: ByTimeline<u64>,
    ) {
        for timeline in Timeline::ALL {
            let count = counts[timeline.index()];
            let seen = core::mem::replace(&mut self.seen[timeline.index()], count);
            if count < seen {
                // The count wrapped, and with that every line fell but those that every count
                // holds high.
                self.deadlines[timeline.index()].clear();
                self.begin_lap(timeline, timers.clone(), count, |timer| timer.cval > 0);
            } else {
                while let Some(vcpu) = self.deadlines[timeline.index()].pop_due(count) {
                    self.report(vcpu, timeline);
                }
            }
        }
    }

    /// Takes in all armed timers. Of those that are due at `count`, the ones that `rose` are
    /// reported; the others wait for their deadline.
    fn begin_lap<'a>(
        &mut self,
        timeline: Timeline,
        timers: impl Iterator<Item = &'a Timers>,
        count: u64,
        rose: impl Fn(Timer) -> bool,
    ) {
        for (vcpu, timers) in (0_u32..).zip(timers) {
            let timer = timers[timeline.index()];
            if !timer.line(count) {
                self.expiries[vcpu as usize][timeline.index()].pending = false;
                if timer.armed() {
                    self.deadlines[timeline.index()].set(vcpu, timer.cval);
                }
            } else if rose(timer) {
                self.report(vcpu, timeline);
            }
        }
    }

    /// A register write changed this timer. [`advance`](Self::advance) was called before, at the
    /// same counts.
    pub(super) fn timer_changed(&mut self, vcpu: u32, timeline: Timeline, timer: Timer) {
        let deadlines = &mut self.deadlines[timeline.index()];
        if timer.line(self.seen[timeline.index()]) {
            deadlines.remove(vcpu);
        } else {
            self.expiries[vcpu as usize][timeline.index()].pending = false;
            if timer.armed() {
                deadlines.set(vcpu, timer.cval);
            } else {
                deadlines.remove(vcpu);
            }
        }
    }

    /// The line is high, and that is to be reported.
    pub(super) fn report(&mut self, vcpu: u32, timeline: Timeline) {
        let expiry = &mut self.expiries[vcpu as usize][timeline.index()];
        expiry.pending = true;
        if !core::mem::replace(&mut expiry.queued, true) {
            self.queue.push_back((vcpu, timeline));
        }
    }

    /// Takes out the next timer whose expiry is to be reported. Its line may have fallen since, if
    /// the count wrapped.
    pub(super) fn next_pending(&mut self) -> Option<(u32, Timeline)> {
        loop {
            let (vcpu, timeline) = self.queue.pop_front()?;
            let expiry = core::mem::take(&mut self.expiries[vcpu as usize][timeline.index()]);
            if expiry.pending {
                return Some((vcpu, timeline));
            }
        }
    }

    /// Whether [`next_pending`](Self::next_pending) may have something.
    pub(super) fn has_pending(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Ticks from these counts to the next instant at which something can happen: a timer falls
    /// due, or a count wraps and lines fall. 0 where that has happened since the last
    /// [`advance`](Self::advance).
    pub(super) fn ticks_to_next(&self, counts: ByTimeline<u64>) -> u64 {
        let ticks = |timeline: Timeline| {
            let seen = self.seen[timeline.index()];
            let due = self.deadlines[timeline.index()].first().unwrap_or(0);
            match due.wrapping_sub(seen) {
                // A whole lap of 2^64 ticks.
                0 => u64::MAX,
                ticks => ticks.saturating_sub(counts[timeline.index()].wrapping_sub(seen)),
            }
        };
        ticks(Timeline::Virtual).min(ticks(Timeline::Physical))
    }
}

/// The deadlines are left out: they follow from the timers and the counts seen, and the layout of
/// their heap depends on the order in which they were set.
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
