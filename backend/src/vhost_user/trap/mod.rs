//! Touching a peer's memory neither ends the process nor fails: the SIGBUS handler.
//!
//! The frontend owns the files of the memory that it shares. It can shorten one after it was
//! checked, and a file system can lack room or huge pages for what was never written. Touching such
//! a page is SIGBUS. The handler puts private pages in place, so that the access goes on, marks the
//! connection, and wakes the thread that ends it.
//!
//! - What was read since the mark is not what the peer wrote: [`MemoryLost`] says so, and such a
//!   chain is not served.
//! - Memory is [watched](Trap::watch_regions) before anything touches it, and until nothing can.
//! - A SIGBUS at any other address ends the process, as without the handler.

mod handler;
mod table;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::virtio::MemoryLost;
use table::{Entry, Range, Slot};

/// One connection's memory, as the handler knows it.
#[derive(Debug)]
pub(crate) struct Trap {
    slot: &'static Slot,
    /// Written by the handler.
    wake: OwnedFd,
}

impl Trap {
    /// For a connection whose memory is to be watched. `wake`, an eventfd, becomes readable when
    /// some of it is lost.
    ///
    /// # Errors
    ///
    /// Where no handler can be installed, or too many connections have one.
    pub(super) fn new(wake: OwnedFd) -> io::Result<Arc<Self>> {
        handler::install()?;
        let slot = Slot::claim(wake.as_raw_fd())
            .ok_or_else(|| io::Error::other("too many connections at once"))?;
        Ok(Arc::new(Trap { slot, wake }))
    }

    /// Whether memory of this connection was lost.
    pub(super) fn lost(&self) -> MemoryLost {
        MemoryLost::of(&self.slot.lost)
    }

    /// What was lost first, for the log.
    pub(super) fn sprung(&self) -> Option<Sprung> {
        self.slot.first_lost().map(|range| Sprung {
            range,
            in_place: self.slot.in_place(),
        })
    }

    /// Watches all regions of the memory. They must stay mapped for as long as the result lives.
    ///
    /// # Errors
    ///
    /// Where the process watches too many regions already.
    pub(super) fn watch_regions<B: Bitmap>(
        self: &Arc<Self>,
        memory: &GuestMemoryMmap<B>,
    ) -> io::Result<Watched> {
        let ranges = memory.iter().map(|region| Range {
            start: region.as_ptr().expose_provenance(),
            len: region.len() as usize,
            guest: Some(region.start_addr().0),
        });
        self.watch(ranges)
    }

    /// Watches a log that is mapped here. It must stay mapped for as long as the result lives.
    ///
    /// # Errors
    ///
    /// As for [`watch_regions`](Self::watch_regions).
    pub(super) fn watch_log(self: &Arc<Self>, start: usize, len: usize) -> io::Result<Watched> {
        self.watch(std::iter::once(Range {
            start,
            len,
            guest: None,
        }))
    }

    fn watch(self: &Arc<Self>, ranges: impl Iterator<Item = Range>) -> io::Result<Watched> {
        let mut watched = Watched {
            trap: Arc::clone(self),
            entries: Vec::new(),
        };
        for range in ranges {
            let entry = table::insert(&range, self.slot).ok_or_else(|| {
                io::Error::other("too many memory regions are shared with this process")
            })?;
            watched.entries.push(entry);
        }
        Ok(watched)
    }
}

impl AsFd for Trap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.slot.release();
    }
}

/// Memory that is watched until this is dropped.
#[derive(Debug)]
pub(super) struct Watched {
    /// Keeps the slot.
    #[expect(dead_code, reason = "kept for its drop")]
    trap: Arc<Trap>,
    entries: Vec<&'static Entry>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        for entry in &self.entries {
            table::remove(entry);
        }
    }
}

/// What was lost first, and how much this process has in place of all that was lost so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sprung {
    range: Range,
    /// Bytes.
    in_place: usize,
}

impl std::fmt::Display for Sprung {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Range { len, guest, .. } = self.range;
        match guest {
            Some(guest) => write!(f, "its memory region of {len:#x} bytes at {guest:#x}")?,
            None => f.write_str("its dirty log")?,
        }
        write!(
            f,
            " cannot be touched: the file became shorter, or there is no memory or huge page for \
             it; keep shared files as long as they are, and reserve their pages ({} KiB of private \
             memory took the place of what was lost)",
            self.in_place.div_ceil(1024)
        )
    }
}

#[cfg(test)]
mod tests;
