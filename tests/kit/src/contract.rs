//! The wire contract, typed by hand, and a client that speaks it.
//!
//! Codes, layouts and parsing are [`vhost_user_timer_reference::contract`], which uses nothing of
//! the protocol crate, so a slip in the project's own types shows. [`Client`] sends requests and
//! parses answers over the raw driver; it judges only what holds for every request.

use std::os::unix::net::UnixStream;

pub use vhost_user_timer_reference::contract::*;

use crate::raw_driver::{Driver, Layout, Rig, Setup, Used};

/// Queues that take requests and give answers back: a driver's, or a model's in this process.
pub trait Queues {
    /// Makes a request available on a queue. Returns its chain's head.
    fn submit(&mut self, queue: u16, request: &[u8], room: usize, layout: &Layout) -> u16;

    /// Waits for the next chain that is given back on a queue.
    fn used(&mut self, queue: u16) -> Used;

    /// A chain that was given back on a queue already, if there is one.
    fn used_already(&mut self, queue: u16) -> Option<Used>;
}

impl Queues for Driver {
    fn submit(&mut self, queue: u16, request: &[u8], room: usize, layout: &Layout) -> u16 {
        Driver::submit(self, queue, request, room, layout)
    }

    fn used(&mut self, queue: u16) -> Used {
        Driver::used(self, queue)
    }

    fn used_already(&mut self, queue: u16) -> Option<Used> {
        Driver::used_already(self, queue)
    }
}

/// A connection to be made: `rig.client().queue_size(1024).connect()`.
#[must_use]
pub struct NewClient<'a> {
    rig: &'a Rig,
    setup: Setup,
}

impl Rig {
    /// A client's connection to be made, by default as in [`Setup::default`].
    pub fn client(&self) -> NewClient<'_> {
        NewClient {
            rig: self,
            setup: Setup::default(),
        }
    }
}

impl NewClient<'_> {
    /// With this many queues, the event queue included.
    pub fn queues(mut self, queues: u16) -> Self {
        self.setup.queues = queues;
        self
    }

    /// With this many descriptors a queue.
    pub fn queue_size(mut self, size: u16) -> Self {
        self.setup.size = size;
        self
    }

    /// Whether EVENT_IDX is negotiated.
    pub fn event_idx(mut self, negotiated: bool) -> Self {
        self.setup.event_idx = negotiated;
        self
    }

    /// Whether the memory is shared by ADD_MEM_REG instead of SET_MEM_TABLE.
    pub fn add_mem_reg(mut self, used: bool) -> Self {
        self.setup.add_mem_reg = used;
        self
    }

    /// With these features besides those that every driver negotiates.
    pub fn features(mut self, features: u64) -> Self {
        self.setup.features = features;
        self
    }

    /// Connects.
    pub fn connect(self) -> Client {
        Client::new(self.driver())
    }

    /// Connects, without a client over the driver.
    pub fn driver(self) -> Driver {
        self.rig.connect_with(self.setup)
    }
}

/// Sends requests and parses answers.
pub struct Client<D = Driver> {
    /// The queues underneath.
    pub driver: D,
    /// The request queue that [`ask`](Self::ask) uses.
    pub queue: u16,
    /// How requests are laid out.
    pub layout: Layout,
}

#[allow(
    clippy::missing_panics_doc,
    reason = "each panics where the backend does not do as it should: that is how a test fails"
)]
impl Client {
    /// On a new connection.
    pub fn connect(rig: &Rig) -> Self {
        Self::new(rig.connect())
    }

    /// Over a connected socket.
    pub fn over(stream: UnixStream) -> Self {
        Self::new(Driver::over(stream, Setup::default()))
    }

    /// RESET_DEVICE, and the end of the connection.
    ///
    /// # Panics
    ///
    /// If it is refused.
    pub fn reset_and_leave(mut self) {
        use vhost::vhost_user::VhostUserFrontend;
        self.driver.control.reset_device().expect("RESET_DEVICE");
    }
}

#[allow(
    clippy::missing_panics_doc,
    reason = "each panics where the backend does not do as it should: that is how a test fails"
)]
impl<D: Queues> Client<D> {
    /// Over queues that are started.
    pub fn new(driver: D) -> Self {
        Client {
            driver,
            queue: 1,
            layout: Layout::plain(),
        }
    }

    /// Sends these bytes as a request and takes the answer.
    pub fn raw(&mut self, request: &[u8], room: usize) -> Answer {
        let layout = self.layout.clone();
        let head = self.driver.submit(self.queue, request, room, &layout);
        self.released(self.queue, head)
    }

    /// Sends a request with room for any answer, and takes the answer.
    pub fn ask(&mut self, op: u16, vcpu: u32, epoch: u64, body: &[u8]) -> Answer {
        self.raw(&request(op, vcpu, epoch, body), 8192)
    }

    /// A VM-wide request of the current epoch.
    pub fn vm(&mut self, op: u16, body: &[u8]) -> Answer {
        self.ask(op, VM, 0, body)
    }

    /// A request about one vCPU in the current epoch.
    pub fn vcpu(&mut self, op: u16, vcpu: u32, body: &[u8]) -> Answer {
        self.ask(op, vcpu, 0, body)
    }

    /// GET_INFO.
    #[track_caller]
    pub fn info(&mut self) -> Info {
        Info::of(self.vm(op::GET_INFO, &[]).ok(64))
    }

    /// CONFIGURE_VM for arm64 at the backend's frequency.
    #[track_caller]
    pub fn configure(&mut self, vcpus: u32) {
        self.vm(op::CONFIGURE_VM, &configure_body(vcpus, 0, 0))
            .ok(0);
    }

    /// GET_VM of all.
    #[track_caller]
    pub fn state(&mut self) -> VmState {
        let vcpus = self.info().vcpus;
        let request = request(op::GET_VM, VM, 0, &range_body(0, vcpus));
        let len = 40 + 56 * vcpus as usize;
        VmState::of(self.raw(&request, 16 + len).ok(len))
    }

    /// PAUSE.
    #[track_caller]
    pub fn pause(&mut self) -> Run {
        Run::of(self.vm(op::PAUSE, &pause_body(0)).ok(40))
    }

    /// RESUME.
    #[track_caller]
    pub fn resume(&mut self) -> Run {
        Run::of(self.vm(op::RESUME, &[]).ok(40))
    }

    /// GET_REGS of one vCPU.
    #[track_caller]
    pub fn get(&mut self, vcpu: u32, ids: &[u64]) -> Vec<u64> {
        let answer = self.vcpu(op::GET_REGS, vcpu, &words(ids));
        let entries: Vec<_> = answer
            .ok(16 * ids.len())
            .chunks(16)
            .map(|entry| (u64_at(entry, 0), u64_at(entry, 8)))
            .collect();
        let named: Vec<u64> = entries.iter().map(|(id, _)| *id).collect();
        assert_eq!(named, ids, "entries come as they were asked for");
        entries.into_iter().map(|(_, value)| value).collect()
    }

    /// One register.
    #[track_caller]
    pub fn get_one(&mut self, vcpu: u32, id: u64) -> u64 {
        self.get(vcpu, &[id])[0]
    }

    /// SET_REGS of one vCPU. Returns (lines, ignored).
    #[track_caller]
    pub fn set(&mut self, vcpu: u32, entries: &[(u64, u64)]) -> (u32, u32) {
        let answer = self.vcpu(op::SET_REGS, vcpu, &regs_body(entries));
        let body = answer.ok(8);
        (u32_at(body, 0), u32_at(body, 4))
    }

    /// A request with DONE, in the current epoch.
    pub fn ask_done(&mut self, op: u16, vcpu: u32, body: &[u8]) -> Answer {
        self.raw(&request_with(op, DONE, vcpu, 0, body), 8192)
    }

    /// SET_REGS with DONE. Returns (lines, ignored, remaining).
    #[track_caller]
    pub fn set_done(&mut self, vcpu: u32, entries: &[(u64, u64)]) -> (u32, u32, u32) {
        let answer = self.ask_done(op::SET_REGS, vcpu, &regs_body(entries));
        let body = answer.ok(12);
        (u32_at(body, 0), u32_at(body, 4), u32_at(body, 8))
    }

    /// SET_REGS that is refused.
    #[track_caller]
    pub fn set_refused(&mut self, vcpu: u32, entries: &[(u64, u64)]) -> (u32, u32) {
        let answer = self.vcpu(op::SET_REGS, vcpu, &regs_body(entries));
        answer.outcome()
    }

    /// RESTORE_BEGIN without a time-out. Returns the new epoch.
    #[track_caller]
    pub fn restore_begin(&mut self, vcpus: u32, flags: u32) -> u64 {
        let answer = self.vm(op::RESTORE_BEGIN, &restore_body(vcpus, flags, 0, 0));
        answer.ok(0);
        answer.epoch
    }

    /// RESTORE_DONE. Returns how many remain.
    #[track_caller]
    pub fn restore_done(&mut self, vcpu: u32) -> u32 {
        let answer = self.vcpu(op::RESTORE_DONE, vcpu, &[]);
        let body = answer.ok(8);
        assert_eq!(u32_at(body, 4), 0, "the reserved half");
        u32_at(body, 0)
    }

    /// Sets the registers that a vCPU needs for RESTORE_DONE.
    #[track_caller]
    pub fn bring(&mut self, vcpu: u32, count: u64) {
        self.set(vcpu, &[(CTL, 0), (CNT, count), (CVAL, u64::MAX)]);
    }

    /// [`bring`](Self::bring) on this queue.
    #[track_caller]
    pub fn bring_on(&mut self, queue: u16, vcpu: u32, count: u64) {
        let queue = std::mem::replace(&mut self.queue, queue);
        self.bring(vcpu, count);
        self.queue = queue;
    }

    /// Sends a WAIT_RUN that will be held. Returns its head.
    pub fn wait_run(&mut self, queue: u16, vcpu: u32) -> u16 {
        let request = request(op::WAIT_RUN, vcpu, 0, &[]);
        let layout = self.layout.clone();
        self.driver.submit(queue, &request, 56, &layout)
    }

    /// The answer of a held request: the next one that its queue gives back.
    #[track_caller]
    pub fn released(&mut self, queue: u16, head: u16) -> Answer {
        let used = self.driver.used(queue);
        assert_eq!(used.head, head, "another chain was given back");
        Answer::of(&used)
    }

    /// The answers of held requests on one queue, in any order.
    #[track_caller]
    pub fn all_released(&mut self, queue: u16, heads: &[u16]) -> Vec<Answer> {
        let mut answers = std::collections::BTreeMap::new();
        for _ in heads {
            let used = self.driver.used(queue);
            assert!(heads.contains(&used.head));
            answers.insert(used.head, Answer::of(&used));
        }
        heads.iter().map(|head| answers[head].clone()).collect()
    }

    /// Posts a buffer for an event.
    pub fn post_event_buffer(&mut self) -> u16 {
        self.driver.submit(0, &[], 32, &Layout::plain())
    }

    /// The next event.
    #[track_caller]
    pub fn event(&mut self) -> Event {
        Event::of(&self.driver.used(0))
    }

    /// Returns once the backend has served everything that was made available before the call. Both
    /// answers can come from one turn of the worker, before it writes the events that are due.
    #[track_caller]
    pub fn settle(&mut self) {
        self.info();
        self.info();
    }

    /// [`settle`](Self::settle) on this queue: everything made available there before has been
    /// served.
    #[track_caller]
    pub fn settle_on(&mut self, queue: u16) {
        let queue = std::mem::replace(&mut self.queue, queue);
        self.settle();
        self.queue = queue;
    }
}
