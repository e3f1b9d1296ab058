//! CLOCK_MONOTONIC (clock_gettime(2)).

use rustix::time::ClockId;
use vhost_user_timer_protocol::counter::NS_PER_SEC;

use crate::{HostSource, SourceError, clock_ticks};

pub(crate) struct Monotonic;

impl HostSource for Monotonic {
    const NAME: &'static str = "monotonic";
    const CODE: u32 = 1;

    fn frequency() -> Result<u64, SourceError> {
        Ok(NS_PER_SEC)
    }

    #[inline]
    fn read(_from: u64, to: u64) -> u64 {
        clock_ticks(ClockId::Monotonic, to)
    }
}
