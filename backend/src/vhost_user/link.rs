//! What every frontend's connection has, whichever device it is to: its rings, its worker's wake-up, and
//! a device state that is on its way.

use std::cell::OnceCell;
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::VhostTransferStateDirection;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler, VringT};
use virtio_queue::QueueT;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vhost_user::transfer::{Cancel, Transfer};
use crate::vhost_user::vring::{Memory, Vring};
use crate::virtio::polling::{self, Polling};
use crate::virtio::region_cache::RegionCache;
use crate::virtio::ring::{WhenIdle, available_index};

/// How many requests are served before other rings and the clock get their turn.
pub(crate) const BATCH: usize = 256;

/// How many kicks in a row may bring nothing. A driver's kicks seldom do, and any chain that is
/// taken begins the count anew; a kick descriptor that is readable for ever (an eventfd that is a
/// semaphore, say) would keep the worker busy with nothing.
const IDLE_KICKS: u32 = 65_536;

/// More queues than a device has (a bit each).
const MOST_QUEUES: usize = u32::BITS as usize;

/// How often a worker looks at its rings between two looks at the clock, which take as long.
const LOOKS: usize = 4;

/// Why serving a ring came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// There is nothing left to serve, or nothing that may be.
    Drained,
    /// A request had effects that must be carried out before the next.
    EffectsPending,
    /// There is more, but it is somebody else's turn.
    BatchFull,
}

/// What a device does on a connection's worker.
pub(crate) trait Serve {
    /// The queues that requests come by.
    fn request_queues(&self) -> Range<u16>;
    /// Serves a queue, and carries out what came of it.
    fn serve(&self, queue: u16, idle: WhenIdle);
    /// The device's alarm went off.
    fn time_passed(&self);
    /// When it does, ns of CLOCK_MONOTONIC; `u64::MAX` where it does not.
    fn alarm_at(&self) -> u64;
    /// How many chains were ever taken from the rings.
    fn taken(&self) -> u64;
}

/// See the module.
pub(crate) struct Link<B: Bitmap + 'static> {
    pub(crate) memory: Memory<B>,
    queues: u16,
    /// The worker hands its rings over with its first event.
    vrings: OnceLock<Vec<Vring<B>>>,
    /// Wakes the worker: to start, to go on with what it left for later, or to stop.
    wake: EventFd,
    /// Queues with requests left for later, as bits.
    unfinished: AtomicU32,
    stopping: AtomicBool,
    polling: Polling,
    /// Held while the worker looks at the rings' memory without having the rings.
    looking: Mutex<()>,
    /// How many want it not to.
    turned_away: AtomicU32,
    /// Queues whose drivers were not asked to kick, as bits, since the worker looks at them.
    parked: AtomicU32,
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

/// A bit for each of these queues.
fn bits(queues: Range<u16>) -> u32 {
    queues.fold(0, |bits, queue| bits | 1 << queue)
}

/// Logs why what the frontend wants is refused: it only learns that it was.
pub(crate) fn refuse<E: Display>(what: &str) -> impl FnOnce(E) -> io::Error {
    move |error| {
        log::error!("{what} failed: {error}");
        io::Error::other(error.to_string())
    }
}

impl<B: Bitmap + 'static> Link<B> {
    /// A connection over the memory that it will share. `worker_ended` is written when it can serve
    /// no more; the worker looks for requests for so long before it sleeps.
    pub(crate) fn new(
        queues: u16,
        memory: Memory<B>,
        worker_ended: EventFd,
        poll_max: Duration,
    ) -> io::Result<Self> {
        Ok(Link {
            memory,
            queues,
            vrings: OnceLock::new(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            unfinished: AtomicU32::new(0),
            stopping: AtomicBool::new(false),
            polling: Polling::new(poll_max.as_nanos().try_into().unwrap_or(u64::MAX)),
            looking: Mutex::new(()),
            turned_away: AtomicU32::new(0),
            parked: AtomicU32::new(0),
            transfer: Mutex::new(None),
            stop_transfer: Arc::new(Cancel::new()?),
            idle_kicks: AtomicU32::new(0),
            worker_ended,
        })
    }

    /// How many queues there are.
    pub(crate) fn queues(&self) -> u16 {
        self.queues
    }

    /// A mask of queues for each thread: all of them on one.
    pub(crate) fn queues_per_thread(&self) -> Vec<u64> {
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
    pub(crate) fn attach<T: VhostUserBackend>(
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

    /// Stoppable the worker. The crate has an exit event for that, but loses a descriptor for each.
    pub(crate) fn stop(&self) {
        self.stop_transfer.cancel();
        self.stopping.store(true, Ordering::Release);
        // It fails only where the counter is full, and then the worker wakes as well.
        let _ = self.wake.write(1);
    }

    /// Whether the worker was told to end.
    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(crate) fn vrings(&self) -> &[Vring<B>] {
        self.vrings.get().map_or(&[], Vec::as_slice)
    }

    pub(crate) fn vring(&self, queue: u16) -> Option<&Vring<B>> {
        self.vrings().get(usize::from(queue))
    }

    /// Lets the worker come back to a queue when the others had their turn.
    pub(crate) fn go_on_later(&self, queue: u16) {
        self.unfinished.fetch_or(1 << queue, Ordering::Relaxed);
        let _ = self.wake.write(1);
    }

    /// Something that the worker waits for has happened. An error ends the worker, for good.
    pub(crate) fn handle_event(
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

    /// Serves a queue whose driver kicked, and whatever comes soon after.
    fn kicked(&self, queue: u16, device: &impl Serve) -> io::Result<()> {
        let before = device.taken();
        if device.request_queues().contains(&queue) {
            let window = self.polling.kicked();
            self.serve(1 << queue, window, device);
        } else {
            device.serve(queue, WhenIdle::AskForKick);
        }
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
        if unfinished == 0 {
            return Ok(());
        }
        let requests = bits(device.request_queues());
        for queue in self.queues_of(unfinished & !requests) {
            device.serve(queue, WhenIdle::AskForKick);
        }
        if unfinished & requests != 0 {
            self.serve(unfinished & requests, self.polling.length(), device);
        }
        Ok(())
    }

    /// The queues of which there is a bit.
    fn queues_of(&self, bits: u32) -> impl Iterator<Item = u16> + use<B> {
        (0..self.queues).filter(move |queue| bits & (1 << queue) != 0)
    }

    /// Serves these request queues, and for as long as the window is, and longer where more comes, all
    /// request queues.
    fn serve(&self, queues: u32, window: u64, device: &impl Serve) {
        if window == 0 {
            let parked = self.parked.swap(0, Ordering::Relaxed);
            for queue in self.queues_of(queues | parked) {
                device.serve(queue, WhenIdle::AskForKick);
            }
            self.polling.sleeps();
            return;
        }
        let look = self.polling.begin();
        for queue in self.queues_of(queues) {
            device.serve(queue, WhenIdle::KeepPolling);
        }
        let mut parked = self.parked.load(Ordering::Relaxed) | queues;
        // Others wait for the worker, too: its alarm, and what epoll tells of.
        let end = look.began.saturating_add(self.polling.max());
        let mut found = false;
        let mut idle_since = polling::now();
        loop {
            let vain = idle_since.saturating_add(window).min(device.alarm_at());
            let available = self.look(device.request_queues(), vain.min(end));
            for queue in self.queues_of(available) {
                device.serve(queue, WhenIdle::KeepPolling);
            }
            parked |= available;
            found |= available != 0;
            let now = polling::now();
            let in_vain = available == 0 && (now >= vain || now >= end && !found);
            if self.stopping() || in_vain {
                self.parked.store(0, Ordering::Relaxed);
                for queue in self.queues_of(parked) {
                    device.serve(queue, WhenIdle::AskForKick);
                }
                self.polling
                    .over(&look, found, now.saturating_sub(idle_since));
                return;
            }
            if now >= end || self.unfinished.load(Ordering::Relaxed) != 0 {
                // It may go on, once the others had their turn.
                self.parked.store(parked, Ordering::Relaxed);
                for queue in self.queues_of(parked) {
                    self.go_on_later(queue);
                }
                self.polling.goes_on(&look);
                return;
            }
            idle_since = now;
        }
    }

    /// Has the worker look away, and anew: a ring was stopped, or the memory is another one. Afterwards it
    /// touches neither the one nor the other any more.
    pub(crate) fn look_away(&self) {
        self.turned_away.fetch_add(1, Ordering::SeqCst);
        drop(self.looking.lock().unwrap_or_else(PoisonError::into_inner));
        self.turned_away.fetch_sub(1, Ordering::SeqCst);
    }

    /// Looks at rings until one of them has chains to be taken, and returns which; or until the time
    /// has come, or somebody wants something else.
    fn look(&self, queues: Range<u16>, until: u64) -> u32 {
        let _looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        let mem = self.memory.memory();
        let mut reach = RegionCache::new(&*mem);
        let mut rings = [None; MOST_QUEUES];
        for (ring, queue) in rings.iter_mut().zip(queues.clone()) {
            *ring = self.vring(queue).and_then(|vring| {
                let state = vring.get_ref();
                let ring = state.get_queue();
                (ring.ready() && state.is_enabled()).then_some(())?;
                // As it is in memory.
                Some((
                    available_index(ring, &mut reach)?,
                    ring.next_avail().to_le(),
                ))
            });
        }
        loop {
            for _ in 0..LOOKS {
                let available = rings
                    .iter()
                    .zip(queues.clone())
                    .fold(0, |bits, (ring, queue)| {
                        let has = |(index, taken): (&AtomicU16, u16)| {
                            index.load(Ordering::Relaxed) != taken
                        };
                        bits | u32::from(ring.is_some_and(has)) << queue
                    });
                if available != 0 {
                    return available;
                }
                std::hint::spin_loop();
            }
            if self.stopping()
                || self.unfinished.load(Ordering::Relaxed) != 0
                || self.turned_away.load(Ordering::Relaxed) != 0
                || polling::now() >= until
            {
                return 0;
            }
        }
    }

    /// The rings see new memory by themselves; what they hold is looked up when it is used. A
    /// region that goes on where its file ends is refused: touching it there is SIGBUS.
    pub(crate) fn check_memory(&self) -> io::Result<()> {
        self.look_away();
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
    pub(crate) fn start_transfer(
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
    pub(crate) fn finish_transfer(
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
pub(crate) const SAVING: &str = "Saving the device state";
/// Likewise.
pub(crate) const LOADING: &str = "Loading the device state";
