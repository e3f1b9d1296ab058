//! A backend without a timer: it answers as the test says, over vhost-user and virtio code that is
//! not this project's.

#![allow(dead_code, reason = "each test binary uses its part")]

mod answers;
pub(crate) mod model;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};
use vhost::vhost_user::{Listener, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use vhost_user_timer_frontend::{Connector, Error, Frontend, Options};
use vhost_user_timer_protocol::{Op, wire};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard,
    GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use zerocopy::IntoBytes;

#[allow(unused_imports, reason = "each test binary uses its part")]
pub(crate) use answers::{answer, echo, hold_wait_run, info, ok, remaining, run_of, saved_vcpu};

/// What has to happen happens within this time on any machine.
pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
pub(crate) const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;
/// A request's bytes → the response's, or `None` to hold the request.
type Answers = dyn Fn(&[u8]) -> Option<Vec<u8>> + Send + Sync;

pub(crate) struct Fake {
    pub(crate) request_queues: usize,
    /// Features that are not offered.
    pub(crate) without: u64,
    pub(crate) protocol_without: VhostUserProtocolFeatures,
    pub(crate) config: wire::Info,
    /// The config space instead of `config`, if it changes.
    pub(crate) live_config: Option<Box<dyn Fn() -> wire::Info + Send + Sync>>,
    /// Protocol features that are no longer offered from some time on.
    pub(crate) less: Option<Box<dyn Fn() -> Option<VhostUserProtocolFeatures> + Send + Sync>>,
    pub(crate) answers: Box<Answers>,
    pub(crate) device_state: Box<dyn DeviceState>,
    pub(crate) state: Mutex<State>,
    pub(crate) changed: Condvar,
}

/// What happens to a device state.
pub(crate) trait DeviceState: Send + Sync {
    fn begin(&self, load: bool, file: File) -> io::Result<Option<File>>;
    fn check(&self) -> io::Result<()>;
}

/// Refuses every transfer.
impl DeviceState for () {
    fn begin(&self, _: bool, _: File) -> io::Result<Option<File>> {
        Err(io::Error::other("refused"))
    }

    fn check(&self) -> io::Result<()> {
        Err(io::Error::other("refused"))
    }
}

#[derive(Default)]
pub(crate) struct State {
    memory: Option<Memory>,
    vrings: Vec<VringRwLock>,
    held: Vec<(u16, Vec<u8>, Chain)>,
    pub(crate) stopped: Vec<u32>,
    pub(crate) resets: u32,
}

impl Fake {
    pub(crate) fn new(answers: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        Fake {
            request_queues: 2,
            without: 0,
            protocol_without: VhostUserProtocolFeatures::empty(),
            config: info(),
            live_config: None,
            less: None,
            answers: Box::new(answers),
            device_state: Box::new(()),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Returns once the state is as wanted.
    pub(crate) fn wait_until(&self, mut wanted: impl FnMut(&State) -> bool) {
        let state = self.state.lock().unwrap();
        let (_state, waited) = self
            .changed
            .wait_timeout_while(state, LONG, |state| !wanted(state))
            .unwrap();
        assert!(!waited.timed_out(), "the fake backend got nothing");
    }

    pub(crate) fn wait_for_held(&self, count: usize) {
        self.wait_until(|state| state.held.len() == count);
    }

    /// Writes to the memory that the frontend shares.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let state = self.state.lock().unwrap();
        let memory = state.memory.as_ref().unwrap().memory();
        memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// How many requests are held.
    pub(crate) fn held(&self) -> usize {
        self.state.lock().unwrap().held.len()
    }

    /// Answers the requests that are held, the newest first.
    pub(crate) fn release(&self, answer: impl Fn(&[u8]) -> Vec<u8>) {
        let mut state = self.state.lock().unwrap();
        let held = std::mem::take(&mut state.held);
        for (queue, request, chain) in held.into_iter().rev() {
            let vring = state.vrings[usize::from(queue)].clone();
            state.complete(&vring, chain, &answer(&request));
        }
    }

    /// Answers the requests of one operation that are held.
    pub(crate) fn release_those(&self, op: Op, answer: &[u8]) {
        let mut state = self.state.lock().unwrap();
        let code = op.code().to_le_bytes();
        let held = std::mem::take(&mut state.held);
        let (those, others) = held
            .into_iter()
            .partition::<Vec<_>, _>(|(_, request, _)| request[..2] == code);
        state.held = others;
        for (queue, _, chain) in those {
            let vring = state.vrings[usize::from(queue)].clone();
            state.complete(&vring, chain, answer);
        }
    }

    /// Writes an event to the next buffer; `false` if there is none.
    pub(crate) fn emit(&self, bytes: &[u8]) -> bool {
        self.wait_until(|state| !state.vrings.is_empty());
        let state = self.state.lock().unwrap();
        let vring = state.vrings[0].clone();
        let chain = state.chains(&vring, 1).pop();
        match chain {
            Some(chain) => {
                state.complete(&vring, chain, bytes);
                true
            }
            None => false,
        }
    }
}

impl State {
    fn forget_connection(&mut self) {
        self.held.clear();
        self.vrings.clear();
        self.memory = None;
    }

    fn chains(&self, vring: &VringRwLock, most: usize) -> Vec<Chain> {
        let memory = self.memory.as_ref().unwrap().memory();
        let mut state = vring.get_mut();
        // vhost-user-backend gives a ring a turn when it is enabled; it may be stopped by then.
        if !state.get_queue().ready() {
            return Vec::new();
        }
        let chains = state.get_queue_mut().iter(memory).unwrap();
        chains.take(most).collect()
    }

    fn complete(&self, vring: &VringRwLock, chain: Chain, answer: &[u8]) {
        let memory = self.memory.as_ref().unwrap().memory();
        let head = chain.head_index();
        let mut writer = chain.writer(&*memory).unwrap();
        let room = writer.available_bytes();
        writer.write_all(&answer[..answer.len().min(room)]).unwrap();
        vring.add_used(head, answer.len() as u32).unwrap();
        if vring.needs_notification().unwrap() {
            vring.signal_used_queue().unwrap();
        }
    }
}

impl VhostUserBackend for Fake {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1 + self.request_queues
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        let all = 1 << VIRTIO_F_VERSION_1
            | INDIRECT
            | EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        all & !self.without
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let less = self.less.as_ref().and_then(|less| less());
        let less = less.unwrap_or(VhostUserProtocolFeatures::empty());
        VhostUserProtocolFeatures::all() & !self.protocol_without & !less
    }

    fn reset_device(&self) {
        self.state.lock().unwrap().resets += 1;
        self.changed.notify_all();
    }

    fn set_event_idx(&self, _: bool) {}

    fn get_config(&self, _: u32, _: u32) -> Vec<u8> {
        let config = self.live_config.as_ref().map_or(self.config, |live| live());
        config.as_bytes().to_vec()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.state.lock().unwrap().memory = Some(memory);
        Ok(())
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        let load = direction == VhostTransferStateDirection::LOAD;
        self.device_state.begin(load, file)
    }

    fn check_device_state(&self) -> io::Result<()> {
        self.device_state.check()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        self.state.lock().unwrap().stopped.push(queue);
        self.changed.notify_all();
        Ok(())
    }

    fn handle_event(
        &self,
        queue: u16,
        _: EventSet,
        vrings: &[VringRwLock],
        _: usize,
    ) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.vrings = vrings.to_vec();
        self.changed.notify_all();
        if queue == 0 {
            return Ok(());
        }
        let vring = &vrings[usize::from(queue)];
        loop {
            vring.disable_notification().unwrap();
            for chain in state.chains(vring, usize::MAX) {
                let memory = state.memory.as_ref().unwrap().memory();
                let mut request = Vec::new();
                let mut reader = chain.clone().reader(&*memory).unwrap();
                reader.read_to_end(&mut request).unwrap();
                match (self.answers)(&request) {
                    Some(answer) => state.complete(vring, chain, &answer),
                    None => state.held.push((queue, request, chain)),
                }
            }
            if !vring.enable_notification().unwrap() {
                break;
            }
        }
        self.changed.notify_all();
        Ok(())
    }
}

/// Ends waits without a deadline when a test fails while others wait.
pub(crate) struct EndOfWaits(pub(crate) vhost_user_timer_frontend::ShutdownHandle);

impl Drop for EndOfWaits {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

/// As [`Frontend::connect`], with [`LONG`] for the handshake and each control message, unless the
/// test names a time-out. The library's own is for a VMM, and a busy machine may need longer.
pub(crate) fn connect(to: impl Into<Connector>, mut options: Options) -> Result<Frontend, Error> {
    if options.timeout == Options::default().timeout {
        options.timeout = LONG;
    }
    Frontend::connect(to, options)
}

/// A path that no other test uses.
pub(crate) fn socket_path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("timer-frontend-{}-{n}", std::process::id()));
    // An earlier process that had this id may have left it.
    let _ = std::fs::remove_file(&path);
    path
}

/// Serves one connection. When the thread ends, what was held on it is forgotten: a backend that is
/// gone answers nobody.
pub(crate) fn serve(fake: Arc<Fake>, path: &Path) -> (JoinHandle<()>, Receiver<ShutdownHandle>) {
    let mut listener = Listener::new(path, true).unwrap();
    let (send, receive) = channel();
    let thread = std::thread::spawn(move || {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("fake".into(), fake.clone(), memory).unwrap();
        daemon.start(&mut listener).unwrap();
        let _ = send.send(daemon.shutdown_handle().unwrap());
        let _ = daemon.wait();
        // Joins the thread of the rings.
        drop(daemon);
        fake.state.lock().unwrap().forget_connection();
    });
    (thread, receive)
}

/// A fake and a frontend connected to it.
pub(crate) struct Pair {
    pub(crate) fake: Arc<Fake>,
    pub(crate) frontend: Frontend,
    pub(crate) backend: ShutdownHandle,
}

pub(crate) fn pair(fake: Fake, options: Options) -> Pair {
    try_pair(fake, options).expect("the handshake takes too long")
}

/// As [`pair`]; `None` if the handshake takes longer than the options' time-out.
pub(crate) fn try_pair(fake: Fake, options: Options) -> Option<Pair> {
    let fake = Arc::new(fake);
    let path = socket_path();
    let (_, backend) = serve(fake.clone(), &path);
    let frontend = unless_late(connect(&path, options));
    let _ = std::fs::remove_file(&path);
    Some(Pair {
        fake,
        frontend: frontend?,
        backend: backend.recv().unwrap(),
    })
}

/// `None` for a handshake that takes longer than its time-out.
pub(crate) fn unless_late(connected: Result<Frontend, Error>) -> Option<Frontend> {
    match connected {
        Err(Error::TimedOut { .. }) => None,
        connected => Some(connected.unwrap()),
    }
}
