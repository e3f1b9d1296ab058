//! A vring whose descriptors cannot block the worker.
//!
//! `vhost-user-backend` reads the kick descriptor and writes the call descriptor as they come. A
//! frontend that sends blocking ones, or a full pipe, would block the worker permanently, and every
//! other ring with it. Here they are made non-blocking when they arrive. The rest is the crate's
//! [`VringMutex`].

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

use crate::sys::set_nonblocking;
use crate::vhost_user::door::check_eventfd;
use crate::virtio::Memory;
use crate::virtio::ring::{DeviceRing, LockedQueue, RingScratch};

/// Holds a ring back when it is about to be enabled.
type Hold = Box<dyn Fn() + Send + Sync>;

/// A ring that is locked.
type State<'a, B> = MutexGuard<'a, VringState<Memory<B>>>;

/// A ring that is being served.
pub(crate) type ServedRing<'a, B> = DeviceRing<'a, B, State<'a, B>>;

/// See the module.
pub(crate) struct Vring<B: Bitmap + 'static = ()> {
    ring: VringMutex<Memory<B>>,
    /// A kick descriptor was replaced while epoll watched it. The crate leaves it in the epoll set,
    /// so it may stay readable and is never read.
    orphaned: Arc<AtomicBool>,
    hold: Arc<OnceLock<Hold>>,
    /// The ring was set to start at index 0 since this was last asked.
    new_driver: Arc<AtomicBool>,
    /// The ring was served since it was last stopped.
    served: Arc<AtomicBool>,
}

impl<B: Bitmap + 'static> Clone for Vring<B> {
    fn clone(&self) -> Self {
        Vring {
            ring: self.ring.clone(),
            orphaned: Arc::clone(&self.orphaned),
            hold: Arc::clone(&self.hold),
            new_driver: Arc::clone(&self.new_driver),
            served: Arc::clone(&self.served),
        }
    }
}

impl<B: Bitmap + 'static> LockedQueue for State<'_, B> {
    fn queue(&self) -> &Queue {
        self.get_queue()
    }

    fn queue_mut(&mut self) -> &mut Queue {
        self.get_queue_mut()
    }

    fn notify(&self) -> io::Result<()> {
        self.signal_used_queue()
    }
}

impl<B: Bitmap + 'static> Vring<B> {
    /// Whenever the frontend enables the ring, `hold` is called first, on the request thread; the
    /// acknowledgement comes after.
    pub(super) fn hold_enabling(&self, hold: impl Fn() + Send + Sync + 'static) {
        let _ = self.hold.set(Box::new(hold));
    }

    /// The ring, to be served, where it is started and enabled.
    pub(crate) fn usable<'a>(
        &'a self,
        queue: u16,
        mem: &'a GuestMemoryMmap<B>,
        scratch: &'a mut RingScratch,
    ) -> Option<ServedRing<'a, B>> {
        let state = self.get_mut();
        if !state.get_queue().ready() || !state.is_enabled() {
            return None;
        }
        self.served.store(true, Ordering::Relaxed);
        DeviceRing::new(state, queue, mem, scratch).within_memory()
    }

    /// The ring, though it is being stopped or is disabled: what was taken from it may be given
    /// back. `None` where the ring was not served since it was last stopped: then it is the
    /// driver's alone, though the crate still knows its addresses.
    pub(crate) fn stopping<'a>(
        &'a self,
        queue: u16,
        mem: &'a GuestMemoryMmap<B>,
        scratch: &'a mut RingScratch,
    ) -> Option<ServedRing<'a, B>> {
        let state = self.get_mut();
        let served = self.served.swap(false, Ordering::Relaxed);
        served.then(|| DeviceRing::new(state, queue, mem, scratch))
    }

    /// Whether the ring was set to start at index 0 since this was last asked. A new driver starts
    /// there; a ring that was only stopped for a while goes on where it was.
    pub(crate) fn has_new_driver(&self) -> bool {
        self.new_driver.swap(false, Ordering::Relaxed)
    }
}

/// The descriptor, where it is an eventfd; nothing but that can be waited for and written without
/// end.
fn eventfd(file: Option<File>) -> Option<File> {
    file.filter(|file| {
        check_eventfd(file.as_fd())
            .inspect_err(|refusal| {
                log::error!("Kick, call or error descriptor ignored: {refusal}");
            })
            .is_ok()
    })
}

fn nonblocking(file: Option<File>) -> Option<File> {
    eventfd(file).filter(|file| {
        set_nonblocking(file)
            .inspect_err(|error| {
                log::error!(
                    "Kick or call descriptor ignored: making it non-blocking failed: {error}"
                );
            })
            .is_ok()
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
            new_driver: Arc::default(),
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
            self.new_driver.store(true, Ordering::Relaxed);
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
            log::error!("Ring of {num} descriptors ignored: a split ring's size is a power of two");
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

    /// A kick that is no longer there is no error: the ring was stopped and started since epoll saw
    /// it, or another reader took it.
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
        self.ring.set_err(eventfd(file));
    }
}
