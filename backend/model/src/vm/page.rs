//! What the time page says.
//!
//! The model does not know where the page is, or whether there is one; that belongs to the
//! connection. It says what a page would contain, as a value that does not change by the passing of
//! time alone, so that the shell finds a change by comparing.

use vhost_user_timer_protocol::Timeline;
use vhost_user_timer_protocol::wire::{self, page_flags};

use super::clock::Clock;
use super::model::Vm;

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
