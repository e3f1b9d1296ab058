//! Cross-timestamps: whether there are any, and which count may be given.
//!
//! - The first CROSS_CAP or READ_CROSS of a driver's life settles whether there are any: the
//!   device gives the same answer for as long as DRIVER_OK is set
//!   (virtio 1.4 §5.23.6.2).
//! - A later count is one that the counter shows after an earlier one (§5.23.6.5). After the VMM
//!   wrote a smaller count, giving the smaller count would break this rule, and giving the previous
//!   count again is not what the driver would read. So the request is refused until the counter
//!   has passed the previous count.

use super::clock::Counter;
use super::wire::{self, Status};

/// Whether a counter is one of §5.23.6.3 that a machine can have. COUNTER_INVALID is none.
pub(super) fn is_known(counter: u8) -> bool {
    matches!(counter, wire::COUNTER_ARM_VCT | wire::COUNTER_X86_TSC)
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Cross {
    /// Whether this driver has learned that READ_CROSS works.
    pub(super) capable: Option<bool>,
    /// The last count that this driver got.
    pub(super) floor: Option<u64>,
}

impl Cross {
    /// Settles whether READ_CROSS works.
    pub(super) fn settle(&mut self, counter: Counter) -> bool {
        *self.capable.get_or_insert(counter != Counter::Unknown)
    }

    /// The count to give.
    pub(super) fn take(&mut self, counter: Counter) -> Result<u64, Status> {
        if !self.settle(counter) {
            return Err(Status::Unsupported);
        }
        match counter {
            Counter::At(count) if self.floor.is_none_or(|floor| is_at_or_after(count, floor)) => {
                self.floor = Some(count);
                Ok(count)
            }
            _ => Err(Status::Io),
        }
    }
}

/// The counter wraps (Arm ARM D12.1.2).
fn is_at_or_after(count: u64, floor: u64) -> bool {
    count.wrapping_sub(floor) <= i64::MAX as u64
}
