//! A vCPU: its timers, and the counts that were reported to it.

use super::clock::ByTimeline;
use super::timer::Timers;

/// A count that was reported while its clock counted, and the offset that the clock then had.
///
/// Writing such a count back changes nothing. Taking it for a new count, as KVM does, would set the
/// clock back by the time between the read and the write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ReportedCount {
    pub(super) count: u64,
    pub(super) offset: u64,
}

/// The count of each clock that was reported last.
pub(super) type Reported = ByTimeline<Option<ReportedCount>>;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Vcpu {
    pub(super) timers: Timers,
    /// The counts that GET_REGS reported to it.
    pub(super) reported: Reported,
    /// The counts that GET_VM reported of it. GET_VM can read the VM in parts.
    pub(super) reported_by_get_vm: Reported,
}

impl Vcpu {
    pub(super) fn with_timers(timers: Timers) -> Self {
        Vcpu {
            timers,
            ..Vcpu::default()
        }
    }
}
