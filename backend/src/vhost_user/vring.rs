//! A vring whose descriptors cannot block the worker.
//!
//! `vhost-user-backend` reads the kick descriptor and writes the call descriptor as they come.
//! A frontend that sends blocking ones, or a full pipe, would hold the worker for good, and
//! with it every other ring. Here they are made non-blocking when they arrive. The rest is the
//! crate's [`VringMutex`].

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The memory that a frontend shares; `B` marks what is written to it, for a migration.
pub(crate) type Memory<B> = GuestMemoryAtomic<GuestMemoryMmap<B>>;

/// What holds a ring back when it is to be enabled.
type Hold = Box<dyn Fn() + Send + Sync>;

/// See the module.
pub struct Vring<B: Bitmap + 'static = ()> {
    ring: VringMutex<Memory<B>>,
    /// A kick descriptor was replaced while epoll watched it. The crate does not take it out, so
    /// it may be readable for ever and is never read.
    orphaned: Arc<AtomicBool>,
    hold: Arc<OnceLock<Hold>>,
    /// It was set to index 0 since somebody looked.
    anew: Arc<AtomicBool>,
    /// It was served since it was stopped last.
    served: Arc<AtomicBool>,
}

impl<B: Bitmap + 'static> Clone for Vring<B> {
    fn clone(&self) -> Self {
        Vring {
            ring: self.ring.clone(),
            orphaned: Arc::clone(&self.orphaned),
            hold: Arc::clone(&self.hold),
            anew: Arc::clone(&self.anew),
            served: Arc::clone(&self.served),
        }
    }
}

impl<B: Bitmap + 'static> Vring<B> {
    /// Whenever the frontend enables the ring, `hold` is called first, on its request thread; the
    /// acknowledgement comes after.
    pub(crate) fn hold_enabling(&self, hold: impl Fn() + Send + Sync + 'static) {
        let _ = self.hold.set(Box::new(hold));
    }

    /// The ring is about to be served.
    pub(crate) fn mark_served(&self) {
        self.served.store(true, Ordering::Relaxed);
    }

    /// Whether the ring was served since this was last asked. One that was not is the driver's alone:
    /// the crate knows its addresses still when it is stopped for the second time.
    pub(crate) fn was_served(&self) -> bool {
        self.served.swap(false, Ordering::Relaxed)
    }

    /// Whether the ring was set to begin at index 0 since this was last asked: a ring that is only
    /// stopped for a while goes on where it was, one of a driver that begins begins there.
    pub(crate) fn begins_anew(&self) -> bool {
        self.anew.swap(false, Ordering::Relaxed)
    }
}

fn nonblocking(file: Option<File>) -> Option<File> {
    file.filter(|file| {
        let set = fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags | OFlags::NONBLOCK));
        let kind = fstat(file).map(|stat| FileType::from_raw_mode(stat.st_mode));
        match (set, kind) {
            // An eventfd has no file type. A device may be readable for ever.
            (Ok(()), Ok(FileType::Unknown | FileType::Fifo | FileType::Socket)) => true,
            (Err(error), _) | (_, Err(error)) => {
                log::error!("A kick or call descriptor that cannot be made non-blocking: {error}");
                false
            }
            (_, Ok(kind)) => {
                log::error!("A {kind:?} is no kick or call descriptor");
                false
            }
        }
    })
}

impl<'a, B: Bitmap + 'static> VringStateGuard<'a, Memory<B>> for Vring<B> {
    type G = MutexGuard<'a, VringState<Memory<B>>>;
}

impl<'a, B: Bitmap + 'static> VringStateMutGuard<'a, Memory<B>> for Vring<B> {
    type G = MutexGuard<'a, VringState<Memory<B>>>;
}

impl<B: Bitmap + 'static> VringT<Memory<B>> for Vring<B> {
    fn new(mem: Memory<B>, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Vring {
            ring: VringMutex::new(mem, max_queue_size)?,
            orphaned: Arc::default(),
            hold: Arc::default(),
            anew: Arc::default(),
            served: Arc::default(),
        })
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<Memory<B>>> {
        self.ring.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<Memory<B>>> {
        self.ring.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.ring.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.ring.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.ring.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.ring.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.ring.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        if let Some(hold) = self.hold.get()
            && enabled
        {
            hold();
        }
        self.ring.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), Error> {
        self.ring.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.ring.set_queue_next_avail(base);
        if base == 0 {
            self.anew.store(true, Ordering::Relaxed);
        }
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.ring.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.ring.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        if !num.is_power_of_two() {
            log::error!("A ring of {num} descriptors: a split ring's size is a power of two");
        }
        self.ring.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.ring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.ring.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        let state = self.ring.get_ref();
        let watched = state.get_kick().is_some() && state.is_enabled();
        drop(state);
        if watched && file.is_some() {
            self.orphaned.store(true, Ordering::Relaxed);
        }
        self.ring.set_kick(nonblocking(file));
    }

    /// A kick that is not there any more is none: the ring was stopped and started since epoll
    /// saw it, or another reader took it.
    fn read_kick(&self) -> io::Result<bool> {
        match self.ring.read_kick() {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock
                    && !self.orphaned.load(Ordering::Relaxed) =>
            {
                Ok(self.ring.get_ref().is_enabled())
            }
            read => read,
        }
    }

    fn set_call(&self, file: Option<File>) {
        self.ring.set_call(nonblocking(file));
    }

    fn set_err(&self, file: Option<File>) {
        self.ring.set_err(file);
    }
}
