//! One frontend's connection to a device: the only implementation of `VhostUserBackend`.
//!
//! `vhost-user-backend` calls a [`Session`] on two threads: on the connection's request thread for
//! control messages, and on its worker for everything that becomes readable (see `worker`). Calls
//! go down only: to the device, with a [`Turn`] over the rings.
//!
//! Locks, in the order in which they are taken: the rings' buffers and the chains in flight
//! ([`Session::turn`]), the device's own, a ring's (`VringMutex`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::logging::Peer;
use crate::sys::{Turnstile, lock};
use crate::vhost_user::door::{Bell, Guarded, Refusal};
use crate::vhost_user::interrupt::Threads;
use crate::vhost_user::transfer::Transfers;
use crate::vhost_user::trap::{Trap, Watched};
use crate::vhost_user::vring::{Place, RingOwner};
use crate::vhost_user::worker::Worker;
use crate::vhost_user::{Device, DirtyBitmap, Turn, Vring};
use crate::virtio::Memory;
use crate::virtio::chain::ChainBuffer;
use crate::virtio::ring::RingScratch;

/// What every device offers.
const FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// See the module.
pub(super) struct Session<D: Device> {
    peer: Peer,
    pub(super) device: Arc<D>,
    /// What the frontend shares, once it is watched. The crate has its own, in which memory appears
    /// before this session hears of it.
    memory: Memory<D::Bitmap>,
    pub(super) trap: Arc<Trap>,
    /// Watches `memory`.
    watched: Mutex<Option<Watched>>,
    pub(super) worker: Worker<D::Bitmap>,
    rings: Mutex<Rings<D::InFlight>>,
    transfers: Transfers,
    /// Lets the request thread go before the worker.
    pub(super) turnstile: Arc<Turnstile>,
    /// Those that a descriptor of the peer could keep waiting.
    pub(super) threads: Threads,
    /// Rings are enabled without being held back from now on.
    hold_canceled: AtomicBool,
}

/// What is under way on the connection's rings, and buffers that are reused.
struct Rings<F> {
    chain: ChainBuffer,
    scratch: RingScratch,
    in_flight: F,
}

impl<D: Device> Session<D> {
    /// This frontend's session. Before it sleeps, the worker polls its rings for `poll_max` at
    /// most.
    pub(super) fn new(device: Arc<D>, peer: Peer, poll_max: Duration) -> io::Result<Self> {
        let worker = Worker::new(device.queues(), poll_max)?;
        let trap = Trap::new(worker.end.bell().try_clone()?)?;
        let chain = ChainBuffer::new(D::MAX_QUEUE_SIZE, D::CHAIN_LIMITS);
        Ok(Session {
            peer,
            worker,
            device,
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            rings: Mutex::new(Rings {
                chain: chain.of_memory(trap.lost()),
                scratch: RingScratch::new(D::MAX_QUEUE_SIZE),
                in_flight: D::InFlight::default(),
            }),
            transfers: Transfers::new(peer)?,
            threads: Threads::new()?,
            turnstile: Arc::default(),
            hold_canceled: AtomicBool::new(false),
            trap,
            watched: Mutex::new(None),
        })
    }

    /// Registers the device's alarm and the session's wake-up with the worker, waits until the
    /// worker has handed over its rings, and gives them their places.
    pub(super) fn attach(
        self: &Arc<Self>,
        worker: &VringEpollHandler<Arc<Self>>,
    ) -> io::Result<()> {
        self.worker.attach(worker, self.device.alarm_fd())?;
        let owner: Arc<dyn RingOwner> = Arc::clone(self) as _;
        for (queue, vring) in (0..).zip(self.worker.vrings()) {
            vring.attach(Place {
                queue,
                epoll: worker.as_raw_fd(),
                owner: Arc::downgrade(&owner),
                turnstile: Arc::clone(&self.turnstile),
            });
        }
        Ok(())
    }

    /// Counts the calling thread among the connection's, once: its log lines are the peer's, and it
    /// is interrupted at the end.
    pub(super) fn enter(&self) {
        self.peer.owns_thread();
        self.threads.register();
    }

    /// Ends the worker, and every wait of the connection's threads.
    pub(super) fn stop(&self) {
        self.release_held();
        self.transfers.cancel();
        self.worker.stop();
    }

    /// Calls the device with the connection's rings, on the worker: a batch that begins.
    pub(super) fn turn<T>(&self, call: impl FnOnce(&D, &mut Turn<'_, D>) -> T) -> T {
        self.go_on(|device, turn| {
            turn.scratch.begin_batch();
            call(device, turn)
        })
    }

    /// The same, for a batch that goes on. Between two calls, control messages get their turn.
    pub(super) fn go_on<T>(&self, call: impl FnOnce(&D, &mut Turn<'_, D>) -> T) -> T {
        self.turnstile.let_others_go_first();
        self.with_rings(call)
    }

    /// The same, on the request thread, for which the worker makes way.
    fn control_turn<T>(&self, call: impl FnOnce(&D, &mut Turn<'_, D>) -> T) -> T {
        let first = self.turnstile.enter();
        self.with_rings(|device, turn| {
            drop(first);
            turn.scratch.begin_batch();
            call(device, turn)
        })
    }

    /// Calls the device on the request thread, for which the worker makes way.
    fn control<T>(&self, call: impl FnOnce(&D) -> T) -> T {
        let _first = self.turnstile.enter();
        call(&self.device)
    }

    fn with_rings<T>(&self, call: impl FnOnce(&D, &mut Turn<'_, D>) -> T) -> T {
        let mut rings = lock(&self.rings);
        let Rings {
            chain,
            scratch,
            in_flight,
        } = &mut *rings;
        let mut turn = Turn {
            memory: &self.memory,
            vrings: self.worker.vrings(),
            chain,
            scratch,
            in_flight,
            unfinished: 0,
        };
        let result = call(&self.device, &mut turn);
        let unfinished = turn.unfinished;
        let due = turn.scratch.take_notifications();
        for vring in self.worker.vrings_of(due) {
            vring.notification_is_due();
        }
        drop(rings);
        if unfinished != 0 {
            self.worker.serve_later(unfinished);
        }
        self.notify(due);
        result
    }

    /// Writes what is due to the call descriptors of these queues, given as bits. Called without
    /// any lock: a frontend can see to it that this blocks until the connection ends.
    fn notify(&self, queues: u32) {
        for vring in self.worker.vrings_of(queues) {
            while vring.notify().is_err() && !self.worker.stopping() {}
        }
    }

    /// How many chains were ever taken from the rings.
    pub(super) fn chains_taken(&self) -> u64 {
        lock(&self.rings).chain.count()
    }

    pub(super) fn memory(&self) -> &Memory<D::Bitmap> {
        &self.memory
    }

    /// Uses this memory from now on. On return nothing uses the memory before, which is unmapped
    /// only now: it was watched until then.
    fn use_memory(&self, memory: GuestMemoryMmap<D::Bitmap>) -> io::Result<()> {
        let watched = self.trap.watch_regions(&memory)?;
        D::Bitmap::keep_logging(&memory, &self.trap);
        let former = GuestMemoryMmap::clone(&self.memory.memory());
        self.memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(memory);
        self.interrupt_polling();
        self.control_turn(|device, turn| device.memory_changed(turn.memory));
        let watched = lock(&self.watched).replace(watched);
        drop(watched);
        drop(former);
        Ok(())
    }
}

impl<D: Device> RingOwner for Session<D> {
    fn before_enabling(&self) {
        self.device.before_enabling(&self.hold_canceled);
    }

    fn kick_replaced(&self, queue: u16) {
        self.worker.serve_later(1 << queue);
    }
}

impl<D: Device> Guarded for Session<D> {
    fn bell(&self) -> &Bell {
        self.worker.end.bell()
    }

    fn fault(&self) -> Option<Refusal> {
        if let Some(sprung) = self.trap.sprung() {
            return Some(Refusal(sprung.to_string()));
        }
        self.worker.end.is_there().then(|| {
            Refusal("one of its kick descriptors cannot be read, or is always readable".to_owned())
        })
    }

    fn release_held(&self) {
        self.hold_canceled.store(true, Ordering::Release);
        self.device.wake_held();
    }
}

impl<D: Device> VhostUserBackend for Session<D> {
    type Bitmap = D::Bitmap;
    type Vring = Vring<D::Bitmap>;

    fn num_queues(&self) -> usize {
        self.device.queues().into()
    }

    fn max_queue_size(&self) -> usize {
        D::MAX_QUEUE_SIZE.into()
    }

    /// Asked by the request thread, in any frontend's first messages.
    fn features(&self) -> u64 {
        self.enter();
        FEATURES | D::FEATURES | D::Bitmap::FEATURES
    }

    fn acked_features(&self, features: u64) {
        self.enter();
        self.control(|device| device.set_features(features));
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let config = if D::HAS_CONFIG {
            VhostUserProtocolFeatures::CONFIG
        } else {
            VhostUserProtocolFeatures::empty()
        };
        PROTOCOL_FEATURES | config | D::Bitmap::PROTOCOL_FEATURES
    }

    fn reset_device(&self) {
        self.enter();
        self.control_turn(|device, turn| device.reset(turn));
    }

    /// The rings know by themselves.
    fn set_event_idx(&self, _enabled: bool) {}

    /// An empty answer refuses what lies outside of the configuration space.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let end = offset.saturating_add(size) as usize;
        let config = self.control(D::config);
        let part = config.get(offset as usize..end);
        part.unwrap_or_default().to_vec()
    }

    fn set_config(&self, _offset: u32, _buf: &[u8]) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("The {} device's configuration space is read-only", D::NAME),
        ))
    }

    /// The door has checked the memory. What is refused here is never used, though the crate has
    /// it.
    fn update_memory(&self, installed: Memory<D::Bitmap>) -> io::Result<()> {
        self.enter();
        self.use_memory(GuestMemoryMmap::clone(&installed.memory()))
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.worker.exit_event()
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        self.worker.queues_per_thread()
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        self.enter();
        self.transfers
            .start(direction, file, || self.control(D::save))?;
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        self.enter();
        self.transfers
            .finish(|stream| self.control_turn(|device, turn| device.load(turn, stream)))
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        self.enter();
        if let Ok(queue) = u16::try_from(queue_index) {
            self.interrupt_polling();
            self.control_turn(|device, turn| device.stop_queue(turn, queue));
            // Of the worker's last turn too: after the answer the ring is silent.
            self.notify(1 << queue);
        }
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring<D::Bitmap>],
        _thread: usize,
    ) -> io::Result<()> {
        self.handle_worker_event(event, vrings)
    }
}
