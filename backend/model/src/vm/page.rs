//! What the time page says, and what SET_TIME_PAGE may ask for.
//!
//! The model does not know where the page is, or whether there is one; that belongs to the
//! connection. It says what a page would contain, as a value that does not change by the passing of
//! time alone, so that the shell finds a change by comparing.

use vhost_user_timer_protocol::wire::{self, page_flags};
use vhost_user_timer_protocol::{Status, Timeline};

use super::call::Refusal;
use super::clock::Clock;
use super::model::Vm;

/// What SET_TIME_PAGE asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOrder {
    /// To write the page here from now on.
    WriteAt {
        /// Aligned as the page is.
        address: u64,
        /// The length that the frontend states, bytes: enough for a page.
        length: u64,
    },
    /// To stop writing the page.
    Stop,
}

impl PageOrder {
    pub(super) fn parse(order: &wire::TimePage) -> Result<Self, Refusal> {
        const LEN: u64 = size_of::<wire::Page>() as u64;
        let (address, length) = (order.address.get(), order.length.get());
        match length {
            0 => Ok(PageOrder::Stop),
            _ if length < LEN || !address.is_multiple_of(LEN) => Err(Status::Invalid.into()),
            _ => Ok(PageOrder::WriteAt { address, length }),
        }
    }
}

impl Vm {
    /// The time page's content. `seq` and `wake`, which number its changes, are 0.
    pub fn time_page(&self) -> wire::Page {
        let mut page = wire::Page {
            phase: self.phase().code().into(),
            epoch: self.epoch.into(),
            frequency: self.frequency().into(),
            ..Default::default()
        };
        let Some(configured) = &self.configured else {
            return page;
        };
        for (timeline, offset, count, frozen) in [
            (
                Timeline::Virtual,
                &mut page.cntvoff,
                &mut page.virt_count,
                page_flags::VIRT_FROZEN,
            ),
            (
                Timeline::Physical,
                &mut page.cntpoff,
                &mut page.phys_count,
                page_flags::PHYS_FROZEN,
            ),
        ] {
            match configured.clocks[timeline.index()] {
                Clock::Counting { offset: now } => *offset = now.into(),
                Clock::Frozen { count: now } => {
                    *count = now.into();
                    page.flags |= frozen;
                }
            }
        }
        page
    }
}
