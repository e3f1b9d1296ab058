//! What every frontend's connection has, whichever device it is to: its rings, its worker's wake-up, and
//! a device state that is on its way.

use std::cell::OnceCell;
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vhost::vhost_user::message::VhostTransferStateDirection;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::transfer::{Cancel, Transfer};
use super::vring::{Memory, Vring};

/// How many requests are served before other rings and the clock get their turn.
pub(super) const BATCH: usize = 256;

/// How many kicks in a row may bring nothing. A driver's kicks seldom do, and any chain that is
/// taken begins the count anew; a kick descriptor that is readable for ever (an eventfd that is a
/// semaphore, say) would keep the worker busy with nothing.
const IDLE_KICKS: u32 = 65_536;

/// Why serving a ring came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// There is nothing left to serve, or nothing that may be.
    All,
    /// A request had effects that must be carried out before the next.
    ToEffects,
    /// There is more, but it is somebody else's turn.
    ToBatch,
}

/// What a device does on a connection's worker.
pub(super) trait Serve {
    /// Serves a queue, and carries out what came of it.
    fn serve(&self, queue: u16);
    /// The device's alarm went off.
    fn time_passed(&self);
    /// How many chains were ever taken from the rings.
    fn taken(&self) -> u64;
}

/// See the module.
pub(super) struct Link<B: Bitmap + 'static> {
    pub(super) memory: Memory<B>,
    queues: u16,
    /// The worker hands its rings over with its first event.
    vrings: OnceLock<Vec<Vring<B>>>,
    /// Wakes the worker: to start, to go on with what it left for later, or to stop.
    wake: EventFd,
    /// Queues with requests left for later, as bits.
    unfinished: AtomicU32,
    stopping: AtomicBool,
    /// The device state that is being saved or loaded.
    transfer: Mutex<Option<Transfer>>,
    stop_transfer: Arc<Cancel>,
    /// Kicks in a row that brought nothing.
    idle_kicks: AtomicU32,
    /// Written when the worker ends, for whatever reason.
    worker_ended: EventFd,
}

/// Tells that the thread that has it is ending.
struct EndOfThread(EventFd);

impl Drop for EndOfThread {
    fn drop(&mut self) {
        let _ = self.0.write(1);
    }
}

thread_local! {
    static END_OF_WORKER: OnceCell<EndOfThread> = const { OnceCell::new() };
}

/// Logs why what the frontend wants is refused: it only learns that it was.
pub(super) fn refuse<E: Display>(what: &str) -> impl FnOnce(E) -> io::Error {
    move |error| {
        log::error!("{what} failed: {error}");
        io::Error::other(error.to_string())
    }
}

impl<B: Bitmap + 'static> Link<B> {
    /// A connection over the memory that it will share. `worker_ended` is written when it can serve
    /// no more.
    pub(super) fn new(queues: u16, memory: Memory<B>, worker_ended: EventFd) -> io::Result<Self> {
        Ok(Link {
            memory,
            queues,
            vrings: OnceLock::new(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            unfinished: AtomicU32::new(0),
            stopping: AtomicBool::new(false),
            transfer: Mutex::new(None),
            stop_transfer: Arc::new(Cancel::new()?),
            idle_kicks: AtomicU32::new(0),
            worker_ended,
        })
    }

    /// How many queues there are.
    pub(super) fn queues(&self) -> u16 {
        self.queues
    }

    /// A mask of queues for each thread: all of them on one.
    pub(super) fn queues_per_thread(&self) -> Vec<u64> {
        vec![u64::MAX >> (64 - self.queues)]
    }

    /// The identifiers under which the worker sees the wake-up and the alarm. The crate keeps
    /// those up to the number of queues to itself.
    fn wake_id(&self) -> u16 {
        self.queues + 1
    }

    fn alarm_id(&self) -> u16 {
        self.queues + 2
    }

    /// Lets the worker hear of the device's alarm and of the connection's wake-up, and waits until it
    /// has handed over its rings.
    pub(super) fn attach<T: VhostUserBackend>(
        &self,
        worker: &VringEpollHandler<T>,
        alarm: RawFd,
    ) -> io::Result<()> {
        worker.register_listener(self.wake.as_raw_fd(), EventSet::IN, self.wake_id().into())?;
        worker.register_listener(alarm, EventSet::IN, self.alarm_id().into())?;
        self.wake.write(1)?;
        self.vrings.wait();
        Ok(())
    }

    /// Ends the worker. The crate has an exit event for that, but loses a descriptor for each.
    pub(super) fn stop(&self) {
        self.stop_transfer.cancel();
        self.stopping.store(true, Ordering::Release);
        // It fails only where the counter is full, and then the worker wakes as well.
        let _ = self.wake.write(1);
    }

    /// Whether the worker was told to end.
    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn vrings(&self) -> &[Vring<B>] {
        self.vrings.get().map_or(&[], Vec::as_slice)
    }

    pub(super) fn vring(&self, queue: u16) -> Option<&Vring<B>> {
        self.vrings().get(usize::from(queue))
    }

    /// Lets the worker come back to a queue when the others had their turn.
    pub(super) fn go_on_later(&self, queue: u16) {
        self.unfinished.fetch_or(1 << queue, Ordering::Relaxed);
        let _ = self.wake.write(1);
    }

    /// Something that the worker waits for has happened. An error ends the worker, for good.
    pub(super) fn handle_event(
        &self,
        event: u16,
        vrings: &[Vring<B>],
        device: &impl Serve,
    ) -> io::Result<()> {
        if self.vrings.get().is_none() {
            let _ = self.vrings.set(vrings.to_vec());
        }
        END_OF_WORKER.with(|end| {
            if end.get().is_none()
                && let Ok(fd) = self.worker_ended.try_clone()
            {
                let _ = end.set(EndOfThread(fd));
            }
        });
        match event {
            event if event == self.wake_id() => self.woken(device)?,
            event if event == self.alarm_id() => device.time_passed(),
            queue => self.kicked(queue, device)?,
        }
        Ok(())
    }

    /// Serves a queue whose driver kicked.
    fn kicked(&self, queue: u16, device: &impl Serve) -> io::Result<()> {
        let before = device.taken();
        device.serve(queue);
        if device.taken() != before {
            self.idle_kicks.store(0, Ordering::Relaxed);
        } else if self.idle_kicks.fetch_add(1, Ordering::Relaxed) >= IDLE_KICKS {
            return Err(io::Error::other("Kicks without end that bring nothing"));
        }
        Ok(())
    }

    fn woken(&self, device: &impl Serve) -> io::Result<()> {
        // Nothing to read: another wake-up took it along. And this one may take along the one to
        // stop, so that comes after.
        let _ = self.wake.read();
        if self.stopping() {
            return Err(io::Error::other("The connection is over"));
        }
        let unfinished = self.unfinished.swap(0, Ordering::Relaxed);
        for queue in 0..self.queues {
            if unfinished & (1 << queue) != 0 {
                device.serve(queue);
            }
        }
        Ok(())
    }

    /// The rings see new memory by themselves; what they hold is looked up when it is used. A
    /// region that goes on where its file ends is refused: touching it there is SIGBUS.
    pub(super) fn check_memory(&self) -> io::Result<()> {
        for region in self.memory.memory().iter() {
            let Some(backing) = region.file_offset() else {
                continue;
            };
            let file = backing.file().metadata()?;
            let end = backing.start().checked_add(region.len());
            if file.is_file() && end.is_none_or(|end| end > file.len()) {
                log::error!(
                    "A memory region of {:#x} bytes from {:#x} of a file of {:#x} is refused",
                    region.len(),
                    backing.start(),
                    file.len()
                );
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        Ok(())
    }

    fn transfer(&self) -> MutexGuard<'_, Option<Transfer>> {
        self.transfer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SET_DEVICE_STATE_FD. A save takes the stream as `save` makes it at this instant; a load takes
    /// nothing in before CHECK_DEVICE_STATE. Either replaces a transfer that is under way.
    pub(super) fn start_transfer(
        &self,
        direction: VhostTransferStateDirection,
        file: File,
        save: impl FnOnce() -> io::Result<Vec<u8>>,
    ) -> io::Result<()> {
        let transfer = match direction {
            VhostTransferStateDirection::SAVE => Transfer::save(file, save()?, &self.stop_transfer),
            VhostTransferStateDirection::LOAD => Transfer::load(file, &self.stop_transfer),
        };
        *self.transfer() = Some(transfer.map_err(refuse("Starting the device state's transfer"))?);
        Ok(())
    }

    /// CHECK_DEVICE_STATE: waits for the end of the transfer; what was to be loaded goes to `load`,
    /// which logs why it refuses.
    pub(super) fn finish_transfer(
        &self,
        load: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(transfer) = self.transfer().take() else {
            return Err(refuse("Checking the device state")(
                "no transfer was started",
            ));
        };
        if transfer.loads {
            load(&transfer.finish().map_err(refuse(LOADING))?)
        } else {
            let saved = transfer.finish();
            saved.map(drop).map_err(refuse(SAVING))
        }
    }
}

/// What failed, in the log.
pub(super) const SAVING: &str = "Saving the device state";
/// Likewise.
pub(super) const LOADING: &str = "Loading the device state";
