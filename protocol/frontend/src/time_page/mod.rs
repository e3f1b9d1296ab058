//! The time page: the VM's clocks without a request.
//!
//! The backend writes it, this library reads it: 64 bytes guarded by a sequence number that is
//! odd while the backend writes (SPEC.md, "Time page"). If a backend leaves it odd, or changes it
//! without end, a read fails; it does not hang. `clock` computes counts from the page, `page_wait`
//! waits by it.

mod clock;
mod page_wait;

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::thread::futex;
use zerocopy::{FromBytes, IntoBytes};

use crate::memory::{Layout, SharedMemory};
use crate::{Deadline, Error, Operation, RequestQueue};
use vhost_user_timer_counter::zero_after;
use vhost_user_timer_protocol::Phase;
use vhost_user_timer_protocol::wire::{Page, page_flags};

pub use clock::{Counts, GuestClock, HostClock};
pub use page_wait::Offsets;
use page_wait::PageWait;

const LEN: usize = size_of::<Page>();

/// The page in words; the first holds `seq` and `phase`.
const WORDS: usize = LEN / 8;

/// Spins before yielding. The backend writes at changes only, for some microseconds.
const SPINS: u32 = 1000;

/// Yields before a read fails. The backend may have to wait for a CPU while it writes.
const YIELDS: u32 = 200;

/// The frontend adds this to `wake` to make threads look again that wait, or are about to. The
/// backend never reads `wake`: it stores a number of its own, which grows by ones.
const NUDGE: u32 = 1 << 24;

/// What the time page says at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageTime {
    /// Where the VM is in its life.
    pub phase: Phase,
    /// The VM's epoch.
    pub epoch: u64,
    /// Host count − virtual count, modulo 2^64; 0 where the virtual count is frozen, and in NEW.
    pub cntvoff: u64,
    /// Host count − physical count, modulo 2^64; 0 where the physical count is frozen, and in NEW.
    pub cntpoff: u64,
    /// Counter frequency, Hz.
    pub frequency: u64,
    /// The virtual count, if it is frozen.
    pub frozen_virt_count: Option<u64>,
    /// The physical count, if it is frozen.
    pub frozen_phys_count: Option<u64>,
    /// A number that changes whenever the phase does.
    pub wake: u32,
}

/// The frontend's own time page. Reading takes no lock, and no system call unless the backend
/// writes for unusually long.
///
/// It does not notice a lost connection: it keeps what was true when the connection was lost. With
/// [`Options::reconnect`](crate::Options::reconnect) that stays true until there is a new
/// connection, since only the frontend changes the VM. From then on the page cannot be read until
/// the new backend has written it.
#[derive(Clone)]
pub struct TimePage {
    memory: Arc<SharedMemory>,
    offset: usize,
    /// It is to be started again on the next connection.
    wanted: Arc<AtomicBool>,
    waiters: Arc<PageWait>,
}

impl TimePage {
    pub(crate) fn reserve(layout: &mut Layout) -> usize {
        layout.reserve(LEN, LEN)
    }

    pub(crate) fn new(memory: Arc<SharedMemory>, offset: usize) -> Self {
        TimePage {
            memory,
            offset,
            wanted: Arc::default(),
            waiters: Arc::default(),
        }
    }

    /// Makes the backend write the page, from now until [`stop`](Self::stop), also over reconnects.
    ///
    /// # Errors
    ///
    /// As every operation of a [`RequestQueue`].
    pub fn start(&self, queue: &RequestQueue, deadline: impl Into<Deadline>) -> Result<(), Error> {
        // Set before the answer: the connection may be lost right after that.
        self.wanted.store(true, Ordering::Release);
        let started = queue.perform(&self.operation(LEN as u64), deadline);
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
        queue.perform(&self.operation(0), deadline)?;
        self.invalidate();
        Ok(())
    }

    fn operation(&self, len: u64) -> Operation<'static, ()> {
        Operation::set_time_page(self.memory.address(self.offset), len)
    }

    /// Asks a new backend to write the page if the previous one did, or the same one after a
    /// reset. `send` sends an operation whose answer nobody waits for, if there is room.
    pub(crate) fn restart(&self, send: impl FnOnce(&Operation<'_, ()>) -> bool) {
        if self.wanted.load(Ordering::Acquire) && !send(&self.operation(LEN as u64)) {
            self.invalidate();
        }
    }

    /// The backend no longer writes the page, so its content is void.
    pub(crate) fn invalidate(&self) {
        self.half(offset_of!(Page, seq)).store(0, Ordering::Release);
        self.nudge();
    }

    /// Reads the page. `None` if the backend has not written it, writes it without end, has written
    /// an unknown phase, or can no longer write it after a reconnect.
    pub fn read(&self) -> Option<PageTime> {
        self.read_numbered().map(|(_, time)| time)
    }

    /// Reads the page, and its first word, which differs between any two of its states.
    fn read_numbered(&self) -> Option<(u64, PageTime)> {
        let [first, rest @ ..] = self.words();
        for attempt in 0..SPINS + YIELDS {
            let before = first.load(Ordering::Acquire);
            let seq = seq_of(before);
            if seq & 1 == 0 {
                let mut words = [before; WORDS];
                for (word, field) in words[1..].iter_mut().zip(rest) {
                    *word = field.load(Ordering::Relaxed);
                }
                fence(Ordering::Acquire);
                if first.load(Ordering::Relaxed) == before {
                    let time = parse(&words).filter(|_| seq != 0);
                    return time.map(|time| (before, time));
                }
            }
            match attempt < SPINS {
                true => std::hint::spin_loop(),
                false => std::thread::yield_now(),
            }
        }
        None
    }

    fn words(&self) -> &[AtomicU64; WORDS] {
        self.memory.words(self.offset)
    }

    /// Whether the page's first word is still this one, read after that reading of a counter.
    fn is_still(&self, first: u64, reading: u64) -> bool {
        self.words()[zero_after(reading)].load(Ordering::Relaxed) == first
    }

    fn half(&self, offset: usize) -> &AtomicU32 {
        self.memory.atomic_u32(self.offset + offset)
    }

    /// The futex, as it is in memory.
    fn wake(&self) -> &AtomicU32 {
        self.half(offset_of!(Page, wake))
    }

    /// Makes threads look again that wait at the page, or are about to.
    fn nudge(&self) {
        self.wake().fetch_add(NUDGE.to_le(), Ordering::AcqRel);
        // It cannot fail for an address that is mapped.
        let _ = futex::wake(self.wake(), futex::Flags::empty(), i32::MAX as u32);
    }

    /// Sleeps until `wake` is no longer `value`, or `most` has passed; it may also return early.
    fn sleep(&self, value: u32, most: Duration) -> Result<(), Error> {
        let timeout = Timespec::try_from(most).ok();
        match futex::wait(self.wake(), futex::Flags::empty(), value, timeout.as_ref()) {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => Ok(()),
            Err(error) => Err(Error::Io {
                what: "wait at the time page",
                source: error.into(),
            }),
        }
    }
}

impl std::fmt::Debug for TimePage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimePage").finish_non_exhaustive()
    }
}

/// The sequence number in the page's first word.
fn seq_of(first: u64) -> u32 {
    u64::from_le(first) as u32
}

fn parse(words: &[u64; WORDS]) -> Option<PageTime> {
    let page = Page::ref_from_bytes(words.as_bytes()).ok()?;
    let flags = page.flags.get();
    let frozen = |bit, count: u64| (flags & bit != 0).then_some(count);
    Some(PageTime {
        phase: Phase::from_code(page.phase.get())?,
        epoch: page.epoch.get(),
        cntvoff: page.cntvoff.get(),
        cntpoff: page.cntpoff.get(),
        frequency: page.frequency.get(),
        frozen_virt_count: frozen(page_flags::VIRT_FROZEN, page.virt_count.get()),
        frozen_phys_count: frozen(page_flags::PHYS_FROZEN, page.phys_count.get()),
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
        bytes[4] = 5;
        memory.write(offset, &bytes);
        assert_eq!(page.read(), None, "no such phase");
        bytes[4] = 2;
        memory.write(offset, &bytes);
        assert!(page.read().is_some());
        page.invalidate();
        assert_eq!(page.read(), None, "invalidated");
    }
}
