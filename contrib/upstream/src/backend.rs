//! The least that `vhost-user-backend` asks of a backend, and a frontend connected to it. Nothing
//! of vhost-user-timer is used.

use std::fs::{self, File};
use std::io::{self, Error};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, Listener, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::EventFd;

/// Log of writes for a migration, as the crate has it.
pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;
pub(crate) type Vring = VringMutex<Memory>;
pub(crate) type Daemon = VhostUserDaemon<Arc<Device>>;

/// What has to happen happens within this time on any machine. Only a fault that is gone takes this
/// long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a region.
pub(crate) const REGION: u64 = 0x1_0000;
const QUEUES: usize = 2;
const MAX_QUEUE_SIZE: usize = 256;
/// A listener of the device's own, by which it gets at its rings.
const LISTENER: u64 = QUEUES as u64 + 1;

/// What a reproduction asks of the device.
#[derive(Default)]
pub(crate) struct Device {
    /// Have workers without an exit event, as the trait's default has it.
    pub(crate) no_exit_event: bool,
    /// Have two workers, and run out of descriptors before the second is there.
    pub(crate) fails_half_way: bool,
    /// Refuse the next memory.
    pub(crate) refuses_memory: AtomicBool,
    /// Panic in `get_config`.
    pub(crate) panics: bool,
    /// How often `handle_event` was called for a queue.
    pub(crate) events: AtomicU64,
    /// The rings, once they are known.
    pub(crate) vrings: Mutex<Vec<Vring>>,
}

impl VhostUserBackend for Device {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        // VIRTIO_F_VERSION_1 and VHOST_F_LOG_ALL.
        (1 << 32) | (1 << 26) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        if self.refuses_memory.load(Ordering::Relaxed) {
            return Err(Error::other("the device does not want this memory"));
        }
        Ok(())
    }

    fn get_config(&self, _offset: u32, size: u32) -> Vec<u8> {
        assert!(!self.panics, "a fault of the device's own");
        vec![0; size as usize]
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        if self.fails_half_way {
            vec![0b01, 0b10]
        } else {
            vec![0b11]
        }
    }

    fn exit_event(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        let event = (!self.no_exit_event).then(|| {
            new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK)
                .expect("an eventfd")
        });
        if self.fails_half_way && thread == 1 {
            no_more_descriptors();
        }
        event
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        if usize::from(event) < QUEUES {
            self.events.fetch_add(1, Ordering::Relaxed);
        } else {
            let mut known = self.vrings.lock().expect("no panic while it is held");
            *known = vrings.to_vec();
        }
        Ok(())
    }
}

/// From here on no descriptor can be made.
fn no_more_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let none = Rlimit {
        current: Some(0),
        maximum,
    };
    setrlimit(Resource::Nofile, none).expect("RLIMIT_NOFILE can be lowered");
}

/// A backend that serves one frontend, and the frontend.
pub(crate) struct Served {
    pub(crate) device: Arc<Device>,
    pub(crate) memory: Memory,
    pub(crate) daemon: Daemon,
    pub(crate) frontend: Frontend,
    /// The frontend's end of the control channel.
    pub(crate) stream: UnixStream,
}

/// A daemon without a connection.
pub(crate) fn daemon(device: &Arc<Device>) -> (Memory, Result<Daemon, String>) {
    let memory = Memory::new(GuestMemoryMmap::new());
    let daemon = VhostUserDaemon::new("requests".into(), Arc::clone(device), memory.clone());
    (memory, daemon.map_err(|error| error.to_string()))
}

/// A path for a socket of this process.
fn socket_path() -> PathBuf {
    std::env::temp_dir().join(format!("upstream-{}.sock", process::id()))
}

impl Served {
    /// A connection with everything negotiated and every message acknowledged.
    pub(crate) fn new(device: Device) -> Self {
        let device = Arc::new(device);
        let (memory, daemon) = daemon(&device);
        let mut daemon = daemon.expect("a daemon");
        let path = socket_path();
        let listener = UnixListener::bind(&path).expect("a listener");
        let stream = UnixStream::connect(&path).expect("a connection");
        fs::remove_file(&path).expect("the socket's path");
        daemon
            .start(&mut Listener::from(listener))
            .expect("the connection is accepted");
        let own = stream.try_clone().expect("a duplicate");
        let mut frontend = Frontend::from_stream(stream, QUEUES as u64);
        frontend.set_owner().expect("SET_OWNER");
        let features = frontend.get_features().expect("GET_FEATURES");
        let protocol = frontend.get_protocol_features().expect("GET_PROTOCOL");
        frontend
            .set_protocol_features(protocol)
            .expect("SET_PROTOCOL_FEATURES");
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features).expect("SET_FEATURES");
        Served {
            device,
            memory,
            daemon,
            frontend,
            stream: own,
        }
    }

    /// The rings, as the device sees them.
    pub(crate) fn vrings(&self) -> Vec<Vring> {
        let event = EventFd::new(0).expect("an eventfd");
        let [worker] = &self.daemon.get_epoll_handlers()[..] else {
            panic!("one worker");
        };
        let vrings = || self.device.vrings.lock().expect("no panic").clone();
        worker
            .register_listener(event.as_raw_fd(), EventSet::IN, LISTENER)
            .expect("a listener");
        event.write(1).expect("an event");
        assert!(comes_true(|| !vrings().is_empty()), "the worker lives");
        worker
            .unregister_listener(event.as_raw_fd(), EventSet::IN, LISTENER)
            .expect("it was registered");
        vrings()
    }

    /// Starts and enables a ring in the region at guest-physical address 0.
    pub(crate) fn start_ring(&mut self, queue: usize, kick: &EventFd) {
        let base = 0x4000 * queue as u64;
        let addresses = VringConfigData {
            queue_max_size: 16,
            queue_size: 16,
            flags: 0,
            desc_table_addr: base,
            used_ring_addr: base + 0x1000,
            avail_ring_addr: base + 0x2000,
            log_addr: None,
        };
        self.frontend.set_vring_num(queue, 16).expect("NUM");
        self.frontend
            .set_vring_addr(queue, &addresses)
            .expect("ADDR");
        self.frontend.set_vring_base(queue, 0).expect("BASE");
        self.frontend.set_vring_kick(queue, kick).expect("KICK");
        self.frontend.set_vring_enable(queue, true).expect("ENABLE");
    }
}

/// A file of this length in memory.
pub(crate) fn file(len: u64) -> File {
    let file = File::from(memfd_create("region", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(len).expect("its length");
    file
}

/// A region of `REGION` bytes at this guest-physical address, whose user address is the same.
pub(crate) fn region(file: &File, address: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: address,
        memory_size: REGION,
        userspace_addr: address,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

/// Whether something comes true within [`PATIENCE`].
pub(crate) fn comes_true(is_true: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !is_true() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// How many threads of this process have this name.
pub(crate) fn threads(name: &str) -> usize {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc");
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|comm| comm.trim_end() == name).count()
}

/// The worker's name.
pub(crate) const WORKER: &str = "vring_worker";
