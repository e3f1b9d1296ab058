//! What the handler may read: statics, atomics, and no locks.
//!
//! Only the handler reads the table without the lock. It looks for the address of a page that is
//! mapped and watched, so the entry that it finds stays; others may change meanwhile, which each
//! entry's version tells.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

use crate::sys::lock;

/// Ranges that the process watches at most: two frontends with 509 regions each and as many parts
/// of a log, all of them twice while they are being replaced.
const MAX_RANGES: usize = 4096;

/// Connections at most. One more per socket may be ending.
const MAX_SLOTS: usize = 64;

/// Not a guest address of a region, since a region has a length.
const LOG: u64 = u64::MAX;

static ENTRIES: [Entry; MAX_RANGES] = [const { Entry::new() }; MAX_RANGES];
static SLOTS: [Slot; MAX_SLOTS] = [const { Slot::new() }; MAX_SLOTS];

/// Held while an entry changes. The handler never takes it.
static CHANGES: Mutex<()> = Mutex::new(());

/// Memory that is mapped here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// Address in this process.
    pub(super) start: usize,
    /// Bytes.
    pub(super) len: usize,
    /// Guest address of the region; `None` for a log.
    pub(super) guest: Option<u64>,
}

/// A range in the table.
#[derive(Debug)]
pub(super) struct Entry {
    /// Odd while the entry changes.
    version: AtomicU32,
    start: AtomicUsize,
    /// 0: the entry is free.
    len: AtomicUsize,
    guest: AtomicU64,
    /// Index of the connection's slot.
    slot: AtomicUsize,
}

impl Entry {
    const fn new() -> Self {
        Entry {
            version: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            guest: AtomicU64::new(0),
            slot: AtomicUsize::new(0),
        }
    }

    /// Writes the entry; the caller holds [`CHANGES`].
    fn set(&self, range: &Range, slot: usize) {
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.len.store(range.len, Ordering::Relaxed);
        let guest = range.guest.unwrap_or(LOG);
        self.guest.store(guest, Ordering::Relaxed);
        self.slot.store(slot, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The range and its connection; `None` while the entry changes.
    fn get(&self) -> Option<(Range, &'static Slot)> {
        let version = self.version.load(Ordering::Acquire);
        let guest = self.guest.load(Ordering::Relaxed);
        let range = Range {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            guest: (guest != LOG).then_some(guest),
        };
        let slot = SLOTS.get(self.slot.load(Ordering::Relaxed))?;
        fence(Ordering::Acquire);
        let same = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        same.then_some((range, slot))
    }
}

/// The watched range with this address.
pub(super) fn find(address: usize) -> Option<(Range, &'static Slot)> {
    let mut entries = ENTRIES.iter().filter_map(Entry::get);
    entries.find(|(range, _)| {
        let offset = address.checked_sub(range.start);
        offset.is_some_and(|offset| offset < range.len)
    })
}

/// Adds a range. `None` where the table is full.
pub(super) fn insert(range: &Range, slot: &'static Slot) -> Option<&'static Entry> {
    let index = SLOTS.iter().position(|other| std::ptr::eq(other, slot))?;
    let _changes = lock(&CHANGES);
    let entry = ENTRIES
        .iter()
        .find(|entry| entry.len.load(Ordering::Relaxed) == 0)?;
    entry.set(range, index);
    Some(entry)
}

/// Frees an entry.
pub(super) fn remove(entry: &Entry) {
    let _changes = lock(&CHANGES);
    let none = Range {
        start: 0,
        len: 0,
        guest: None,
    };
    entry.set(&none, 0);
}

/// What the handler leaves for a connection.
#[derive(Debug)]
pub(super) struct Slot {
    used: AtomicBool,
    /// Set before anything is put in place of lost memory.
    pub(super) lost: AtomicBool,
    /// How often memory was lost.
    losses: AtomicU32,
    /// Private memory that was put in place, bytes.
    in_place: AtomicUsize,
    wake: AtomicI32,
    /// What was lost first, once `told` is set.
    told: AtomicBool,
    guest: AtomicU64,
    start: AtomicUsize,
    len: AtomicUsize,
}

impl Slot {
    const fn new() -> Self {
        Slot {
            used: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            losses: AtomicU32::new(0),
            in_place: AtomicUsize::new(0),
            wake: AtomicI32::new(-1),
            told: AtomicBool::new(false),
            guest: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
        }
    }

    /// A slot for a connection that is woken by this eventfd.
    pub(super) fn claim(wake: RawFd) -> Option<&'static Self> {
        let slot = SLOTS
            .iter()
            .find(|slot| !slot.used.swap(true, Ordering::Acquire))?;
        slot.lost.store(false, Ordering::Relaxed);
        slot.told.store(false, Ordering::Relaxed);
        slot.losses.store(0, Ordering::Relaxed);
        slot.in_place.store(0, Ordering::Relaxed);
        slot.wake.store(wake, Ordering::Release);
        Some(slot)
    }

    /// Counts private memory that was put in place, bytes.
    pub(super) fn count(&self, bytes: usize) {
        self.in_place.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How much private memory was put in place so far, bytes.
    pub(super) fn in_place(&self) -> usize {
        self.in_place.load(Ordering::Relaxed)
    }

    pub(super) fn release(&self) {
        self.wake.store(-1, Ordering::Relaxed);
        self.used.store(false, Ordering::Release);
    }

    /// Marks the connection. Returns how often it lost memory before. Async-signal-safe.
    pub(super) fn mark(&self) -> u32 {
        self.lost.store(true, Ordering::SeqCst);
        self.losses.fetch_add(1, Ordering::SeqCst)
    }

    /// Leaves what was lost first for the connection, and wakes it. Async-signal-safe.
    #[allow(unsafe_code, reason = "rustix does I/O on borrowed descriptors only")]
    pub(super) fn tell(&self, range: &Range) {
        self.guest
            .store(range.guest.unwrap_or(LOG), Ordering::Relaxed);
        self.start.store(range.start, Ordering::Relaxed);
        self.len.store(range.len, Ordering::Relaxed);
        self.told.store(true, Ordering::Release);
        let wake = self.wake.load(Ordering::Relaxed);
        if wake < 0 {
            return;
        }
        // SAFETY: the connection's `Trap` owns the descriptor and outlives all its watched ranges,
        // one of which this thread touches.
        let wake = unsafe { BorrowedFd::borrow_raw(wake) };
        // Fails only where the eventfd's count is at its end, and then it is readable.
        let _ = rustix::io::write(wake, &1_u64.to_ne_bytes());
    }

    /// How often memory was lost.
    #[cfg(test)]
    pub(super) fn losses(&self) -> u32 {
        self.losses.load(Ordering::SeqCst)
    }

    pub(super) fn first_lost(&self) -> Option<Range> {
        self.told.load(Ordering::Acquire).then(|| {
            let guest = self.guest.load(Ordering::Relaxed);
            Range {
                start: self.start.load(Ordering::Relaxed),
                len: self.len.load(Ordering::Relaxed),
                guest: (guest != LOG).then_some(guest),
            }
        })
    }
}
