//! The guest's counts, from the time page and the host counter.

use std::sync::Arc;

use rustix::time::ClockId;
use vhost_user_timer_counter::{HostCounter, clock_ticks};

use super::{SPINS, TimePage};
use crate::session::Session;
use crate::{Deadline, Error, InvalidArgument, RequestQueue};
use vhost_user_timer_protocol::Phase;
use vhost_user_timer_protocol::counter::{Anchor, NS_PER_SEC};

/// How often GET_INFO's host counter is looked for between two readings.
const PROOFS: u32 = 3;

/// What the backend's host counter is derived from, as whoever launched it knows.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum HostClock {
    /// The backend's `--counter-source`, and no anchor. A counter whose frequency is measured needs
    /// the backend's frequency ([`HostCounter::at_rate`]): what GET_INFO says in NEW, unless the
    /// backend was given another one by `--counter-frequency`.
    Counter(HostCounter),
    /// What SET_COUNTER_ANCHOR said last, whatever the source.
    Anchored(Anchor),
    /// Another source, and no anchor: reads it, in ticks of the frequency (Hz) that is the
    /// argument. It should read the counter after everything before it in program order.
    Function(fn(u64) -> u64),
}

impl From<HostCounter> for HostClock {
    fn from(counter: HostCounter) -> Self {
        HostClock::Counter(counter)
    }
}

impl HostClock {
    /// `--counter-source monotonic`, and no anchor.
    pub const MONOTONIC: HostClock = HostClock::Counter(HostCounter::MONOTONIC);

    fn read(self, frequency: u64) -> u64 {
        match self {
            HostClock::Counter(counter) => counter.read(frequency),
            HostClock::Anchored(anchor) => {
                anchor.host(clock_ticks(ClockId::Monotonic, NS_PER_SEC), frequency)
            }
            HostClock::Function(read) => read(frequency),
        }
    }
}

/// The guest's counts at one instant, modulo 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// The virtual count.
    pub virt_count: u64,
    /// The physical count.
    pub phys_count: u64,
    /// The host counter.
    pub host_count: u64,
}

/// Reads the guest's counts without a request. From
/// [`RequestQueue::guest_clock`].
#[derive(Clone)]
pub struct GuestClock {
    session: Arc<Session>,
    host: HostClock,
    /// What the host counter is derived from has not changed since it had this number.
    revision: u64,
}

impl RequestQueue {
    /// A reader of the guest's counts by the time page, which must have been
    /// [started](TimePage::start).
    ///
    /// The page does not say what the host counter is. The caller does, and is not just believed:
    /// GET_INFO's `host_count` must lie between two readings of that clock. That finds out another
    /// frequency, another time namespace, an anchor; but on a host that was never suspended the
    /// monotonic and the boottime clock read the same.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] where the backend has another host counter than `host`; or as
    /// [`info`](Self::info).
    pub fn guest_clock(
        &self,
        host: HostClock,
        deadline: impl Into<Deadline>,
    ) -> Result<GuestClock, Error> {
        let deadline = deadline.into();
        let session = self.shared.session();
        let revision = session.history.counter_revision();
        // The frequency may be another one since the last look.
        let mut frequency = self.info(deadline)?.frequency;
        for _ in 0..PROOFS {
            let before = host.read(frequency);
            let info = self.info(deadline)?;
            let width = host.read(frequency).wrapping_sub(before);
            let anchored = matches!(host, HostClock::Anchored(_));
            let between = info.host_count.wrapping_sub(before) <= width;
            if between && info.frequency == frequency && info.anchored == anchored {
                return Ok(GuestClock {
                    session: session.clone(),
                    host,
                    revision,
                });
            }
            frequency = info.frequency;
        }
        Err(InvalidArgument::HostClock.into())
    }
}

impl GuestClock {
    /// The counts of now.
    ///
    /// It takes a reading of the clock and some tens of nanoseconds. While the VM has one pair of
    /// offsets, and over pauses, a count never goes back from one reading to the next, on whichever
    /// thread.
    ///
    /// `None` where the page cannot be read ([`TimePage::read`]), in NEW, and for good once the
    /// host counter may be another one: after
    /// [`set_counter_anchor`](RequestQueue::set_counter_anchor), a reset, or the load of a device
    /// state. GET_INFO and GET_REGS tell then.
    pub fn counts(&self) -> Option<Counts> {
        let page: &TimePage = &self.session.page;
        for _ in 0..SPINS {
            let (first, time) = page.read_numbered()?;
            let host_count = self.host.read(time.frequency);
            // A clock that is frozen since then was frozen at a later reading.
            if !page.is_still(first, host_count) {
                continue;
            }
            if time.phase == Phase::New || self.session.history.counter_revision() != self.revision
            {
                return None;
            }
            let count = |frozen: Option<u64>, offset| {
                frozen.unwrap_or_else(|| host_count.wrapping_sub(offset))
            };
            return Some(Counts {
                virt_count: count(time.frozen_virt_count, time.cntvoff),
                phys_count: count(time.frozen_phys_count, time.cntpoff),
                host_count,
            });
        }
        None
    }
}

impl std::fmt::Debug for GuestClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestClock")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}
