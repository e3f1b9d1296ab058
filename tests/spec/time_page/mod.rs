//! SPEC.md, "Time page", byte for byte.

mod content;
mod life;
mod readers;

use vhost_user_timer_kit::contract::{Answer, Client, Info, op, u32_at, u64_at, words};
use vhost_user_timer_kit::raw_driver::{REGION_GPA, REGION_SIZE, Rig};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

/// The scenarios of all of it.
pub(crate) const SCENARIOS: [&[crate::scenarios::Scenario]; 3] =
    [content::SCENARIOS, life::SCENARIOS, readers::SCENARIOS];

/// The bits of `flags`.
pub(super) const VIRT: u32 = 1;
pub(super) const PHYS: u32 = 2;

/// The page's fields, as its 64 bytes give them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) seq: u32,
    pub(super) phase: u32,
    pub(super) epoch: u64,
    pub(super) cntvoff: u64,
    pub(super) cntpoff: u64,
    pub(super) frequency: u64,
    pub(super) virt_count: u64,
    pub(super) phys_count: u64,
    pub(super) wake: u32,
    pub(super) flags: u32,
}

impl Page {
    pub(super) fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 64);
        Page {
            seq: u32_at(bytes, 0),
            phase: u32_at(bytes, 4),
            epoch: u64_at(bytes, 8),
            cntvoff: u64_at(bytes, 16),
            cntpoff: u64_at(bytes, 24),
            frequency: u64_at(bytes, 32),
            virt_count: u64_at(bytes, 40),
            phys_count: u64_at(bytes, 48),
            wake: u32_at(bytes, 56),
            flags: u32_at(bytes, 60),
        }
    }

    /// What it says, without the numbers of its changes.
    pub(super) fn content(self) -> Self {
        Page {
            seq: 0,
            wake: 0,
            ..self
        }
    }

    /// Whether GET_INFO says the same.
    #[track_caller]
    pub(super) fn agrees(&self, info: &Info) {
        assert_eq!(self.phase, info.phase);
        assert_eq!(self.epoch, info.epoch);
        assert_eq!(self.frequency, info.frequency);
        for (offset, count, bit, asked) in [
            (self.cntvoff, self.virt_count, VIRT, info.cntvoff),
            (self.cntpoff, self.phys_count, PHYS, info.cntpoff),
        ] {
            if self.flags & bit == 0 {
                assert_eq!((offset, count), (asked, 0));
            } else {
                let frozen = info.host_count.wrapping_sub(asked);
                assert_eq!((offset, count), (0, frozen));
            }
        }
        assert_eq!(self.flags & !(VIRT | PHYS), 0);
    }
}

/// An address in the region's buffer space that no buffer has.
pub(super) const AT: u64 = REGION_GPA + REGION_SIZE - 4096;

/// SET_TIME_PAGE's body.
pub(super) fn order(at: u64, length: u64) -> Vec<u8> {
    words(&[at, length])
}

/// A frontend with a page.
pub(super) struct Paged {
    pub(super) client: Client,
    pub(super) at: u64,
}

impl Paged {
    pub(super) fn connect(rig: &Rig) -> Self {
        Self::over(Client::connect(rig))
    }

    pub(super) fn over(client: Client) -> Self {
        let mut paged = Paged { client, at: AT };
        paged.start().ok(0);
        paged
    }

    pub(super) fn start(&mut self) -> Answer {
        self.client.vm(op::SET_TIME_PAGE, &order(self.at, 64))
    }

    pub(super) fn stop(&mut self) {
        self.client.vm(op::SET_TIME_PAGE, &order(0, 0)).ok(0);
    }

    /// The page, while nothing is under way: so it is whole.
    #[track_caller]
    pub(super) fn page(&self) -> Page {
        let page = Page::of(&self.client.driver.memory.read(self.at, 64));
        assert_eq!(page.seq & 1, 0, "{page:?}");
        page
    }

    /// Does something, and returns the page before and after.
    pub(super) fn over_a<T>(&mut self, change: impl FnOnce(&mut Client) -> T) -> (Page, Page) {
        let before = self.page();
        change(&mut self.client);
        (before, self.page())
    }

    /// Does something that changes the phase.
    #[track_caller]
    pub(super) fn changes_phase<T>(
        &mut self,
        to: u32,
        change: impl FnOnce(&mut Client) -> T,
    ) -> Page {
        let (before, after) = self.over_a(change);
        assert_ne!(before.phase, to);
        assert_eq!(after.phase, to);
        assert_eq!(after.seq, before.seq + 2);
        assert_eq!(after.wake, before.wake + 1);
        after.agrees(&self.client.info());
        after
    }

    /// Does something that changes the page and not the phase.
    #[track_caller]
    pub(super) fn changes<T>(&mut self, change: impl FnOnce(&mut Client) -> T) -> Page {
        let (before, after) = self.over_a(change);
        assert_ne!(after.content(), before.content());
        assert_eq!(after.seq, before.seq + 2);
        assert_eq!(after.wake, before.wake);
        after.agrees(&self.client.info());
        after
    }

    pub(super) fn slice(&self) -> VolatileSlice<'_> {
        let memory = self.client.driver.memory.map();
        GuestMemoryBackend::get_slice(memory, GuestAddress(self.at), 64).unwrap()
    }

    pub(super) fn scribble(&self, byte: u8) {
        self.client.driver.memory.write(self.at, &[byte; 64]);
    }
}
