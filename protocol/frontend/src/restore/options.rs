//! How a restore is opened.

use std::time::Duration;

use crate::VmOptions;

/// How a restore is opened: RESTORE_BEGIN's flags and time-out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// The last RESTORE_DONE leads to RUNNING, not PAUSED. A restore of a VM with
    /// [`VmOptions::confirm`] has this always: it leads to ARMED, which is still the restore.
    pub autorun: bool,
    /// Counts that differ between vCPUs refuse the last RESTORE_DONE; else the largest counts.
    pub strict: bool,
    /// Adds to the counts the wall-clock time since this instant: CLOCK_REALTIME, ns since 1970,
    /// the [`SavedVm::realtime_ns`](crate::SavedVm::realtime_ns) of the save. 0 is refused
    /// ([`InvalidArgument::ElapsedSince1970`](crate::InvalidArgument::ElapsedSince1970)).
    pub elapsed_since: Option<u64>,
    /// How long vCPUs wait for the missing ones; then
    /// [`wait_run`](crate::RequestQueue::wait_run) is refused with
    /// [`Status::TimedOut`](crate::Status::TimedOut). `None`: forever.
    pub timeout: Option<Duration>,
    /// What a VM that is NEW is configured with. One that is configured already must have at least
    /// these. Only [`Frontend::restore`](crate::Frontend::restore) looks at it.
    pub vm: VmOptions,
}

impl RestoreOptions {
    /// Sets [`autorun`](Self::autorun).
    #[must_use]
    pub fn autorun(mut self, autorun: bool) -> Self {
        self.autorun = autorun;
        self
    }

    /// Sets [`strict`](Self::strict).
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Sets [`elapsed_since`](Self::elapsed_since).
    #[must_use]
    pub fn elapsed_since(mut self, realtime_ns: u64) -> Self {
        self.elapsed_since = Some(realtime_ns);
        self
    }

    /// Sets [`vm`](Self::vm).
    #[must_use]
    pub fn vm(mut self, options: VmOptions) -> Self {
        self.vm = options;
        self
    }

    /// Sets [`timeout`](Self::timeout).
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}
