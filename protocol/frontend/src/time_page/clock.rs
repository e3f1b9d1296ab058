//! The guest's counts, from the time page and the host counter.

use std::sync::Arc;

use rustix::time::ClockId;
use vhost_user_timer_counter::{HostCounter, clock_ticks};

use super::{SPINS, TimePage};
use crate::session::Session;
use crate::{Deadline, Error, InvalidArgument, RequestQueue};
use vhost_user_timer_protocol::Phase;
use vhost_user_timer_protocol::counter::{Anchor, NS_PER_SEC};

/// Attempts to find GET_INFO's host counter between two readings.
const PROOFS: u32 = 3;

/// The source of the backend's host counter. The program that launched the backend knows it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum HostClock {
    /// The backend's `--counter-source`, and no anchor. A counter whose frequency is measured needs
    /// the backend's frequency ([`HostCounter::at_rate`]): what GET_INFO says in NEW, unless the
    /// backend got another frequency by `--counter-frequency`.
    Counter(HostCounter),
    /// The last SET_COUNTER_ANCHOR, whatever the source.
    Anchored(Anchor),
    /// Another source, and no anchor: a function that reads it, in ticks of its argument, the
    /// frequency in Hz. It should not read the counter before what precedes it in program order.
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
#[non_exhaustive]
pub struct Counts {
    /// The virtual count.
    pub virt_count: u64,
    /// The physical count.
    pub phys_count: u64,
    /// The host counter.
    pub host_count: u64,
}

/// Reads the guest's counts without a request. [`RequestQueue::guest_clock`] makes one.
#[derive(Clone)]
pub struct GuestClock {
    session: Arc<Session>,
    host: HostClock,
    /// The number of the host counter's source; it grows when the source may have changed.
    revision: u64,
}

impl RequestQueue {
    /// A reader of the guest's counts by the time page, which must have been
    /// [started](TimePage::start).
    ///
    /// The page does not name the host counter, so the caller does, and the claim is checked:
    /// GET_INFO's `host_count` must lie between two readings of that clock. The check detects
    /// another frequency, another time namespace, and an anchor. It cannot tell the monotonic from
    /// the boottime clock on a host that was never suspended: they read the same.
    ///
    /// # Errors
    ///
    /// [`InvalidArgument::HostClock`] if the backend has another host counter than `host`; or as
    /// [`info`](Self::info).
    pub fn guest_clock(
        &self,
        host: HostClock,
        deadline: impl Into<Deadline>,
    ) -> Result<GuestClock, Error> {
        let deadline = deadline.into();
        let session = self.shared.session();
        let revision = session.history.counter_revision();
        // The frequency may have changed since the last look.
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
    /// The counts at this instant.
    ///
    /// It takes a reading of the clock and some tens of nanoseconds. While the VM's offsets stay
    /// the same, and over pauses, no count decreases from one reading to the next, on any thread.
    ///
    /// `None` if the page cannot be read ([`TimePage::read`]), in NEW, and permanently once the
    /// host counter may have changed: after
    /// [`set_counter_anchor`](RequestQueue::set_counter_anchor), a reset, or the load of a device
    /// state. Use GET_INFO and GET_REGS then.
    pub fn counts(&self) -> Option<Counts> {
        let page: &TimePage = &self.session.page;
        for _ in 0..SPINS {
            let (first, time) = page.read_numbered()?;
            let host_count = self.host.read(time.frequency);
            // A clock that was frozen meanwhile was frozen at a later reading.
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
