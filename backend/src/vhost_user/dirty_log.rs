//! The log of what is written to the guest's memory, for a migration (VHOST_USER_SET_LOG_BASE).
//!
//! `vhost-user-backend` gives the log to the memory regions that exist when it arrives. A region
//! that comes later, by SET_MEM_TABLE or ADD_MEM_REG, has none, and what is written there would be
//! missing on the destination. So the connection's request thread, where all of these messages
//! arrive, keeps the log, and [`DirtyBitmap::keep_logging`] gives it to new regions; what was
//! written to them before that is logged then.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::{
    AtomicBitmapMmap, BitmapMmapRegion, BitmapReplace, MemRegionBitmap, MmapLogReg,
};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::sys::lock;

thread_local! {
    /// The log that this thread's frontend shared.
    static LOG: RefCell<Option<Arc<MmapLogReg>>> = const { RefCell::new(None) };
}

/// Whether what a device writes is logged, and how: [`DirtyLog`], or `()` where it is not.
pub(crate) trait DirtyBitmap: BitmapReplace + NewBitmap + Clone + Send + Sync {
    /// The virtio features that this needs.
    const FEATURES: u64;
    /// The protocol features that this needs.
    const PROTOCOL_FEATURES: VhostUserProtocolFeatures;

    /// The memory has changed: gives its regions their part of the log, where this thread's
    /// frontend shared one.
    fn keep_logging(memory: &GuestMemoryMmap<Self>);
}

/// The frontend's own memory, which is not migrated.
impl DirtyBitmap for () {
    const FEATURES: u64 = 0;
    const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::empty();

    fn keep_logging(_memory: &GuestMemoryMmap) {}
}

impl DirtyBitmap for DirtyLog {
    const FEATURES: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
    const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::LOG_SHMFD;

    fn keep_logging(memory: &GuestMemoryMmap<Self>) {
        let Some(log) = LOG.with_borrow(Option::clone) else {
            return;
        };
        for region in memory.iter() {
            match RegionLog::new(region, Arc::clone(&log)) {
                Ok(part) => (*region).bitmap().replace(part),
                Err(error) => {
                    log::error!(
                        "Writes to the memory region at {:#x} are not logged for the migration, \
                         since the frontend's log ends before it: {error}",
                        region.start_addr().raw_value()
                    );
                    (*region).bitmap().settle(None);
                }
            }
        }
    }
}

/// The writes to one region, or to a slice of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct DirtyLog {
    log: BitmapMmapRegion,
    /// Where the slice begins in the region.
    start: usize,
    unlogged: Arc<UnloggedWrites>,
}

/// Writes while the region's part of the log is not known.
#[derive(Debug, Default)]
struct UnloggedWrites {
    awaits_log: AtomicBool,
    /// Offsets in the region, and lengths.
    written: Mutex<Vec<(usize, usize)>>,
}

impl UnloggedWrites {
    fn written(&self) -> MutexGuard<'_, Vec<(usize, usize)>> {
        lock(&self.written)
    }

    fn awaits_log(&self) -> bool {
        self.awaits_log.load(Ordering::Acquire)
    }
}

impl DirtyLog {
    /// Ends keeping writes for later. Those that were kept are logged, where there is a log.
    fn settle(&self, log: Option<AtomicBitmapMmap>) {
        let mut written = self.unlogged.written();
        if let Some(log) = log {
            self.log.replace(log);
        }
        for (offset, len) in written.drain(..) {
            self.log.mark_dirty(offset, len);
        }
        self.unlogged.awaits_log.store(false, Ordering::Release);
    }
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.unlogged.awaits_log() {
            let mut written = self.unlogged.written();
            // The log may have arrived since.
            if self.unlogged.awaits_log() {
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
            unlogged: Arc::clone(&self.unlogged),
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
        marks.unlogged.awaits_log.store(logging, Ordering::Release);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_before_the_log_is_there_is_kept_until_then_and_no_longer() {
        let marks = DirtyLog::default();
        marks.mark_dirty(1, 2);
        assert!(marks.unlogged.written().is_empty(), "nobody logs");
        marks.unlogged.awaits_log.store(true, Ordering::Release);
        marks.mark_dirty(3, 4);
        marks.slice_at(100).slice_at(50).mark_dirty(7, 8);
        assert_eq!(*marks.unlogged.written(), [(3, 4), (157, 8)]);
        marks.settle(None);
        marks.slice_at(9).mark_dirty(1, 1);
        assert!(marks.unlogged.written().is_empty());
    }
}
