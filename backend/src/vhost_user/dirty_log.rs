//! The log of what is written to the guest's memory, for a migration (VHOST_USER_SET_LOG_BASE).
//!
//! `vhost-user-backend` gives the log to the memory regions that exist when it arrives. A region
//! that comes later, by SET_MEM_TABLE or ADD_MEM_REG, has none, and what is written there would be
//! missing on the destination. So the connection's request thread, where all of these messages
//! arrive, keeps the log, and [`DirtyBitmap::keep_logging`] gives it to new regions, before
//! anything writes there.

use std::cell::RefCell;
use std::io;
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock};

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

    /// Gives the regions of memory that is not in use yet their part of the log, where this
    /// thread's frontend shared one. Logs are watched by `trap`, now and later.
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
            let _ = (*region).bitmap().watch.trap.set(Arc::clone(trap));
        }
        let Some(log) = LOG.with_borrow(Option::clone) else {
            return;
        };
        for region in memory.iter() {
            match RegionLog::new(region, Arc::clone(&log)) {
                Ok(part) => (*region).bitmap().replace(part),
                Err(error) => log::error!(
                    "Writes to the memory region at {:#x} are not logged for the migration, \
                     since the frontend's log ends before it: {error}",
                    region.start_addr().raw_value()
                ),
            }
        }
    }
}

/// The writes to one region, or to a slice of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct DirtyLog {
    log: BitmapMmapRegion,
    watch: Arc<Watch>,
}

/// What watches the region's part of the log.
#[derive(Debug, Default)]
struct Watch {
    /// From when the region is used.
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

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> Self {
        DirtyLog {
            log: self.log.slice_at(offset),
            watch: Arc::clone(&self.watch),
        }
    }
}

impl WithBitmapSlice<'_> for DirtyLog {
    type S = Self;
}

impl BitmapSlice for DirtyLog {}

impl NewBitmap for DirtyLog {
    fn with_len(_len: usize) -> Self {
        DirtyLog::default()
    }
}

impl BitmapReplace for DirtyLog {
    type InnerBitmap = RegionLog;

    fn replace(&self, part: RegionLog) {
        let watched = self.watch.trap.get().map(|trap| part.watch(trap));
        let former = match watched.transpose() {
            Ok(watched) => std::mem::replace(&mut *lock(&self.watch.log), watched),
            Err(error) => {
                log::error!("Writes are not logged for the migration: {error}");
                return;
            }
        };
        self.log.replace(part.part);
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
