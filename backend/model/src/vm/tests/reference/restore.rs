//! The naive VM's restores.

use vhost_user_timer_protocol::{Phase, Status};

use super::{Clock, Reference, Refused, Restore};
use crate::vm::Notice;
use crate::vm::tests::rig::HZ;

impl Reference {
    /// Puts the state from before the restore back, as if its clocks had gone on.
    pub(super) fn put_back(&mut self) {
        let restore = self.restore.clone().unwrap();
        self.clocks = restore.clocks;
        for clock in &mut self.clocks {
            if clock.moving {
                clock.count = clock.count.wrapping_add(restore.aside);
            }
        }
        self.pinned = restore.pinned;
        self.own_physical = restore.own_physical;
        for (vcpu, timers) in self.vcpus.iter_mut().zip(restore.timers) {
            vcpu.timers = timers;
            vcpu.set = [None; 6];
            vcpu.done = false;
        }
    }

    pub(super) fn begin(&mut self, flags: u32, saved_ns: u64, timeout_ns: u64) {
        if self.restore.is_some() {
            self.put_back();
        }
        for vcpu in &mut self.vcpus {
            vcpu.set = [None; 6];
            vcpu.done = false;
        }
        self.restore = Some(Restore {
            clocks: self.clocks,
            pinned: self.pinned,
            own_physical: self.own_physical,
            timers: self.vcpus.iter().map(|vcpu| vcpu.timers).collect(),
            aside: 0,
            flags,
            saved_ns,
            timeout_ns,
            waited: 0,
        });
        self.clocks
            .iter_mut()
            .for_each(|clock| clock.moving = false);
        self.pinned = false;
        self.epoch += 1;
        self.release(Status::Stale, 0);
        self.enter(Phase::Restoring);
    }

    pub(super) fn restore_done(&mut self, vcpu: usize) -> Result<Vec<u8>, Refused> {
        let needed: &[usize] = if self.pinned { &[0, 2] } else { &[0, 1, 2] };
        // A count that was ignored since the offset is pinned is not needed either.
        let lacks = needed
            .iter()
            .filter(|register| self.vcpus[vcpu].set[**register].is_none());
        let lacks: u32 = lacks.map(|register| 1 << register).sum();
        if lacks != 0 {
            return Err((Status::Incomplete, lacks));
        }
        self.vcpus[vcpu].done = true;
        let missing = self.missing().len() as u32;
        let answer = [missing.to_le_bytes(), [0; 4]].concat();
        if missing > 0 {
            return Ok(answer);
        }
        let restore = self.restore.clone().unwrap();
        let brought = [1, 4].map(|register| {
            let all = self.vcpus.iter().filter_map(|vcpu| vcpu.set[register]);
            all.collect::<Vec<u64>>()
        });
        if !self.pinned {
            for counts in &brought {
                if restore.flags & 2 != 0 && counts.iter().any(|count| *count != counts[0]) {
                    return Err((Status::Invalid, 0));
                }
            }
            self.settle(&restore, brought);
        }
        self.restore = None;
        self.enter(match restore.flags & 1 {
            0 => Phase::Paused,
            _ => Phase::Running,
        });
        Ok(answer)
    }

    fn settle(&mut self, restore: &Restore, brought: [Vec<u64>; 2]) {
        let mut elapsed = 0;
        if restore.flags & 4 != 0 {
            if self.realtime_ns < restore.saved_ns {
                self.notices.push(Notice::RealtimeWentBack {
                    ns: restore.saved_ns - self.realtime_ns,
                });
            } else {
                let ns = u128::from(self.realtime_ns - restore.saved_ns);
                elapsed = ns * u128::from(self.frequency) / u128::from(HZ);
            }
        }
        self.own_physical |= !brought[1].is_empty();
        for (clock, counts) in self.clocks.iter_mut().zip(brought) {
            if let Some(largest) = counts.into_iter().max() {
                clock.count = largest;
            }
            clock.count = clock
                .count
                .wrapping_add(elapsed.min(u128::from(u64::MAX)) as u64);
        }
        if !self.own_physical {
            self.clocks[1] = Clock {
                count: self.host,
                moving: true,
            };
        }
    }
}
