//! CLOCK_BOOTTIME (clock_gettime(2)).

use rustix::time::ClockId;
use vhost_user_timer_protocol::counter::NS_PER_SEC;

use crate::{HostSource, SourceError, clock_ticks};

pub(crate) struct Boottime;

impl HostSource for Boottime {
    const NAME: &'static str = "boottime";
    const CODE: u32 = 2;
    const KERNEL_CLOCK: ClockId = ClockId::Boottime;

    fn frequency() -> Result<u64, SourceError> {
        Ok(NS_PER_SEC)
    }

    #[inline]
    fn read(_from: u64, to: u64) -> u64 {
        clock_ticks(ClockId::Boottime, to)
    }
}
