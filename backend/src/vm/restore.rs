//! An open restore: what each vCPU has brought, and who is missing.

use vhost_user_timer_protocol::Register;
use vhost_user_timer_protocol::wire::{present, restore_flags};

use super::clock::{Clock, ClockId};
use super::schedule::Timers;

/// What one vCPU has brought in this epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Staged {
    /// Registers set, as [`present`] bits.
    pub(super) present: u32,
    /// RESTORE_DONE was answered.
    pub(super) done: bool,
    counts: [u64; 2],
}

impl Staged {
    pub(super) fn stage_count(&mut self, clock: ClockId, count: u64) {
        self.counts[clock.index()] = count;
    }

    pub(super) fn count(&self, clock: ClockId) -> Option<u64> {
        let bit = match clock {
            ClockId::Virtual => present::CNT,
            ClockId::Physical => present::PCNT,
        };
        (self.present & bit != 0).then(|| self.counts[clock.index()])
    }
}

/// The VM's state from before the restore, for RESTORE_ABORT.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Before {
    pub(super) clocks: [Clock; 2],
    pub(super) pinned: bool,
    pub(super) phys_virtualised: bool,
    pub(super) timers: Vec<Timers>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Restore {
    pub(super) before: Before,
    pub(super) staged: Vec<Staged>,
    flags: u32,
    pub(super) saved_realtime_ns: u64,
    /// The host counter at RESTORE_BEGIN.
    began: u64,
    /// Ticks after which waiters are told that it takes too long.
    timeout: Option<u64>,
    done: u32,
}

/// Unequal counts in a restore that was asked to be STRICT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UnequalCounts;

impl Restore {
    pub(super) fn begin(
        before: Before,
        flags: u32,
        saved_realtime_ns: u64,
        began: u64,
        timeout: Option<u64>,
    ) -> Self {
        Restore {
            staged: vec![Staged::default(); before.timers.len()],
            before,
            flags,
            saved_realtime_ns,
            began,
            timeout,
            done: 0,
        }
    }

    pub(super) fn autorun(&self) -> bool {
        self.flags & restore_flags::AUTORUN != 0
    }

    pub(super) fn elapsed(&self) -> bool {
        self.flags & restore_flags::ELAPSED != 0
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

    /// The registers that this vCPU must still set before it can be done, as [`present`] bits.
    pub(super) fn lacks(&self, vcpu: usize, pinned: bool) -> u32 {
        let count = if pinned {
            0
        } else {
            Register::TimerCnt.present_bit()
        };
        let needed = present::CTL | present::CVAL | count;
        needed & !self.staged[vcpu].present
    }

    pub(super) fn set_done(&mut self, vcpu: usize) {
        if !std::mem::replace(&mut self.staged[vcpu].done, true) {
            self.done += 1;
        }
    }

    /// Whether this vCPU's RESTORE_DONE would be the last.
    pub(super) fn would_complete(&self, vcpu: usize) -> bool {
        self.remaining() == u32::from(!self.staged[vcpu].done)
    }

    /// The one count that all vCPUs go on from: the largest that any brought, so that none
    /// sees time go back. `None` where none brought any.
    pub(super) fn settled_count(&self, clock: ClockId) -> Result<Option<u64>, UnequalCounts> {
        let counts = || self.staged.iter().filter_map(|staged| staged.count(clock));
        let largest = counts().max();
        if self.flags & restore_flags::STRICT != 0 && counts().min() != largest {
            return Err(UnequalCounts);
        }
        Ok(largest)
    }

    /// Ticks until the waiters are told that it takes too long.
    pub(super) fn ticks_to_timeout(&self, host: u64) -> Option<u64> {
        let passed = host.wrapping_sub(self.began);
        self.timeout.map(|timeout| timeout.saturating_sub(passed))
    }

    /// True once, when the time-out has passed.
    pub(super) fn take_timeout(&mut self, host: u64) -> bool {
        let passed = self.ticks_to_timeout(host) == Some(0);
        if passed {
            self.timeout = None;
        }
        passed
    }
}
