//! A driver that shares no code with the project, for the black-box tests.
//!
//! The control channel is `vhost`'s `Frontend`; the rings are written here, after virtio 1.2
//! §2.7, and can be had in any layout the standard allows and in many that it does not.
//! Nothing waits forever: what does not come within [`PATIENCE`] fails the test, and a
//! [`Rig`] kills a backend that leaves its test hanging.

mod dirty;
mod files;
mod full_ring;
mod hostile;
mod layout;
mod memory;
pub mod message;
mod rig;
mod ring;
mod state;

pub use dirty::{DirtyLog, pages};
pub use files::{blocking_eventfd, fill, full_eventfd, huge_memfd, make_blocking, memfd};
pub use full_ring::FullRing;
pub use hostile::{Control, header, pair, readable};
pub use layout::{Cut, Layout};
pub use memory::{Memory, REGION_GPA, REGION_SIZE, REGION_VA};
pub use rig::{Rig, Usage, release_program, seed};
pub use ring::{Buffer, Descriptor, INDIRECT, NEXT, POISON, Ring, Used, WRITE, descriptor, fd_of};
pub use state::{load, save, start_load, start_save};

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

/// How long a test waits for what must come. Only a failure takes this long.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until something is so that the system has no event for.
///
/// # Panics
///
/// If it is not so within [`PATIENCE`].
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_INDIRECT_DESC.
pub const RING_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_RING_EVENT_IDX.
pub const RING_EVENT_IDX: u64 = 1 << 29;

/// How a driver sets a connection up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// How many queues it starts, the event queue included.
    pub queues: u16,
    /// Descriptors per queue.
    pub size: u16,
    /// Whether it negotiates EVENT_IDX.
    pub event_idx: bool,
    /// Whether it shares its memory by ADD_MEM_REG instead of SET_MEM_TABLE.
    pub add_mem_reg: bool,
    /// What it negotiates besides what every driver does.
    pub features: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            queues: 2,
            size: 128,
            event_idx: true,
            add_mem_reg: false,
            features: 0,
        }
    }
}

impl Setup {
    /// All that it negotiates.
    pub fn features(&self) -> u64 {
        let common = VERSION_1 | RING_INDIRECT | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let event_idx = if self.event_idx { RING_EVENT_IDX } else { 0 };
        common | event_idx | self.features
    }
}

/// A connected driver with its rings started.
pub struct Driver {
    /// The control channel.
    pub control: Frontend,
    /// What is shared with the backend.
    pub memory: Memory,
    /// By queue index.
    pub rings: Vec<Ring>,
    setup: Setup,
    /// Whether rings must be enabled.
    enabling: bool,
}

/// The control channel of a fresh connection, with all the protocol features that the backend
/// offers and every message acknowledged.
///
/// # Panics
///
/// If the backend refuses any of it.
pub fn negotiate(stream: UnixStream, features: u64) -> Frontend {
    let mut control = Frontend::from_stream(stream, 17);
    control.set_owner().expect("SET_OWNER");
    control.get_features().expect("GET_FEATURES");
    let offered = control.get_protocol_features().expect("protocol features");
    control
        .set_protocol_features(offered)
        .expect("SET_PROTOCOL_FEATURES");
    if offered.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        control.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    control.set_features(features).expect("SET_FEATURES");
    control
}

impl Driver {
    /// Connects to the socket at `path` and starts the rings.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    pub fn connect(path: &Path, setup: Setup) -> Self {
        let stream = UnixStream::connect(path).expect("the backend listens");
        Self::over(stream, setup)
    }

    /// Starts the rings over a connected socket.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    pub fn over(stream: UnixStream, setup: Setup) -> Self {
        Self::sharing(stream, setup, Memory::new())
    }

    /// [`over`](Self::over), with this memory.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    pub fn sharing(stream: UnixStream, setup: Setup, memory: Memory) -> Self {
        let control = Self::control_with(stream, setup, &memory);
        Self::starting(control, memory, setup, true)
    }

    fn control_with(stream: UnixStream, setup: Setup, memory: &Memory) -> Frontend {
        let mut control = negotiate(stream, setup.features());
        control.get_queue_num().expect("GET_QUEUE_NUM");
        let region = memory.region();
        if setup.add_mem_reg {
            control.add_mem_region(&region).expect("ADD_MEM_REG");
        } else {
            control.set_mem_table(&[region]).expect("SET_MEM_TABLE");
        }
        control
    }

    /// The same driver, which knows of nothing, at another backend or on another connection. Its
    /// rings are stopped where they were, if that backend lives, and go on, as QEMU has it, after
    /// the last chain that was given back. `prepare` is called before they are started.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    #[must_use]
    pub fn moved_to(self, stream: UnixStream, prepare: impl FnOnce(&mut Frontend)) -> Self {
        let Driver {
            control: former,
            memory,
            rings,
            setup,
            ..
        } = self;
        for queue in 0..setup.queues {
            // Where it is dead there is nothing to stop.
            let _ = former.get_vring_base(queue.into());
        }
        drop(former);
        let mut control = Self::control_with(stream, setup, &memory);
        prepare(&mut control);
        let mut driver = Driver {
            control,
            memory,
            rings,
            setup,
            enabling: true,
        };
        for queue in 0..setup.queues {
            let base = driver.rings[usize::from(queue)].used_index(&driver.memory);
            driver.start_at(queue, base);
        }
        driver
    }

    /// Starts two rings on a control channel on which neither EVENT_IDX nor the protocol
    /// features were negotiated, so that rings need not be enabled, and that has its memory.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    pub fn attached(control: Frontend, memory: Memory) -> Self {
        let setup = Setup {
            event_idx: false,
            ..Setup::default()
        };
        Self::starting(control, memory, setup, false)
    }

    fn starting(control: Frontend, memory: Memory, setup: Setup, enabling: bool) -> Self {
        let rings = (0..setup.queues)
            .map(|queue| Ring::new(queue, setup.size, setup.event_idx))
            .collect();
        let mut driver = Driver {
            control,
            memory,
            rings,
            setup,
            enabling,
        };
        for queue in 0..setup.queues {
            driver.start(queue);
        }
        driver
    }

    /// Starts a ring that was never started or was stopped, as new.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    pub fn start(&mut self, queue: u16) {
        self.rings[usize::from(queue)] = Ring::new(queue, self.setup.size, self.setup.event_idx);
        self.rings[usize::from(queue)].clear(&self.memory);
        self.start_at(queue, 0);
    }

    /// Starts a ring that goes on from where it stopped.
    ///
    /// # Panics
    ///
    /// If anything is refused.
    pub fn start_at(&mut self, queue: u16, base: u16) {
        let ring = &self.rings[usize::from(queue)];
        let index = usize::from(queue);
        let control = &mut self.control;
        control.set_vring_num(index, ring.size()).expect("NUM");
        control
            .set_vring_addr(index, &ring.config())
            .expect("SET_VRING_ADDR");
        control.set_vring_base(index, base).expect("BASE");
        control.set_vring_call(index, ring.call()).expect("CALL");
        control.set_vring_kick(index, ring.kick_fd()).expect("KICK");
        if self.enabling {
            control.set_vring_enable(index, true).expect("ENABLE");
        }
    }

    /// Stops a ring: GET_VRING_BASE. Returns the base.
    ///
    /// # Panics
    ///
    /// If it is refused.
    pub fn stop(&mut self, queue: u16) -> u16 {
        let base = self.control.get_vring_base(queue.into());
        base.expect("GET_VRING_BASE") as u16
    }

    /// Makes a request available on a queue and kicks. Returns its chain's head.
    ///
    /// # Panics
    ///
    /// If the ring or the memory is full.
    pub fn submit(&mut self, queue: u16, request: &[u8], room: usize, layout: &Layout) -> u16 {
        let head = self.add(queue, request, room, layout);
        self.rings[usize::from(queue)].kick(&self.memory);
        head
    }

    /// [`submit`](Self::submit), without the kick.
    ///
    /// # Panics
    ///
    /// If the ring or the memory is full.
    pub fn add(&mut self, queue: u16, request: &[u8], room: usize, layout: &Layout) -> u16 {
        self.rings[usize::from(queue)].add(&mut self.memory, request, room, layout)
    }

    /// The next chain that the device gives back on a queue.
    ///
    /// # Panics
    ///
    /// If none comes within [`PATIENCE`].
    pub fn used(&mut self, queue: u16) -> Used {
        self.rings[usize::from(queue)]
            .wait(&mut self.memory, PATIENCE)
            .unwrap_or_else(|| panic!("nothing was given back on queue {queue}"))
    }

    /// A chain that has been given back on a queue, if one has.
    pub fn used_already(&mut self, queue: u16) -> Option<Used> {
        self.rings[usize::from(queue)].take(&mut self.memory)
    }

    /// Makes one request and returns its chain when it is given back. For queues on which
    /// nothing else is under way.
    ///
    /// # Panics
    ///
    /// If another chain is given back, or none, or where bytes past the used length changed.
    pub fn call(&mut self, queue: u16, request: &[u8], room: usize, layout: &Layout) -> Used {
        let head = self.submit(queue, request, room, layout);
        let used = self.used(queue);
        assert_eq!(used.head, head, "another chain was given back");
        used
    }
}

impl Memory {
    /// The region as the control channel names it.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: REGION_GPA,
            memory_size: REGION_SIZE,
            userspace_addr: REGION_VA,
            mmap_offset: 0,
            mmap_handle: self.file().as_raw_fd(),
        }
    }
}

impl Ring {
    /// The ring as SET_VRING_ADDR names it.
    pub fn config(&self) -> VringConfigData {
        let va = |gpa: u64| gpa - REGION_GPA + REGION_VA;
        VringConfigData {
            queue_max_size: self.size(),
            queue_size: self.size(),
            flags: 0,
            desc_table_addr: va(self.descriptors_at()),
            used_ring_addr: va(self.used_at()),
            avail_ring_addr: va(self.avail_at()),
            log_addr: None,
        }
    }
}
