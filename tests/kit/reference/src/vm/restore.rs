//! Restores (SPEC.md, section 7).

use super::registers::Timer;
use super::{Clock, NS, Notice, PHYSICAL, Reference, Refusal};
use crate::contract::{phase, restore, status};

/// A restore that is open, or that has armed the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Restore {
    flags: u32,
    saved_realtime_ns: u64,
    /// 0 once it has passed.
    pub(super) timeout_ns: u64,
    /// Ticks since RESTORE_BEGIN, modulo 2^64 like all time.
    pub(super) waited: u64,
    /// The VM from before, for RESTORE_ABORT: its clocks at RESTORE_BEGIN, and the rest.
    clocks: [Clock; 2],
    pinned: bool,
    physical_is_own: bool,
    timers: Vec<[Timer; 2]>,
}

impl Reference {
    /// Puts the VM from before the restore back, as if its clocks had gone on.
    fn put_back(&mut self) {
        let Some(restore) = self.restore.take() else {
            return;
        };
        self.clocks = restore.clocks;
        for clock in self.clocks.iter_mut().filter(|clock| clock.counting) {
            clock.count = clock.count.wrapping_add(restore.waited);
        }
        self.pinned = restore.pinned;
        self.physical_is_own = restore.physical_is_own;
        for (vcpu, timers) in self.vcpus.iter_mut().zip(restore.timers) {
            vcpu.timers = timers;
        }
        self.nothing_set();
    }

    fn nothing_set(&mut self) {
        for vcpu in &mut self.vcpus {
            vcpu.set = [None; 6];
            vcpu.done = false;
        }
    }

    pub(super) fn restore_begin(&mut self, flags: u32, saved_realtime_ns: u64, timeout_ns: u64) {
        if self.phase == phase::ARMED && self.restore.is_none() {
            self.freeze();
        }
        self.put_back();
        self.nothing_set();
        self.restore = Some(Restore {
            flags,
            saved_realtime_ns,
            timeout_ns,
            waited: 0,
            clocks: self.clocks,
            pinned: self.pinned,
            physical_is_own: self.physical_is_own,
            timers: self.vcpus.iter().map(|vcpu| vcpu.timers).collect(),
        });
        for clock in &mut self.clocks {
            clock.counting = false;
        }
        self.pinned = false;
        self.epoch += 1;
        self.release(status::ESTALE, 0);
        self.enter(phase::RESTORING);
    }

    pub(super) fn restore_abort(&mut self) {
        self.put_back();
        self.enter(phase::PAUSED);
        self.release(status::ECANCELED, 0);
    }

    /// These vCPUs are done. Returns how many are missing.
    pub(super) fn restore_done(&mut self, vcpus: &[u32]) -> Result<u32, Refusal> {
        for vcpu in vcpus {
            let lacks = self.lacks(*vcpu);
            if lacks != 0 {
                return Err((status::ENODATA, lacks));
            }
        }
        for vcpu in vcpus {
            self.vcpus[*vcpu as usize].done = true;
        }
        let remaining = self.missing().len() as u32;
        if remaining == 0 && self.phase == phase::RESTORING {
            self.settle()?;
        }
        Ok(remaining)
    }

    /// The last vCPU is done: settles the counts and ends the restore.
    fn settle(&mut self) -> Result<(), Refusal> {
        let Some(open) = self.restore.clone() else {
            return Ok(());
        };
        let brought = [1, 4].map(|register| {
            let all = self.vcpus.iter().filter_map(|vcpu| vcpu.set[register]);
            all.collect::<Vec<u64>>()
        });
        if !self.pinned {
            let looked_at = if self.one_offset { 1 } else { 2 };
            for counts in &brought[..looked_at] {
                let unequal = counts.iter().any(|count| *count != counts[0]);
                if open.flags & restore::STRICT != 0 && unequal {
                    return Err((status::EINVAL, 0));
                }
            }
            self.settle_counts(&open, brought);
        }
        let to = match open.flags & restore::AUTORUN {
            0 => phase::PAUSED,
            _ => self.running_or_armed(),
        };
        if to != phase::ARMED {
            self.restore = None;
        }
        self.enter(to);
        Ok(())
    }

    fn settle_counts(&mut self, open: &Restore, brought: [Vec<u64>; 2]) {
        let elapsed = match open.flags & restore::ELAPSED {
            0 => 0,
            _ => self.elapsed_since(open.saved_realtime_ns),
        };
        self.physical_is_own |= !brought[PHYSICAL].is_empty();
        let one_offset = self.one_offset;
        if let (true, Some(virt), Some(phys)) =
            (one_offset, brought[0].iter().max(), brought[1].iter().max())
            && virt != phys
        {
            let ticks = virt.wrapping_sub(*phys) as i64;
            self.notices.push(Notice::PhysicalCountMoved { ticks });
        }
        for (clock, counts) in self.clocks.iter_mut().zip(brought) {
            let settled = counts.into_iter().max().unwrap_or(clock.count);
            clock.count = settled.wrapping_add(elapsed);
        }
        if one_offset {
            self.clocks[PHYSICAL] = self.clocks[0];
        } else if !self.physical_is_own {
            self.clocks[PHYSICAL] = Clock {
                count: self.host,
                counting: true,
            };
        }
    }

    /// Ticks for the wall-clock time since then; at most what a counter can hold.
    fn elapsed_since(&mut self, saved_realtime_ns: u64) -> u64 {
        match self.realtime_ns.checked_sub(saved_realtime_ns) {
            Some(ns) => {
                let ticks = u128::from(ns) * u128::from(self.frequency) / NS;
                ticks.min(u128::from(u64::MAX)) as u64
            }
            None => {
                self.notices.push(Notice::RealtimeWentBack {
                    ns: saved_realtime_ns - self.realtime_ns,
                });
                0
            }
        }
    }
}
