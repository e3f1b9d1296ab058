//! An open restore: what each vCPU has brought, and who is missing.

use alloc::vec::Vec;

use vhost_user_timer_protocol::wire::restore_flags;
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

/// The counts differ, in a STRICT restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UnequalCounts;

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

    /// The registers that this vCPU must still set before it can be done, as
    /// [`present`](vhost_user_timer_protocol::wire::present) bits: all of the virtual timeline,
    /// without the count where the offset is pinned.
    pub(super) fn lacks(&self, vcpu: usize, abi: Abi, pinned: bool) -> u32 {
        let registers = abi.registers().iter().map(|(register, _)| register);
        let needed = registers
            .filter(|register| register.timeline() == Timeline::Virtual)
            .filter(|register| !(pinned && register.role() == Role::Count))
            .fold(0, |bits, register| bits | register.present_bit());
        needed & !self.staged[vcpu].present
    }

    pub(super) fn set_done(&mut self, vcpu: usize) {
        if !core::mem::replace(&mut self.staged[vcpu].done, true) {
            self.done += 1;
        }
    }

    /// Whether this vCPU's RESTORE_DONE would be the last.
    pub(super) fn would_complete(&self, vcpu: usize) -> bool {
        self.remaining() == u32::from(!self.staged[vcpu].done)
    }

    /// The one count from which all vCPUs go on: the largest that any of them brought, so that none
    /// sees time decrease. `None` if none of them brought any.
    pub(super) fn settled_count(&self, timeline: Timeline) -> Result<Option<u64>, UnequalCounts> {
        let counts = || {
            self.staged
                .iter()
                .filter_map(|staged| staged.count(timeline))
        };
        let largest = counts().max();
        if self.terms.flags & restore_flags::STRICT != 0 && counts().min() != largest {
            return Err(UnequalCounts);
        }
        Ok(largest)
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
