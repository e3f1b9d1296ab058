//! The time page, written into the frontend's memory.
//!
//! The page is the frontend's: it may overwrite the page, and it may take the memory away. So
//! nothing is ever read from the page, its address is looked up again for every write, and the
//! sequence numbers that distinguish writes are kept here. They continue from one connection to the
//! next, and start at an arbitrary value in each process, so that a reader does not mistake a page
//! of this backend for one of a previous backend.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::thread::futex;
use rustix::time::{ClockId, clock_gettime};
use vhost_user_timer_counter::stores_before_reading;
use vhost_user_timer_protocol::wire;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    VolatileMemory, VolatileSlice,
};
use zerocopy::little_endian::U32;

use crate::virtio::Memory;
use vhost_user_timer_model::vm::Vm;

const LEN: usize = size_of::<wire::Page>();
const SEQ: usize = offset_of!(wire::Page, seq);

/// Why a page cannot be written.
#[derive(Debug, thiserror::Error)]
enum Unwritable {
    #[error("it is not in the shared memory")]
    NotShared(#[from] GuestMemoryError),
    #[error("it is not aligned in the backend's memory")]
    Misaligned,
}

/// The time page of the connection, where the frontend has asked for one.
#[derive(Debug)]
pub(super) struct Page {
    at: Option<GuestAddress>,
    seq: u32,
    wake: u32,
    /// What the page says.
    content: wire::Page,
}

impl Page {
    pub(super) fn new() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        // In the lower quarter, so that the numbers do not wrap while a reader compares them.
        let start = (now.tv_sec as u32).wrapping_mul(0x9e37_79b9) ^ now.tv_nsec as u32;
        let start = start >> 2 & !1;
        Page {
            at: None,
            seq: start,
            wake: start,
            content: wire::Page::default(),
        }
    }

    /// Writes the page to this address from now on. False, with nothing changed, where `length`
    /// bytes are not shared there, or the page would not be aligned in this process's memory.
    pub(super) fn start(
        &mut self,
        address: u64,
        length: u64,
        vm: &Vm,
        memory: &Memory<()>,
    ) -> bool {
        let mem = memory.memory();
        let at = GuestAddress(address);
        let shared = usize::try_from(length).is_ok_and(|length| mem.check_range(at, length));
        if !shared || Mapped::at(&mem, at).is_err() {
            return false;
        }
        self.at = Some(at);
        self.content = vm.time_page();
        self.wake = self.wake.wrapping_add(1);
        self.write(&mem, true);
        true
    }

    /// Stops writing the page.
    pub(super) fn stop(&mut self) {
        self.at = None;
        // The next page must not look as if it was being written.
        self.seq = self.seq.wrapping_add(1) & !1;
    }

    /// Marks the page as changing, so that nobody reads it until it is written next. Called before
    /// the instant at which a running clock may freeze: otherwise a reader could compute a count
    /// past the frozen one, and later see the count decrease.
    pub(super) fn open(&mut self, memory: &Memory<()>) {
        let Some(at) = self.at else {
            return;
        };
        if let Ok(page) = Mapped::at(&memory.memory(), at) {
            self.begin(&page);
            stores_before_reading();
        }
    }

    /// Whether the page is marked as changing.
    pub(super) fn is_open(&self) -> bool {
        self.seq & 1 != 0
    }

    /// Writes the page where it says something else, or is marked as changing.
    pub(super) fn follow(&mut self, vm: &Vm, memory: &Memory<()>) {
        if self.at.is_none() {
            return;
        }
        let content = vm.time_page();
        if content == self.content && !self.is_open() {
            return;
        }
        let woken = content.phase != self.content.phase;
        self.wake = self.wake.wrapping_add(woken.into());
        self.content = content;
        self.write(&memory.memory(), woken);
    }

    /// Writes the whole page, since the memory may be new.
    pub(super) fn remapped(&mut self, memory: &Memory<()>) {
        self.wake = self.wake.wrapping_add(self.at.is_some().into());
        self.write(&memory.memory(), true);
    }

    fn write(&mut self, mem: &GuestMemoryMmap, wake: bool) {
        let Some(at) = self.at else {
            return;
        };
        match Mapped::at(mem, at) {
            Ok(page) => {
                self.begin(&page);
                page.store(&self.content);
                if wake {
                    let offset = offset_of!(wire::Page, wake);
                    page.word(offset, self.wake.into(), Ordering::Relaxed);
                }
                self.seq = self.seq.wrapping_add(1);
                page.word(SEQ, self.seq.into(), Ordering::Release);
                if wake {
                    page.wake_all();
                }
            }
            Err(error) => {
                log::warn!("The time page at {:#x} is no longer written: {error}", at.0);
                self.stop();
            }
        }
    }

    /// Makes the sequence number odd, visibly before anything else of the page changes.
    fn begin(&mut self, page: &Mapped<'_>) {
        self.seq |= 1;
        page.word(SEQ, self.seq.into(), Ordering::Relaxed);
        fence(Ordering::Release);
    }
}

/// The page in this process's memory.
struct Mapped<'a>(VolatileSlice<'a>);

impl<'a> Mapped<'a> {
    fn at(mem: &'a GuestMemoryMmap, at: GuestAddress) -> Result<Self, Unwritable> {
        let page = GuestMemoryBackend::get_slice(mem, at, LEN)?;
        // With this alignment no store of a field fails.
        match page.ptr_guard().as_ptr().addr().is_multiple_of(LEN) {
            true => Ok(Mapped(page)),
            false => Err(Unwritable::Misaligned),
        }
    }

    fn word(&self, offset: usize, value: U32, order: Ordering) {
        let _ = self.0.store(value.get().to_le(), offset, order);
    }

    fn store(&self, content: &wire::Page) {
        let order = Ordering::Relaxed;
        self.word(offset_of!(wire::Page, phase), content.phase, order);
        self.word(offset_of!(wire::Page, flags), content.flags, order);
        for (offset, value) in [
            (offset_of!(wire::Page, epoch), content.epoch),
            (offset_of!(wire::Page, cntvoff), content.cntvoff),
            (offset_of!(wire::Page, cntpoff), content.cntpoff),
            (offset_of!(wire::Page, frequency), content.frequency),
            (offset_of!(wire::Page, virt_count), content.virt_count),
            (offset_of!(wire::Page, phys_count), content.phys_count),
        ] {
            let _ = self.0.store(value.get().to_le(), offset, order);
        }
    }

    /// FUTEX_WAKE of all waiters, shared.
    fn wake_all(&self) {
        const ALL: u32 = i32::MAX as u32;
        let Ok(wake) = self
            .0
            .get_atomic_ref::<AtomicU32>(offset_of!(wire::Page, wake))
        else {
            return;
        };
        if let Err(error) = futex::wake(wake, futex::Flags::empty(), ALL) {
            log::warn!("Waking the threads that wait at the time page failed: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
