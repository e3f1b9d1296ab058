//! Memory that records each write by the device, and can act as the driver at that very instant: a
//! race that two threads hit now and then, a test hits every time.

use std::fmt;
use std::sync::{Arc, Mutex};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::NewBitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// What one region's bitmap has recorded.
#[derive(Default)]
struct Seen {
    writes: Vec<(usize, usize)>,
    /// What is to be done after this byte is written.
    then: Option<(usize, Box<dyn FnOnce() + Send>)>,
}

/// A dirty bitmap that keeps every mark as it came.
#[derive(Clone, Default)]
pub(crate) struct WriteRecorder {
    start: usize,
    seen: Arc<Mutex<Seen>>,
}

/// The writes since this was last asked, as guest addresses and lengths, in order within each
/// region.
pub(crate) fn writes(mem: &GuestMemoryMmap<WriteRecorder>) -> Vec<(u64, usize)> {
    let mut all = Vec::new();
    for region in mem.iter() {
        let base = region.start_addr().raw_value();
        for (at, len) in region.bitmap().seen.lock().unwrap().writes.drain(..) {
            all.push((base + at as u64, len));
        }
    }
    all
}

/// Acts as soon as this byte is written next, once.
pub(crate) fn once_written(
    mem: &GuestMemoryMmap<WriteRecorder>,
    at: u64,
    action: impl FnOnce() + Send + 'static,
) {
    let region = mem.find_region(GuestAddress(at)).unwrap();
    let offset = (at - region.start_addr().raw_value()) as usize;
    region.bitmap().seen.lock().unwrap().then = Some((offset, Box::new(action)));
}

impl Bitmap for WriteRecorder {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let written = self.start + offset..self.start + offset + len;
        let mut seen = self.seen.lock().unwrap();
        seen.writes.push((written.start, len));
        let due = seen.then.take_if(|(at, _)| written.contains(at));
        drop(seen);
        if let Some((_, action)) = due {
            action();
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let at = self.start + offset;
        let seen = self.seen.lock().unwrap();
        seen.writes
            .iter()
            .any(|(start, len)| (*start..start + len).contains(&at))
    }

    fn slice_at(&self, offset: usize) -> Self {
        WriteRecorder {
            start: self.start + offset,
            seen: Arc::clone(&self.seen),
        }
    }
}

impl WithBitmapSlice<'_> for WriteRecorder {
    type S = Self;
}

impl BitmapSlice for WriteRecorder {}

impl NewBitmap for WriteRecorder {
    fn with_len(_len: usize) -> Self {
        WriteRecorder::default()
    }
}

impl fmt::Debug for WriteRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteRecorder")
            .field("start", &self.start)
            .finish_non_exhaustive()
    }
}
