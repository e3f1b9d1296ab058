//! What the time page says, and what a frontend may ask of it.
//!
//! The model knows neither where the page is nor whether there is one: that is a connection's. It
//! says what would be in it, as a value in which nothing moves by the passing of time alone, so that
//! the shell can tell a change by comparing.

use vhost_user_timer_protocol::wire::{self, page_flags};
use vhost_user_timer_protocol::{Status, Timeline};

use super::clock::Clock;
use super::{Refusal, Vm};

/// What SET_TIME_PAGE asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOrder {
    /// To write the page here, from now on.
    WriteAt {
        /// Aligned as the page is.
        address: u64,
        /// How much room is said to be there: enough, if it is.
        length: u64,
    },
    /// To write it no more.
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
    /// The time page's content, but for what numbers its changes: `seq` and `wake` are 0.
    pub fn time_page(&self) -> wire::Page {
        let mut page = wire::Page {
            phase: self.phase().code().into(),
            epoch: self.epoch.into(),
            frequency: self.frequency().into(),
            ..Default::default()
        };
        let Some(machine) = &self.machine else {
            return page;
        };
        for (clock, offset, count, frozen) in [
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
            match machine.clocks[clock.index()] {
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
