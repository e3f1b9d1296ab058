//! The log of what is written to the guest's memory, for a migration (VHOST_USER_SET_LOG_BASE).
//!
//! `vhost-user-backend` gives the log to the memory regions that exist when it arrives. A region
//! that comes later, by SET_MEM_TABLE or ADD_MEM_REG, has none, and what is written there would be
//! missing on the destination. So the connection's request thread, where all of these messages
//! arrive, keeps the log, and [`DirtyBitmap::keep_logging`] gives it to new regions; what was
//! written to them before that is logged then.

use std::cell::RefCell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::{
    AtomicBitmapMmap, BitmapMmapRegion, BitmapReplace, MemRegionBitmap, MmapLogReg,
};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::sys::lock;
use crate::vhost_user::trap::{Trap, Watched};

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
    /// frontend shared one. Logs are watched by `trap`, now and later.
    fn keep_logging(memory: &GuestMemoryMmap<Self>, trap: &Arc<Trap>);
}

/// The frontend's own memory, which is not migrated.
impl DirtyBitmap for () {
    const FEATURES: u64 = 0;
    const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::empty();

    fn keep_logging(_memory: &GuestMemoryMmap, _trap: &Arc<Trap>) {}
}

impl DirtyBitmap for DirtyLog {
    const FEATURES: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
    const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::LOG_SHMFD;

    fn keep_logging(memory: &GuestMemoryMmap<Self>, trap: &Arc<Trap>) {
        for region in memory.iter() {
            let _ = (*region).bitmap().unlogged.trap.set(Arc::clone(trap));
        }
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
    /// Watches the log, from when the region is used.
    trap: OnceLock<Arc<Trap>>,
    log: Mutex<Option<WatchedLog>>,
}

/// A log that stays mapped while it is watched: the fields are dropped in this order.
#[derive(Debug)]
#[expect(dead_code, reason = "kept for its drop")]
struct WatchedLog {
    watched: Watched,
    log: Arc<MmapLogReg>,
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
        let watched = self.unlogged.trap.get().map(|trap| part.watch(trap));
        let former = match watched.transpose() {
            Ok(watched) => std::mem::replace(&mut *lock(&self.unlogged.log), watched),
            Err(error) => {
                log::error!("Writes are not logged for the migration: {error}");
                return self.settle(None);
            }
        };
        self.settle(Some(part.part));
        drop(former);
    }
}

/// A region's part of the log.
pub(crate) struct RegionLog {
    part: AtomicBitmapMmap,
    log: Arc<MmapLogReg>,
    /// How much of the log the region needs, bytes: one for eight pages from address 0 on.
    len: usize,
}

impl RegionLog {
    /// The crate tells neither where a log is mapped nor for how long; what regions need of it is.
    fn watch(&self, trap: &Arc<Trap>) -> io::Result<WatchedLog> {
        let start = ptr::from_ref(&self.log[0]).expose_provenance();
        Ok(WatchedLog {
            watched: trap.watch_log(start, self.len)?,
            log: Arc::clone(&self.log),
        })
    }
}

impl MemRegionBitmap for RegionLog {
    fn new<R: GuestMemoryRegion>(region: &R, log: Arc<MmapLogReg>) -> io::Result<Self> {
        const PAGES_OF_A_BYTE: u64 = 8 * 0x1000;
        let part = AtomicBitmapMmap::new(region, Arc::clone(&log))?;
        let last = region.last_addr().raw_value() / PAGES_OF_A_BYTE;
        let len = usize::try_from(last + 1).map_err(io::Error::other)?;
        LOG.set(Some(Arc::clone(&log)));
        Ok(RegionLog { part, log, len })
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
