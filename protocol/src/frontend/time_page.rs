//! The time page: the VM's clocks without a request.
//!
//! The backend writes it, this library reads it: 64 bytes guarded by a sequence number that is
//! odd while the backend writes (SPEC.md, "Time page"). A backend that leaves it odd, or never
//! lets it rest, makes a read fail, not hang.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::memory::{Layout, SharedMemory};
use super::queue::Shared;
use super::{Call, Deadline, Error, RequestQueue};
use crate::Phase;

const LEN: usize = 64;

/// The backend writes for some tens of nanoseconds, at changes only.
const TRIES: u32 = 1000;

/// What the time page says at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageTime {
    /// Where the VM is in its life.
    pub phase: Phase,
    /// The VM's epoch.
    pub epoch: u64,
    /// Host count − virtual count; the virtual count is the host counter less this, unless it
    /// is frozen.
    pub cntvoff: u64,
    /// Host count − physical count, likewise.
    pub cntpoff: u64,
    /// Counter frequency, Hz.
    pub frequency: u64,
    /// The virtual count, where it stands still.
    pub frozen_virt_count: Option<u64>,
    /// The physical count, where it stands still.
    pub frozen_phys_count: Option<u64>,
    /// Grows at every change of phase.
    pub wake: u32,
}

/// The frontend's own time page. Reading takes no lock and no system call.
#[derive(Clone)]
pub struct TimePage {
    memory: Arc<SharedMemory>,
    offset: usize,
    /// It was started, and is to be started again on the next connection.
    wanted: Arc<AtomicBool>,
}

impl TimePage {
    pub(super) fn reserve(layout: &mut Layout) -> usize {
        layout.reserve(LEN, LEN)
    }

    pub(super) fn new(memory: Arc<SharedMemory>, offset: usize) -> Self {
        TimePage {
            memory,
            offset,
            wanted: Arc::default(),
        }
    }

    /// Makes the backend write the page, from now and until [`stop`](Self::stop), over
    /// reconnects too.
    ///
    /// # Errors
    ///
    /// As every operation of a [`RequestQueue`].
    pub fn start(&self, queue: &RequestQueue, deadline: impl Into<Deadline>) -> Result<(), Error> {
        // Before the answer, which may come just before the connection is lost.
        self.wanted.store(true, Ordering::Release);
        let started = queue.call(&self.call(LEN as u64), deadline);
        if let Err(Error::Refused(_)) = started {
            self.wanted.store(false, Ordering::Release);
        }
        started
    }

    /// Makes the backend stop writing.
    ///
    /// # Errors
    ///
    /// As every operation of a [`RequestQueue`].
    pub fn stop(&self, queue: &RequestQueue, deadline: impl Into<Deadline>) -> Result<(), Error> {
        self.wanted.store(false, Ordering::Release);
        queue.call(&self.call(0), deadline)
    }

    fn call(&self, len: u64) -> Call<'static, ()> {
        Call::set_time_page(self.memory.address(self.offset), len)
    }

    /// Asks a new backend to write the page, if the former one did. Nobody waits for the answer.
    pub(super) fn start_again(&self, queues: &[Arc<Shared>]) {
        if !self.wanted.load(Ordering::Acquire) {
            return;
        }
        let call = self.call(LEN as u64);
        if !queues.iter().any(|queue| queue.send(&call)) {
            self.invalidate();
        }
    }

    /// The backend does not write the page: what it says is to be believed no longer.
    pub(super) fn invalidate(&self) {
        self.memory
            .atomic_u32(self.offset)
            .store(0, Ordering::Release);
    }

    /// What the page says; `None` where the backend has not written it, is writing it all the
    /// time, has written nonsense, or cannot write it any more after a reconnect.
    pub fn read(&self) -> Option<PageTime> {
        for _ in 0..TRIES {
            let before = self.seq(Ordering::Acquire);
            if before & 1 == 0 {
                let mut bytes = [0; LEN];
                self.memory.read(self.offset, &mut bytes);
                fence(Ordering::Acquire);
                if self.seq(Ordering::Relaxed) == before {
                    return parse(&bytes).filter(|_| before != 0);
                }
            }
            std::hint::spin_loop();
        }
        None
    }

    fn seq(&self, order: Ordering) -> u32 {
        u32::from_le(self.memory.atomic_u32(self.offset).load(order))
    }
}

impl std::fmt::Debug for TimePage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimePage").finish_non_exhaustive()
    }
}

/// The page's bytes.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Page {
    _seq: U32,
    phase: U32,
    epoch: U64,
    cntvoff: U64,
    cntpoff: U64,
    frequency: U64,
    virt_count: U64,
    phys_count: U64,
    wake: U32,
    flags: U32,
}

const _: () = assert!(size_of::<Page>() == LEN);

fn parse(bytes: &[u8; LEN]) -> Option<PageTime> {
    let page = Page::ref_from_bytes(bytes).ok()?;
    let flags = page.flags.get();
    let frozen = |bit, count: u64| (flags & bit != 0).then_some(count);
    Some(PageTime {
        phase: Phase::from_code(page.phase.get())?,
        epoch: page.epoch.get(),
        cntvoff: page.cntvoff.get(),
        cntpoff: page.cntpoff.get(),
        frequency: page.frequency.get(),
        frozen_virt_count: frozen(1 << 0, page.virt_count.get()),
        frozen_phys_count: frozen(1 << 1, page.phys_count.get()),
        wake: page.wake.get(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read_only_while_nobody_writes_it() {
        let mut layout = Layout::default();
        layout.reserve(1, 1);
        let offset = TimePage::reserve(&mut layout);
        let memory = Arc::new(SharedMemory::new(&layout).unwrap());
        let page = TimePage::new(memory.clone(), offset);
        assert_eq!(page.read(), None, "never written");

        let mut bytes = [0; LEN];
        bytes[4] = 2;
        for (n, field) in (1..).zip(bytes[8..56].chunks_mut(8)) {
            field[0] = n;
        }
        bytes[56] = 9;
        bytes[60] = 1;
        for (seq, readable) in [(1, false), (2, true), (0x7f, false), (0x80, true)] {
            bytes[0] = seq;
            memory.write(offset, &bytes);
            let time = PageTime {
                phase: Phase::Running,
                epoch: 1,
                cntvoff: 2,
                cntpoff: 3,
                frequency: 4,
                frozen_virt_count: Some(5),
                frozen_phys_count: None,
                wake: 9,
            };
            assert_eq!(page.read(), readable.then_some(time), "{seq}");
        }
        bytes[4] = 4;
        memory.write(offset, &bytes);
        assert_eq!(page.read(), None, "no such phase");
        bytes[4] = 2;
        memory.write(offset, &bytes);
        assert!(page.read().is_some());
        page.invalidate();
        assert_eq!(page.read(), None, "invalidated");
    }
}
