//! A restore: what each vCPU has brought, and which vCPUs are missing.

use alloc::vec::Vec;

use vhost_user_timer_protocol::wire::{self, restore_flags};
use vhost_user_timer_protocol::{Abi, Register, Role, Timeline};

use super::clock::ByTimeline;

/// What one vCPU has brought in this epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Staged {
    /// The registers that were set, as [`present`](vhost_user_timer_protocol::wire::present) bits.
    pub(super) present: u32,
    /// RESTORE_DONE was answered.
    pub(super) done: bool,
    pub(super) counts: ByTimeline<u64>,
}

impl Staged {
    pub(super) fn count(&self, timeline: Timeline) -> Option<u64> {
        let register = Register::of(timeline, Role::Count);
        (self.present & register.present_bit() != 0).then(|| self.counts[timeline.index()])
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Restore {
    pub(super) staged: Vec<Staged>,
    pub(super) terms: Terms,
    done: u32,
    /// The time-out has passed.
    overdue: bool,
}

/// What RESTORE_BEGIN asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Terms {
    /// [`restore_flags`].
    pub(super) flags: u32,
    pub(super) saved_realtime_ns: u64,
    /// The host counter at RESTORE_BEGIN.
    pub(super) began: u64,
    /// Ticks after which waiters are answered with ETIMEDOUT.
    pub(super) timeout: Option<u64>,
}

/// What the vCPUs brought of one timeline's count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settled {
    /// The largest count; `None` if no vCPU brought any.
    pub(super) count: Option<u64>,
    /// All brought the same.
    pub(super) equal: bool,
}

impl Default for Settled {
    fn default() -> Self {
        Settled {
            count: None,
            equal: true,
        }
    }
}

impl Restore {
    /// A restore to which each vCPU has brought this much.
    pub(super) fn open(terms: Terms, staged: Vec<Staged>) -> Self {
        Restore {
            terms,
            done: staged.iter().filter(|staged| staged.done).count() as u32,
            staged,
            overdue: false,
        }
    }

    pub(super) fn autorun(&self) -> bool {
        self.terms.flags & restore_flags::AUTORUN != 0
    }

    pub(super) fn elapsed(&self) -> bool {
        self.terms.flags & restore_flags::ELAPSED != 0
    }

    pub(super) fn done(&self) -> u32 {
        self.done
    }

    pub(super) fn remaining(&self) -> u32 {
        self.staged.len() as u32 - self.done
    }

    /// The vCPUs that are not done, in index order.
    pub(super) fn missing(&self) -> impl Iterator<Item = u32> {
        (0..)
            .zip(&self.staged)
            .filter(|(_, staged)| !staged.done)
            .map(|(vcpu, _)| vcpu)
    }

    /// The registers that this entry's vCPU must still set before it can be done, besides those of
    /// the entry, as [`present`](wire::present) bits: all of the virtual timeline, without the
    /// count where the offset is pinned.
    pub(super) fn lacks(&self, entry: &wire::Vcpu, abi: Abi, pinned: bool) -> u32 {
        let registers = abi.registers().iter().map(|(register, _)| register);
        let needed = registers
            .filter(|register| register.timeline() == Timeline::Virtual)
            .filter(|register| !(pinned && register.role() == Role::Count))
            .fold(0, |bits, register| bits | register.present_bit());
        needed & !entry.present.get() & !self.of(entry).present
    }

    /// What this entry's vCPU has brought.
    fn of(&self, entry: &wire::Vcpu) -> &Staged {
        &self.staged[entry.vcpu.get() as usize]
    }

    /// These vCPUs are done. No vCPU is named twice.
    pub(super) fn set_done(&mut self, entries: &[wire::Vcpu]) {
        for entry in entries {
            let staged = &mut self.staged[entry.vcpu.get() as usize];
            if !core::mem::replace(&mut staged.done, true) {
                self.done += 1;
            }
        }
    }

    /// Whether the last missing vCPU is among these. No vCPU is named twice.
    pub(super) fn would_complete(&self, entries: &[wire::Vcpu]) -> bool {
        let missing = entries.iter().filter(|entry| !self.of(entry).done).count();
        self.remaining() != 0 && self.remaining() as usize == missing
    }

    /// The one count from which all vCPUs go on: the largest that any of them brought, so that none
    /// sees time decrease. `None` if none of them brought any. `entries` are what these vCPUs bring
    /// in addition; `named` says whether a vCPU is among them.
    pub(super) fn settled_count(
        &self,
        timeline: Timeline,
        entries: &[wire::Vcpu],
        named: impl Fn(usize) -> bool,
    ) -> Settled {
        let register = Register::of(timeline, Role::Count);
        let brought_now = entries
            .iter()
            .filter_map(|entry| match entry.has(register) {
                true => Some(entry.get(register)),
                false => self.of(entry).count(timeline),
            });
        let staged = self.staged.iter().enumerate();
        let brought_before = staged
            .filter(|(vcpu, _)| !named(*vcpu))
            .filter_map(|(_, staged)| staged.count(timeline));
        let mut settled = Settled::default();
        for count in brought_now.chain(brought_before) {
            settled.equal &= settled.count.is_none_or(|before| before == count);
            settled.count = settled.count.max(Some(count));
        }
        settled
    }

    pub(super) fn strict(&self) -> bool {
        self.terms.flags & restore_flags::STRICT != 0
    }

    /// Ticks until waiters are answered with ETIMEDOUT.
    pub(super) fn ticks_to_timeout(&self, host: u64) -> Option<u64> {
        let passed = host.wrapping_sub(self.terms.began);
        self.terms
            .timeout
            .map(|timeout| timeout.saturating_sub(passed))
    }

    /// Whether the time-out has passed.
    pub(super) fn overdue(&self, host: u64) -> bool {
        self.overdue || self.ticks_to_timeout(host) == Some(0)
    }

    /// True once, when the time-out has passed.
    pub(super) fn take_timeout(&mut self, host: u64) -> bool {
        let passed = self.ticks_to_timeout(host) == Some(0);
        if passed {
            self.terms.timeout = None;
            self.overdue = true;
        }
        passed
    }
}
