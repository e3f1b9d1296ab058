//! The time page, as it is written into the frontend's memory.
//!
//! The page is the frontend's: it may scribble on it, and it may take the memory away. So nothing is
//! ever read from it, its place is looked up anew for every write, and the numbers that tell one
//! writing from another are kept here. They go on from one connection to the next, and begin anywhere
//! in each process, so that a reader takes no page of this backend for one of a former.

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

/// The time page of the connection, where it wants one.
#[derive(Debug)]
pub(super) struct Page {
    at: Option<GuestAddress>,
    seq: u32,
    wake: u32,
    /// What it says.
    content: wire::Page,
}

impl Page {
    pub(super) fn new() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        // Anywhere in the lower quarter, so that they are seen to grow for as long as anyone looks.
        let start = (now.tv_sec as u32).wrapping_mul(0x9e37_79b9) ^ now.tv_nsec as u32;
        let start = start >> 2 & !1;
        Page {
            at: None,
            seq: start,
            wake: start,
            content: wire::Page::default(),
        }
    }

    /// Writes the page here from now on. False, and nothing has changed, where `length` bytes are
    /// not shared there, or the page would not be aligned in this process's memory.
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

    /// Writes it no more.
    pub(super) fn stop(&mut self) {
        self.at = None;
        // Whoever looks at the next one must not find this one's last writing open.
        self.seq = self.seq.wrapping_add(1) & !1;
    }

    /// Lets nobody read the page until it is written next. To be called before the instant at which
    /// a clock may come to stand still.
    pub(super) fn open(&mut self, memory: &Memory<()>) {
        let Some(at) = self.at else {
            return;
        };
        if let Ok(page) = Mapped::at(&memory.memory(), at) {
            self.begin(&page);
            stores_before_reading();
        }
    }

    /// Whether it waits to be written.
    pub(super) fn is_open(&self) -> bool {
        self.seq & 1 != 0
    }

    /// Writes what has changed, if the page says something else or is open.
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

    /// Writes all of it into memory that may be new.
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
                log::warn!("The time page at {:#x} is written no more: {error}", at.0);
                self.stop();
            }
        }
    }

    /// Makes the sequence number odd, and seen to be before anything else of the page.
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
        // Aligned like this, no store of a field fails.
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

    /// FUTEX_WAKE, shared, of all that wait.
    fn wake_all(&self) {
        const ALL: u32 = i32::MAX as u32;
        let Ok(wake) = self
            .0
            .get_atomic_ref::<AtomicU32>(offset_of!(wire::Page, wake))
        else {
            return;
        };
        if let Err(error) = futex::wake(wake, futex::Flags::empty(), ALL) {
            log::warn!("Waking those who wait at the time page failed: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
