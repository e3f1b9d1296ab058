//! How a restore opens, ends and is aborted, and how an armed VM comes to run.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use vhost_user_timer_protocol::{Status, Timeline, wire};

use super::call::{Notice, Refusal};
use super::clock::{ByTimeline, Clock, Now, ticks_of_ns, ticks_to_pass};
use super::configured::{Configured, Open, State};
use super::restore::{Restore, Settled, Staged, Terms};

impl Configured {
    /// The VM is PAUSED; gives the restore, if there was one.
    fn take_open(&mut self) -> Option<Open> {
        match core::mem::replace(&mut self.state, State::Paused) {
            State::Restoring(open) | State::Armed(Some(open)) => Some(open),
            _ => None,
        }
    }

    /// Opens a restore, or starts the restore over.
    pub(super) fn begin_restore(&mut self, begin: &wire::RestoreBegin, host: u64) {
        if matches!(self.state, State::Armed(None)) {
            self.pause(false, host);
        }
        let before = match self.take_open() {
            Some(open) => {
                self.clone_from(&open.before);
                open.before
            }
            None => Box::new(self.clone()),
        };
        let timeout_ns = begin.timeout_ns.get();
        let terms = Terms {
            flags: begin.flags.get(),
            saved_realtime_ns: begin.saved_realtime_ns.get(),
            began: host,
            timeout: (timeout_ns != 0).then(|| ticks_to_pass(timeout_ns, self.frequency)),
        };
        let staged = vec![Staged::default(); self.vcpus.len()];
        self.open_restore(Restore::open(terms, staged), before, host);
    }

    /// Opens `restore`: both clocks stand still from here on, and no offset is decided.
    pub(super) fn open_restore(&mut self, restore: Restore, before: Box<Configured>, host: u64) {
        self.pinned = false;
        for timeline in Timeline::ALL {
            self.freeze(timeline, host);
        }
        self.state = State::Restoring(Open { restore, before });
    }

    /// Aborts the restore: everything is as it was before.
    pub(super) fn abort_restore(&mut self) {
        if let Some(open) = self.take_open() {
            *self = *open.before;
        }
    }

    /// Whether these vCPUs can be done, with what the entries bring. If they are the last, what all
    /// vCPUs brought then. `named` says whether a vCPU is among the entries.
    pub(super) fn may_be_done(
        &self,
        entries: &[wire::Vcpu],
        named: impl Fn(usize) -> bool,
    ) -> Result<Option<ByTimeline<Settled>>, Refusal> {
        let restore = self.restore().ok_or(Status::Busy)?;
        let missing = |entry| restore.lacks(entry, self.abi, self.pinned);
        if let Some(missing) = entries.iter().map(missing).find(|missing| *missing != 0) {
            return Err(Refusal::new(Status::Incomplete, missing));
        }
        if !restore.would_complete(entries) {
            return Ok(None);
        }
        if self.pinned {
            return Ok(Some(Default::default()));
        }
        let settled =
            Timeline::ALL.map(|timeline| restore.settled_count(timeline, entries, &named));
        let unequal = Timeline::ALL
            .into_iter()
            .filter(|timeline| !self.follows(*timeline))
            .any(|timeline| !settled[timeline.index()].equal);
        match restore.strict() && unequal {
            true => Err(Status::Invalid.into()),
            false => Ok(Some(settled)),
        }
    }

    /// These vCPUs are done, as [`may_be_done`](Self::may_be_done) allowed, and what they bring is
    /// staged. Returns how many vCPUs are missing.
    pub(super) fn done(
        &mut self,
        entries: &[wire::Vcpu],
        settled: Option<ByTimeline<Settled>>,
        now: Now,
        notices: &mut Vec<Notice>,
    ) -> u32 {
        let remaining = self.restore_mut().map_or(0, |restore| {
            restore.set_done(entries);
            restore.remaining()
        });
        if let Some(settled) = settled {
            self.complete_restore(settled, now, notices);
        }
        remaining
    }

    /// Closes the restore after its last vCPU. `settled` are the counts that the vCPUs brought.
    fn complete_restore(
        &mut self,
        settled: ByTimeline<Settled>,
        now: Now,
        notices: &mut Vec<Notice>,
    ) {
        let State::Restoring(open) = core::mem::replace(&mut self.state, State::Paused) else {
            return;
        };
        if !self.pinned {
            let [virt, phys] = settled.map(|settled| settled.count);
            let elapsed = self.elapsed(&open.restore, now, notices);
            self.phys_virtualised |= phys.is_some();
            let counts = match (self.flags.one_offset, virt, phys) {
                (false, ..) => [virt, phys],
                (true, Some(own), Some(other)) if own != other => {
                    notices.push(Notice::PhysicalCountMoved {
                        ticks: own.wrapping_sub(other).cast_signed(),
                    });
                    [virt, virt]
                }
                (true, ..) => [virt, virt],
            };
            for (clock, brought) in self.clocks.iter_mut().zip(counts) {
                let count = brought.unwrap_or(clock.count(now.host));
                *clock = Clock::Frozen {
                    count: count.wrapping_add(elapsed),
                };
            }
            if !self.phys_virtualised {
                self.clocks[Timeline::Physical.index()] = Clock::PASSED_THROUGH;
            }
        }
        if open.restore.autorun() {
            self.start_counting(Some(open), now.host);
        }
    }

    /// What ELAPSED adds to the counts, in ticks.
    fn elapsed(&self, restore: &Restore, now: Now, notices: &mut Vec<Notice>) -> u64 {
        if !restore.elapsed() {
            return 0;
        }
        let saved = restore.terms.saved_realtime_ns;
        match now.realtime_ns.checked_sub(saved) {
            Some(ns) => ticks_of_ns(ns, self.frequency),
            None => {
                notices.push(Notice::RealtimeWentBack {
                    ns: saved - now.realtime_ns,
                });
                0
            }
        }
    }
}
