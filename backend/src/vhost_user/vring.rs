//! A vring whose descriptors cannot block anybody but its own connection.
//!
//! `vhost-user-backend` reads the kick descriptor and writes the call descriptor as they come, the
//! latter while the ring is locked, and leaves a kick descriptor that is replaced in its epoll set.
//! The frontend can change the flags of a descriptor that it shares at any time. That each is an
//! eventfd, the door has checked. Here
//!
//! - a kick is read without blocking, whatever the flags say ([`read_now`]);
//! - a kick descriptor leaves the epoll set before it is closed;
//! - the call descriptor is the ring's own, and written while no lock is held that anybody else
//!   wants ([`Vring::notify`]). The kernel has no write to an eventfd that never blocks.
//!
//! The rest is the crate's [`VringMutex`].

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use epoll::{ControlOptions, Event, Events};
use rustix::io::Errno;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::Bitmap;

use crate::sys::{Entered, Turnstile, lock, read_now, set_nonblocking};
use crate::virtio::Memory;
use crate::virtio::ring::{DeviceRing, LockedQueue, RingScratch};

/// A ring that is locked.
type State<'a, B> = MutexGuard<'a, VringState<Memory<B>>>;

/// A ring that is being served.
pub(crate) type ServedRing<'a, B> = DeviceRing<'a, B, State<'a, B>>;

/// What a ring's session does for it, on the request thread.
pub(super) trait RingOwner: Send + Sync {
    /// The frontend enables a ring; the acknowledgement comes after this returns.
    fn before_enabling(&self);

    /// The kick descriptor of a running ring was replaced: a kick may have come before.
    fn kick_replaced(&self, queue: u16);
}

/// A ring's place in its session.
pub(super) struct Place {
    pub(super) queue: u16,
    /// The worker's epoll instance, which outlives every message that reaches the ring.
    pub(super) epoll: RawFd,
    pub(super) owner: Weak<dyn RingOwner>,
    /// Lets the request thread go before the worker.
    pub(super) turnstile: Arc<Turnstile>,
}

/// See the module.
pub(crate) struct Vring<B: Bitmap + 'static = ()> {
    ring: VringMutex<Memory<B>>,
    own: Arc<Own>,
}

/// What a ring has beside the crate's.
#[derive(Default)]
struct Own {
    place: OnceLock<Place>,
    /// Locked while it is written, which may block, so never together with another lock.
    call: Mutex<Option<File>>,
    /// The driver is to be notified, by the thread that locks the call descriptor first.
    notification_due: AtomicBool,
    /// The ring was set to start at index 0 since this was last asked.
    new_driver: AtomicBool,
    /// The ring was served since it was last stopped.
    served: AtomicBool,
}

impl<B: Bitmap + 'static> Clone for Vring<B> {
    fn clone(&self) -> Self {
        Vring {
            ring: self.ring.clone(),
            own: Arc::clone(&self.own),
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
}

impl<B: Bitmap + 'static> Vring<B> {
    /// Gives the ring its place in a session, once.
    pub(super) fn attach(&self, place: Place) {
        let _ = self.own.place.set(place);
    }

    /// The ring, locked by the worker, or within a turn.
    pub(super) fn state(&self) -> State<'_, B> {
        self.ring.get_mut()
    }

    /// The ring, locked by the request thread, for which the worker makes way.
    fn state_first(&self) -> State<'_, B> {
        let _first = self.go_first();
        self.ring.get_mut()
    }

    fn go_first(&self) -> Option<Entered<'_>> {
        self.own.place.get().map(|place| place.turnstile.enter())
    }

    /// The ring, to be served, where it is started and enabled.
    pub(crate) fn usable<'a>(
        &'a self,
        queue: u16,
        mem: &'a GuestMemoryMmap<B>,
        scratch: &'a mut RingScratch,
    ) -> Option<ServedRing<'a, B>> {
        let state = self.state();
        if !state.get_queue().ready() || !state.is_enabled() {
            return None;
        }
        self.own.served.store(true, Ordering::Relaxed);
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
        let state = self.state();
        let served = self.own.served.swap(false, Ordering::Relaxed);
        served.then(|| DeviceRing::new(state, queue, mem, scratch))
    }

    /// Whether the ring was set to start at index 0 since this was last asked. A new driver starts
    /// there; a ring that was only stopped for a while goes on where it was.
    pub(crate) fn has_new_driver(&self) -> bool {
        self.own.new_driver.swap(false, Ordering::Relaxed)
    }

    /// The driver wants to be notified. Called while the rings are locked, so that the thread that
    /// stops the ring afterwards knows of it.
    pub(crate) fn notification_is_due(&self) {
        self.own.notification_due.store(true, Ordering::Relaxed);
    }

    /// Notifies the driver where that is due. On return the notification is written, by this thread
    /// or by another. Blocks where the frontend has made its descriptor full and blocking, until a
    /// signal interrupts it.
    ///
    /// # Errors
    ///
    /// Where a signal came; the notification is still due.
    pub(crate) fn notify(&self) -> io::Result<()> {
        let call = lock(&self.own.call);
        if !self.own.notification_due.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let Some(call) = &*call else {
            return Ok(());
        };
        match rustix::io::write(call, &1u64.to_ne_bytes()) {
            Err(Errno::INTR) => {
                self.notification_is_due();
                Err(Errno::INTR.into())
            }
            // A full eventfd: the driver has notifications enough to read.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Has the worker watch the kick descriptor of a running ring, or no longer. The crate does so
    /// only when a ring is started, stopped, enabled or disabled.
    fn watch_kick(&self, state: &VringState<Memory<B>>, watch: bool) {
        let (Some(place), Some(kick)) = (self.own.place.get(), state.get_kick()) else {
            return;
        };
        let control = match watch {
            true => ControlOptions::EPOLL_CTL_ADD,
            false => ControlOptions::EPOLL_CTL_DEL,
        };
        let event = Event::new(Events::EPOLLIN, place.queue.into());
        // Removing fails where it was not watched.
        if let Err(error) = epoll::ctl(place.epoll, control, kick.as_raw_fd(), event)
            && watch
        {
            log::error!(
                "Kicks of queue {} are not seen: watching its descriptor failed: {error}",
                place.queue
            );
        }
    }
}

/// The descriptor, which does not block unless its frontend insists. `what` is for the log.
fn nonblocking(file: Option<File>, place: Option<&Place>, what: &str) -> Option<File> {
    file.filter(|file| {
        set_nonblocking(file)
            .inspect_err(|error| {
                let queue = place.map_or(String::new(), |place| format!(" of queue {}", place.queue));
                log::error!(
                    "The {what} descriptor{queue} is ignored: making it non-blocking failed: {error}"
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
            own: Arc::default(),
        })
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<Memory<B>>> {
        self.state_first()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<Memory<B>>> {
        self.state_first()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.ring.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.notification_is_due();
        self.notify()
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
        if enabled && let Some(owner) = self.own.place.get().and_then(|it| it.owner.upgrade()) {
            owner.before_enabling();
        }
        let _first = self.go_first();
        self.ring.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), Error> {
        let _first = self.go_first();
        self.ring.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        let _first = self.go_first();
        self.ring.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        let _first = self.go_first();
        self.ring.set_queue_next_avail(base);
        if base == 0 {
            self.own.new_driver.store(true, Ordering::Relaxed);
        }
    }

    fn set_queue_next_used(&self, idx: u16) {
        let _first = self.go_first();
        self.ring.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        let _first = self.go_first();
        self.ring.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        if !num.is_power_of_two() {
            log::error!("Ring of {num} descriptors ignored: a split ring's size is a power of two");
        }
        let _first = self.go_first();
        self.ring.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        let _first = self.go_first();
        self.ring.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        let _first = self.go_first();
        self.ring.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        let file = nonblocking(file, self.own.place.get(), "kick");
        let state = self.state_first();
        self.watch_kick(&state, false);
        let watched = state.get_queue().ready() && state.is_enabled();
        drop(state);
        self.ring.set_kick(file);
        if !watched {
            return;
        }
        self.watch_kick(&self.state(), true);
        if let Some(place) = self.own.place.get()
            && let Some(owner) = place.owner.upgrade()
        {
            owner.kick_replaced(place.queue);
        }
    }

    /// A kick that is no longer there is no error: the ring was stopped and started since epoll saw
    /// it, or another reader took it.
    #[expect(
        unsafe_code,
        reason = "vmm-sys-util's EventConsumer has no `AsFd`, and reads as the flags say"
    )]
    fn read_kick(&self) -> io::Result<bool> {
        let state = self.state();
        if let Some(kick) = state.get_kick() {
            // SAFETY: the locked state owns the descriptor, and stays locked while it is read.
            let kick = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            match read_now(kick, &mut [0; size_of::<u64>()]) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(state.is_enabled())
    }

    fn set_call(&self, file: Option<File>) {
        *lock(&self.own.call) = nonblocking(file, self.own.place.get(), "call");
    }

    fn set_err(&self, file: Option<File>) {
        let _first = self.go_first();
        self.ring.set_err(file);
    }
}
