//! DirtyLog of what is written to the guest's memory, in the log of a migration
//! (VHOST_USER_SET_LOG_BASE).
//!
//! `vhost-user-backend` gives the log to the regions that there are when it comes. One that comes
//! later, by SET_MEM_TABLE or ADD_MEM_REG, has none, and what is written there would be missing on
//! the destination. So the connection's request thread, where all of these arrive, keeps the log, and
//! [`keep_logging`] gives it to them; what is written to them before that is marked then.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost_user_backend::bitmap::{
    AtomicBitmapMmap, BitmapMmapRegion, BitmapReplace, MemRegionBitmap, MmapLogReg,
};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

thread_local! {
    /// The log that this thread's frontend shared.
    static LOG: RefCell<Option<Arc<MmapLogReg>>> = const { RefCell::new(None) };
}

/// What is written to one region, or to a part of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct DirtyLog {
    log: BitmapMmapRegion,
    /// Where the part begins.
    start: usize,
    early: Arc<UnloggedWrites>,
}

/// What is written while the region's place in the log is not known.
#[derive(Debug, Default)]
struct UnloggedWrites {
    awaits_log: AtomicBool,
    /// Offsets in the region, and lengths.
    written: Mutex<Vec<(usize, usize)>>,
}

impl UnloggedWrites {
    fn written(&self) -> MutexGuard<'_, Vec<(usize, usize)>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn awaits_log(&self) -> bool {
        self.awaits_log.load(Ordering::Acquire)
    }
}

impl DirtyLog {
    /// Nothing is kept for later any more. What was kept is marked, where there is a log.
    fn settle(&self, log: Option<AtomicBitmapMmap>) {
        let mut written = self.early.written();
        if let Some(log) = log {
            self.log.replace(log);
        }
        for (offset, len) in written.drain(..) {
            self.log.mark_dirty(offset, len);
        }
        self.early.awaits_log.store(false, Ordering::Release);
    }
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.early.awaits_log() {
            let mut written = self.early.written();
            // It may have come meanwhile.
            if self.early.awaits_log() {
                written.push((self.start.saturating_add(offset), len));
                return;
            }
        }
        self.log.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> Self {
        DirtyLog {
            log: self.log.slice_at(offset),
            start: self.start.saturating_add(offset),
            early: Arc::clone(&self.early),
        }
    }
}

impl WithBitmapSlice<'_> for DirtyLog {
    type S = Self;
}

impl BitmapSlice for DirtyLog {}

impl NewBitmap for DirtyLog {
    fn with_len(_len: usize) -> Self {
        let marks = DirtyLog::default();
        let logging = LOG.with_borrow(Option::is_some);
        marks.early.awaits_log.store(logging, Ordering::Release);
        marks
    }
}

impl BitmapReplace for DirtyLog {
    type InnerBitmap = RegionLog;

    fn replace(&self, part: RegionLog) {
        self.settle(Some(part.0));
    }
}

/// A region's part of the log.
pub(crate) struct RegionLog(AtomicBitmapMmap);

impl MemRegionBitmap for RegionLog {
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<Self> {
        let part = AtomicBitmapMmap::new(region, Arc::clone(&log))?;
        LOG.set(Some(log));
        Ok(RegionLog(part))
    }
}

/// The memory has changed: gives its regions their part of the log, where this thread's frontend shared
/// one.
pub(crate) fn keep_logging(memory: &GuestMemoryMmap<DirtyLog>) {
    let Some(log) = LOG.with_borrow(Option::clone) else {
        return;
    };
    for region in memory.iter() {
        match RegionLog::new(region, Arc::clone(&log)) {
            Ok(part) => (*region).bitmap().replace(part),
            Err(error) => {
                log::error!(
                    "What is written to the memory region at {:#x} is not marked for the migration, \
                     since the log does not reach so far: {error}",
                    region.start_addr().raw_value()
                );
                (*region).bitmap().settle(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_before_the_log_is_there_is_kept_until_then_and_no_longer() {
        let marks = DirtyLog::default();
        marks.mark_dirty(1, 2);
        assert!(marks.early.written().is_empty(), "nobody logs");
        marks.early.awaits_log.store(true, Ordering::Release);
        marks.mark_dirty(3, 4);
        marks.slice_at(100).slice_at(50).mark_dirty(7, 8);
        assert_eq!(*marks.early.written(), [(3, 4), (157, 8)]);
        marks.settle(None);
        marks.slice_at(9).mark_dirty(1, 1);
        assert!(marks.early.written().is_empty());
    }
}
