//! A thread that reads the counter without end, and compares each reading with all that were made
//! before, on any vCPU.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::pin;
use crate::counter;

/// The number of gaps that are kept of each reader: the newest.
const GAPS: usize = 1 << 16;

/// The number of readings after which a reader checks where it runs. A thread whose CPU goes
/// offline is moved, and Linux does not move it back.
const PIN_CHECK: u64 = 1 << 12;

/// Two consecutive readings that are far apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub(super) before: u64,
    pub(super) after: u64,
}

/// The newest gaps.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    kept: VecDeque<Gap>,
    /// The end of the newest that is not kept.
    pub(super) dropped_until: u64,
    longest: Option<Gap>,
}

impl Gaps {
    fn push(&mut self, gap: Gap) {
        if self.kept.len() == GAPS {
            let dropped = self.kept.pop_front();
            self.dropped_until = dropped.map_or(0, |gap| gap.after);
        }
        self.kept.push_back(gap);
        let length = |gap: Gap| gap.after - gap.before;
        if self
            .longest
            .is_none_or(|longest| length(gap) > length(longest))
        {
            self.longest = Some(gap);
        }
    }

    /// The gap from at most `from` to at least `to`: no reading lies between these.
    pub(super) fn around(&self, from: u64, to: u64) -> Option<Gap> {
        let mut newest_first = self.kept.iter().rev();
        newest_first
            .find(|gap| gap.before <= from && gap.after >= to)
            .copied()
    }
}

/// What a reader has seen.
#[derive(Debug, Default)]
pub(super) struct Reader {
    readings: AtomicU64,
    last: AtomicU64,
    /// Readings below this reader's previous one.
    below_own: AtomicU64,
    /// Readings below one that another reader had published before.
    below_other: AtomicU64,
    /// How far below, at most, in ticks.
    worst: AtomicU64,
    gaps: Mutex<Gaps>,
}

impl Reader {
    /// Reads without end, on this CPU. `published` is the highest reading of all readers.
    pub(super) fn run(&self, cpu: usize, published: &AtomicU64, threshold: u64) -> ! {
        loop {
            pin(cpu);
            for _ in 0..PIN_CHECK {
                self.read(published, threshold);
            }
        }
    }

    fn read(&self, published: &AtomicU64, threshold: u64) {
        let seen = published.load(Ordering::Acquire);
        let now = counter::read_after(seen);
        self.judge(seen, now, threshold);
        published.fetch_max(now, Ordering::Release);
    }

    /// Takes a reading that was made when `seen` had been published.
    fn judge(&self, seen: u64, now: u64, threshold: u64) {
        // No other thread writes these, so that a plain store after a load is enough.
        let add = |number: &AtomicU64| {
            number.store(number.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        };
        let last = self.last.load(Ordering::Relaxed);
        if now < last {
            add(&self.below_own);
        }
        if now < seen {
            add(&self.below_other);
        }
        self.worst
            .fetch_max(seen.max(last).saturating_sub(now), Ordering::Relaxed);
        if last != 0 && now.saturating_sub(last) >= threshold {
            let gap = Gap {
                before: last,
                after: now,
            };
            self.lock().push(gap);
        }
        // After the gap: a thread that sees this reading finds the gap before it.
        self.last.store(now, Ordering::Release);
        add(&self.readings);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Gaps> {
        self.gaps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last reading.
    pub(super) fn last(&self) -> u64 {
        self.last.load(Ordering::Acquire)
    }

    /// All that is known, as `key=value`.
    pub(super) fn report(&self) -> String {
        let [readings, last, below_own, below_other, worst] = [
            &self.readings,
            &self.last,
            &self.below_own,
            &self.below_other,
            &self.worst,
        ]
        .map(|number| number.load(Ordering::Relaxed));
        let gaps = self.lock();
        let longest = gaps.longest.map_or(0, |gap| gap.after - gap.before);
        format!(
            "readings={readings} last={last} below_own={below_own} below_other={below_other} \
             worst={worst} longest_gap={longest}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_below_the_own_last_or_a_published_one_is_counted_with_the_worst() {
        let reader = Reader::default();
        for (seen, now) in [(0, 100), (100, 90), (300, 95), (95, 95)] {
            reader.judge(seen, now, 1000);
        }
        assert_eq!(
            reader.report(),
            "readings=4 last=95 below_own=1 below_other=2 worst=205 longest_gap=0"
        );
    }

    #[test]
    fn the_gap_around_two_counts_is_found_and_only_where_no_reading_lies_between() {
        let reader = Reader::default();
        for now in [100, 150, 400, 405, 500] {
            reader.judge(0, now, 50);
        }
        let around = |from, to| reader.lock().around(from, to);
        let gap = |before, after| Some(Gap { before, after });
        assert_eq!(around(150, 400), gap(150, 400));
        assert_eq!(around(160, 390), gap(150, 400));
        assert_eq!(around(400, 410), None);
        assert_eq!(around(405, 410), gap(405, 500));
        assert_eq!(around(140, 200), None);
    }

    #[test]
    fn the_newest_gaps_are_kept_and_it_is_known_since_when() {
        let mut gaps = Gaps::default();
        for before in 0..=GAPS as u64 {
            gaps.push(Gap {
                before,
                after: before + 1,
            });
        }
        assert_eq!(gaps.kept.len(), GAPS);
        assert_eq!(gaps.dropped_until, 1);
    }
}
