//! One frontend's connection: what `vhost-user-backend` calls.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vhost_user_timer_protocol::{EVENT_QUEUE, MAX_QUEUE_SIZE, Phase, wire};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::IntoBytes;

use super::rings::{Rings, Served};
use super::transfer::{Cancel, Transfer};
use super::vring::{Memory, Vring};
use super::{Core, TimerDevice};
use crate::state::stream;

const VIRTIO_FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// How many requests with effects are served before other rings and the end of the connection
/// get their turn: a frontend can see to it that there is always one more.
const EFFECTS: usize = 256;

/// How many kicks in a row may bring nothing. A driver's kicks seldom do, and any chain that is
/// taken begins the count anew; a kick descriptor that is readable for ever (an eventfd that is a
/// semaphore, say) would keep the worker busy with nothing.
const IDLE_KICKS: u32 = 65_536;

/// See the module.
pub(crate) struct Session {
    device: Arc<TimerDevice>,
    memory: Memory,
    rings: Mutex<Rings>,
    /// The worker hands its rings over with its first event.
    vrings: OnceLock<Vec<Vring>>,
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
    static END_OF_WORKER: std::cell::OnceCell<EndOfThread> = const { std::cell::OnceCell::new() };
}

impl Session {
    /// A session over the memory that its connection will share. `worker_ended` is written
    /// when it can serve no more.
    pub(crate) fn new(
        device: Arc<TimerDevice>,
        memory: Memory,
        worker_ended: EventFd,
    ) -> io::Result<Self> {
        Ok(Session {
            device,
            memory,
            rings: Mutex::default(),
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

    /// The identifiers under which the worker sees the wake-up and the alarm. The crate keeps
    /// those up to the number of queues to itself.
    fn wake_id(&self) -> u16 {
        self.device.queues() as u16 + 1
    }

    fn alarm_id(&self) -> u16 {
        self.device.queues() as u16 + 2
    }

    /// Lets the worker hear of the alarm and of the session's wake-up, and wakes it.
    pub(crate) fn attach(&self, worker: &VringEpollHandler<Arc<Session>>) -> io::Result<()> {
        worker.register_listener(self.wake.as_raw_fd(), EventSet::IN, self.wake_id().into())?;
        worker.register_listener(self.device.alarm_fd, EventSet::IN, self.alarm_id().into())?;
        self.wake.write(1)
    }

    /// Ends the worker. The crate has an exit event for that, but loses a descriptor for each.
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

    /// The frontend is gone: the VM is left as it was, with nobody waiting.
    pub(crate) fn disconnected(&self) {
        let mut core = self.device.core();
        let now = core.now();
        core.vm.disconnect(now);
        core.follow_time();
    }

    fn transfer(&self) -> MutexGuard<'_, Option<Transfer>> {
        self.transfer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rings(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vrings(&self) -> &[Vring] {
        self.vrings.get().map_or(&[], Vec::as_slice)
    }

    /// Serves a queue, and carries out what came of it.
    fn serve(&self, queue: u16) {
        if queue == EVENT_QUEUE {
            self.carry_out(&mut self.device.core(), &mut self.rings());
            return;
        }
        let Some(vring) = self.vrings().get(usize::from(queue)) else {
            return;
        };
        for _ in 0..EFFECTS {
            let mut core = self.device.core();
            let mut rings = self.rings();
            let served = rings.serve(&mut core, vring, queue, &self.memory);
            self.carry_out(&mut core, &mut rings);
            match served {
                Served::All => return,
                Served::ToEffects => {}
                Served::ToBatch => break,
            }
        }
        self.go_on_later(queue);
    }

    /// Answers waiters, tells events, sets the alarm, and last logs: nobody waits for that.
    fn carry_out(&self, core: &mut Core, rings: &mut Rings) {
        core.persist();
        while let Some(released) = core.effects.released.pop() {
            rings.release(&released, self.vrings(), &self.memory);
        }
        if let Some(vring) = self.vrings().get(usize::from(EVENT_QUEUE))
            && rings.deliver_events(core, vring, &self.memory) == Served::ToBatch
        {
            self.go_on_later(EVENT_QUEUE);
        }
        core.follow_time();
        core.log_notices();
    }

    fn go_on_later(&self, queue: u16) {
        self.unfinished.fetch_or(1 << queue, Ordering::Relaxed);
        let _ = self.wake.write(1);
    }

    /// Serves a queue whose driver kicked.
    fn kicked(&self, queue: u16) -> io::Result<()> {
        let before = self.rings().taken();
        self.serve(queue);
        if self.rings().taken() != before {
            self.idle_kicks.store(0, Ordering::Relaxed);
        } else if self.idle_kicks.fetch_add(1, Ordering::Relaxed) >= IDLE_KICKS {
            return Err(io::Error::other("Kicks without end that bring nothing"));
        }
        Ok(())
    }

    fn time_passed(&self) {
        let mut core = self.device.core();
        core.alarm.went_off();
        let now = core.now();
        let Core { vm, effects, .. } = &mut *core;
        vm.advance(now, effects);
        self.carry_out(&mut core, &mut self.rings());
    }

    fn woken(&self) -> io::Result<()> {
        // Nothing to read: another wake-up took it along. And this one may take along the one to
        // stop, so that comes after.
        let _ = self.wake.read();
        if self.stopping() {
            return Err(io::Error::other("The connection is over"));
        }
        let unfinished = self.unfinished.swap(0, Ordering::Relaxed);
        for queue in 0..self.device.queues() as u16 {
            if unfinished & (1 << queue) != 0 {
                self.serve(queue);
            }
        }
        Ok(())
    }
}

/// Logs why what the frontend wants is refused: it only learns that it was.
fn refuse<E: Display>(what: &str) -> impl FnOnce(E) -> io::Error {
    move |error| {
        log::error!("{what} failed: {error}");
        io::Error::other(error.to_string())
    }
}

impl VhostUserBackend for Session {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.device.queues()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        VIRTIO_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        PROTOCOL_FEATURES
    }

    fn reset_device(&self) {
        let mut core = self.device.core();
        let from = core.vm.phase();
        let Core { vm, effects, .. } = &mut *core;
        vm.reset(effects);
        core.persist();
        core.follow_time();
        self.rings().clear();
        log::info!("VM {from} -> {} by RESET_DEVICE", Phase::New);
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// The VM in brief, as GET_INFO answers it. An empty answer refuses what lies outside.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut core = self.device.core();
        let now = core.now();
        let info = wire::Info {
            host_count: 0.into(),
            ..core.vm.info(now)
        };
        let end = offset.saturating_add(size) as usize;
        info.as_bytes()
            .get(offset as usize..end)
            .unwrap_or_default()
            .to_vec()
    }

    fn set_config(&self, _offset: u32, _buf: &[u8]) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "The timer device's config space is read-only",
        ))
    }

    /// The rings see new memory by themselves; what they hold is looked up when it is used. A
    /// region that goes on where its file ends is refused: touching it there is SIGBUS.
    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        for region in memory.memory().iter() {
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

    fn queues_per_thread(&self) -> Vec<u64> {
        // A mask of queues for each thread: all of them on one.
        vec![u64::MAX >> (64 - self.device.queues())]
    }

    /// A save takes the VM as it is at this instant; a load takes nothing in before
    /// CHECK_DEVICE_STATE. Either replaces a transfer that is under way.
    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        let transfer = match direction {
            VhostTransferStateDirection::SAVE => {
                let mut core = self.device.core();
                let now = core.now();
                let saved = core
                    .vm
                    .save(now)
                    .map_err(refuse("Saving the device state"))?;
                drop(core);
                log::info!("Saving the device state: {} vCPUs", saved.vcpus.len());
                Transfer::save(file, stream::encode(&saved), &self.stop_transfer)
            }
            VhostTransferStateDirection::LOAD => Transfer::load(file, &self.stop_transfer),
        };
        *self.transfer() = Some(transfer.map_err(refuse("Starting the device state's transfer"))?);
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        let transfer = self.transfer().take();
        let Some(transfer) = transfer else {
            return Err(refuse("Checking the device state")(
                "no transfer was started",
            ));
        };
        if !transfer.loads {
            transfer
                .finish()
                .map_err(refuse("Saving the device state"))?;
            return Ok(());
        }
        let refused = "Loading the device state";
        let bytes = transfer.finish().map_err(refuse(refused))?;
        let saved = stream::decode(&bytes).map_err(refuse(refused))?;
        let mut core = self.device.core();
        let now = core.now();
        let Core { vm, effects, .. } = &mut *core;
        vm.load(now, &saved, effects).map_err(refuse(refused))?;
        log::info!(
            "Loaded the device state: {} vCPUs, {} bytes; each vCPU has its registers to take",
            saved.vcpus.len(),
            bytes.len()
        );
        self.carry_out(&mut core, &mut self.rings());
        Ok(())
    }

    /// GET_VRING_BASE: whoever waits on the queue is told that it stopped, and then nothing of
    /// the ring is touched any more.
    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let (Ok(queue), vrings) = (u16::try_from(queue_index), self.vrings()) else {
            return Ok(());
        };
        let Some(vring) = vrings.get(usize::from(queue)) else {
            return Ok(());
        };
        let mut core = self.device.core();
        let mut rings = self.rings();
        let Core { vm, effects, .. } = &mut *core;
        vm.cancel_queue(queue, effects);
        self.carry_out(&mut core, &mut rings);
        rings.close(vring, queue, &self.memory);
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        _thread_id: usize,
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
            event if event == self.wake_id() => self.woken()?,
            event if event == self.alarm_id() => self.time_passed(),
            queue => self.kicked(queue)?,
        }
        Ok(())
    }
}
