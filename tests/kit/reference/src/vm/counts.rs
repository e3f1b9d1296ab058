//! The passing of time (SPEC.md, sections 4 and 8).

use super::{NS, Notice, Reference};
use crate::contract::{phase, status};

impl Reference {
    /// Time passes: ticks of the host counter, and nanoseconds of CLOCK_REALTIME.
    pub fn pass(&mut self, ticks: u64, ns: u64) {
        self.host = self.host.wrapping_add(ticks);
        self.realtime_ns = self.realtime_ns.wrapping_add(ns);
        if let Some(restore) = &mut self.restore {
            restore.waited = restore.waited.wrapping_add(ticks);
        }
        for (n, clock) in self.clocks.iter_mut().enumerate() {
            if !clock.counting {
                continue;
            }
            let before = clock.count;
            let (after, wrapped) = before.overflowing_add(ticks);
            clock.count = after;
            for vcpu in &mut self.vcpus {
                let timer = &mut vcpu.timers[n];
                // A count that wraps is 0 on the way.
                let low_between = wrapped && !timer.line(0);
                let rose = timer.line(after) && (!timer.line(before) || low_between);
                timer.to_report |= rose && self.phase == phase::RUNNING;
                timer.to_report &= timer.line(after);
            }
        }
    }

    /// The backend looks at the time: a restore may have timed out.
    pub fn notice_time(&mut self) {
        let missing = self.missing();
        let frequency = u128::from(self.frequency);
        let Some(restore) = &mut self.restore else {
            return;
        };
        let timeout = u128::from(restore.timeout_ns);
        let over = u128::from(restore.waited) * NS >= timeout * frequency;
        // The longest time-outs are cut to what a counter can hold.
        let over = over || restore.waited == u64::MAX;
        if timeout != 0 && over {
            restore.timeout_ns = 0;
            let detail = missing.len() as u32;
            self.notices.push(Notice::RestoreTimedOut {
                missing,
                vcpus: self.vcpus(),
            });
            self.release(status::ETIMEDOUT, detail);
        }
    }

    /// The host counter reads this from now on, and nothing in between is noticed: a counting
    /// clock keeps its offset, a frozen one its count.
    pub fn set_host(&mut self, host: u64) {
        let by = host.wrapping_sub(self.host);
        for clock in self.clocks.iter_mut().filter(|clock| clock.counting) {
            clock.count = clock.count.wrapping_add(by);
        }
        if let Some(restore) = &mut self.restore {
            restore.waited = restore.waited.wrapping_add(by);
        }
        self.host = host;
    }

    /// The counts are these, whatever they were. For an observer who knew them only roughly.
    pub fn set_counts(&mut self, counts: [u64; 2]) {
        for (clock, count) in self.clocks.iter_mut().zip(counts) {
            clock.count = count;
        }
    }
}
