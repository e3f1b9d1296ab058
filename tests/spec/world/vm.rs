//! What scenarios say most often.

use std::ops::{Deref, DerefMut};

use vhost_user_timer_kit::contract::{
    self, ARM64, Answer, CNT, CTL, CVAL, Client, Event, Info, PCNT, PCTL, PCVAL, Queues, Run,
    TIMER_ASSERTED, VM, Vcpu, op, pause_body, phase, range_body, restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::{Layout, Used};

use super::{Binary, Device, Model, Seen, Snapshot};

/// Every phase.
pub(crate) const PHASES: [u32; 5] = [
    phase::NEW,
    phase::PAUSED,
    phase::RUNNING,
    phase::RESTORING,
    phase::ARMED,
];

/// One of the VM's clocks, and each vCPU's timer on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    Virtual,
    Physical,
}

impl Clock {
    pub(crate) const BOTH: [Clock; 2] = [Clock::Virtual, Clock::Physical];

    /// Its control, count and compare value.
    pub(crate) fn registers(self) -> [u64; 3] {
        match self {
            Clock::Virtual => [CTL, CNT, CVAL],
            Clock::Physical => [PCTL, PCNT, PCVAL],
        }
    }

    /// Its bit in SET_REGS's `lines`.
    pub(crate) fn line(self) -> u32 {
        1 << self.code()
    }

    /// Its number in an event.
    pub(crate) fn code(self) -> u16 {
        match self {
            Clock::Virtual => 0,
            Clock::Physical => 1,
        }
    }

    pub(crate) fn offset(self, info: &Info) -> u64 {
        match self {
            Clock::Virtual => info.cntvoff,
            Clock::Physical => info.cntpoff,
        }
    }
}

/// A VM, by the contract's own client, over the model or the backend.
pub(crate) struct Vm(Client<Box<dyn Device>>);

impl Queues for Box<dyn Device> {
    fn submit(&mut self, queue: u16, request: &[u8], room: usize, layout: &Layout) -> u16 {
        self.as_mut().submit(queue, request, room, layout)
    }

    fn used(&mut self, queue: u16) -> Used {
        self.as_mut().used(queue)
    }

    fn used_already(&mut self, queue: u16) -> Option<Used> {
        self.as_mut().used_already(queue)
    }
}

impl Deref for Vm {
    type Target = Client<Box<dyn Device>>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Vm {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// A WAIT_RUN that waits: its queue and its chain.
pub(crate) type Waiter = (u16, u16);

impl Vm {
    pub(super) fn new(client: Client<Box<dyn Device>>) -> Self {
        Vm(client)
    }

    pub(crate) fn model(&mut self) -> Option<&mut Model> {
        self.driver.model()
    }

    pub(crate) fn binary(&mut self) -> Option<&mut Binary> {
        self.driver.binary()
    }

    /// The model, in a scenario that runs on nothing else.
    pub(crate) fn exact(&mut self) -> &mut Model {
        self.model().expect("a scenario of the model")
    }

    /// Another VM, the same in all; of the model only.
    pub(crate) fn twin(&mut self) -> Vm {
        let twin: Box<dyn Device> = Box::new(self.exact().clone());
        Vm(Client::new(twin))
    }

    /// Lets time pass.
    pub(crate) fn pass(&mut self, ticks: u64) {
        self.driver.pass(ticks);
    }

    /// Lets time pass until this is so.
    pub(crate) fn until(&mut self, mut so: impl FnMut(&mut Self) -> bool) {
        while !so(self) {
            self.pass(super::MS / 10);
        }
    }

    /// All that there is to see of it from here.
    pub(crate) fn snapshot(&mut self) -> Snapshot {
        Snapshot::of(self)
    }

    /// What a frontend sees of it.
    pub(crate) fn seen(&mut self) -> Seen {
        Seen::of(self)
    }

    // Requests.

    /// A request that is refused. Returns status and detail.
    #[track_caller]
    pub(crate) fn refused(&mut self, op: u16, vcpu: u32, body: &[u8]) -> (u32, u32) {
        let answer = self.ask(op, vcpu, 0, body);
        assert_ne!(answer.status, status::OK, "{op:#x} is done");
        answer.outcome()
    }

    /// CONFIGURE_VM.
    #[track_caller]
    pub(crate) fn configure_as(&mut self, vcpus: u32, abi: u8, frequency: u64) {
        let body = contract::configure_body(vcpus, abi, frequency);
        self.vm(op::CONFIGURE_VM, &body).ok(0);
    }

    /// PAUSE with KEEP_COUNTING.
    #[track_caller]
    pub(crate) fn pause_counting(&mut self) -> Run {
        Run::of(self.vm(op::PAUSE, &pause_body(1)).ok(40))
    }

    /// SET_COUNTER_OFFSET.
    #[track_caller]
    pub(crate) fn set_offset(&mut self, offset: u64) {
        self.vm(op::SET_COUNTER_OFFSET, &words(&[offset, 0])).ok(0);
    }

    /// SET_COUNTER_ANCHOR.
    #[track_caller]
    pub(crate) fn set_anchor(&mut self, monotonic_ns: u64, count: u64) {
        let body = words(&[monotonic_ns, count]);
        self.vm(op::SET_COUNTER_ANCHOR, &body).ok(0);
    }

    /// RESTORE_BEGIN. Returns the new epoch.
    #[track_caller]
    pub(crate) fn begin(&mut self, vcpus: u32, flags: u32, saved_ns: u64, timeout_ns: u64) -> u64 {
        let body = restore_body(vcpus, flags, saved_ns, timeout_ns);
        let answer = self.vm(op::RESTORE_BEGIN, &body);
        answer.ok(0);
        answer.epoch
    }

    /// RESTORE_ABORT.
    #[track_caller]
    pub(crate) fn abort(&mut self) {
        self.vm(op::RESTORE_ABORT, &[]).ok(0);
    }

    /// SET_VM.
    #[track_caller]
    pub(crate) fn set_vm(&mut self, vcpus: &[Vcpu]) {
        self.vm(op::SET_VM, &vm_body(vcpus)).ok(0);
    }

    /// SET_VM with DONE. Returns how many vCPUs are missing.
    #[track_caller]
    pub(crate) fn set_vm_done(&mut self, vcpus: &[Vcpu]) -> u32 {
        let answer = self.ask_done(op::SET_VM, VM, &vm_body(vcpus));
        let body = answer.ok(8);
        assert_eq!(contract::u32_at(body, 4), 0, "the reserved half");
        contract::u32_at(body, 0)
    }

    /// GET_VM of a range.
    #[track_caller]
    pub(crate) fn state_of(&mut self, first: u32, count: u32) -> contract::VmState {
        let request = contract::request(op::GET_VM, VM, 0, &range_body(first, count));
        let len = 40 + 56 * count as usize;
        contract::VmState::of(self.raw(&request, 16 + len).ok(len))
    }

    /// A WAIT_RUN on the client's queue that waits.
    #[track_caller]
    pub(crate) fn wait(&mut self, vcpu: u32) -> Waiter {
        let queue = self.queue;
        self.wait_on(queue, vcpu)
    }

    /// A WAIT_RUN that waits.
    #[track_caller]
    pub(crate) fn wait_on(&mut self, queue: u16, vcpu: u32) -> Waiter {
        let head = self.wait_run(queue, vcpu);
        self.no_answer(queue);
        (queue, head)
    }

    /// Whatever the device had to do at the time of the call is done, its events included.
    pub(crate) fn settle(&mut self) {
        if let Some(binary) = self.binary() {
            binary.settle(0);
        }
    }

    /// No event has come into a buffer that was posted, with the device at rest.
    #[track_caller]
    pub(crate) fn no_event(&mut self) {
        self.settle();
        if let Some(used) = self.driver.used_already(0) {
            panic!("an event that there should not be: {:?}", Event::of(&used));
        }
    }

    /// Nothing was given back on this queue, with the device at rest.
    #[track_caller]
    pub(crate) fn no_answer(&mut self, queue: u16) {
        if let Some(binary) = self.binary() {
            binary.settle(queue);
        }
        assert_eq!(self.driver.used_already(queue), None, "answered at once");
    }

    /// Makes a request that releases waiters. Returns its answer, and theirs in this order. The
    /// waiters' come first on each queue.
    #[track_caller]
    pub(crate) fn releasing(
        &mut self,
        (op, vcpu, body): (u16, u32, &[u8]),
        waiters: &[Waiter],
    ) -> (Answer, Vec<Answer>) {
        self.releasing_bytes(&contract::request(op, vcpu, 0, body), waiters)
    }

    /// [`releasing`](Self::releasing), with the request's bytes.
    #[track_caller]
    pub(crate) fn releasing_bytes(
        &mut self,
        bytes: &[u8],
        waiters: &[Waiter],
    ) -> (Answer, Vec<Answer>) {
        let queue = self.queue;
        let own = self.driver.submit(queue, bytes, 8192, &Layout::plain());
        let answers = self.answers(&[waiters, &[(queue, own)]].concat());
        let (own, released) = answers.split_last().expect("its own");
        (own.clone(), released.to_vec())
    }

    /// The answers of these, in this order, whatever order each queue gives them back in.
    #[track_caller]
    pub(crate) fn answers(&mut self, waiters: &[Waiter]) -> Vec<Answer> {
        let mut answers = vec![None; waiters.len()];
        for (queue, _) in waiters {
            let used = self.driver.used(*queue);
            let at = waiters.iter().position(|w| *w == (*queue, used.head));
            let at = at.unwrap_or_else(|| panic!("another chain was given back: {}", used.head));
            answers[at] = Some(Answer::of(&used));
        }
        answers.into_iter().map(|a| a.expect("once each")).collect()
    }

    // Reading.

    /// The phase.
    pub(crate) fn phase(&mut self) -> u32 {
        self.info().phase
    }

    /// The current epoch.
    pub(crate) fn epoch(&mut self) -> u64 {
        self.info().epoch
    }

    /// All six registers of a vCPU at one instant, in the order of [`ARM64`].
    #[track_caller]
    pub(crate) fn get_all(&mut self, vcpu: u32) -> [u64; 6] {
        self.get(vcpu, &ARM64).try_into().expect("six values")
    }

    /// Both offsets.
    pub(crate) fn offsets(&mut self) -> [u64; 2] {
        let info = self.info();
        [info.cntvoff, info.cntpoff]
    }

    /// Both counts, without telling any vCPU.
    pub(crate) fn counts(&mut self) -> [u64; 2] {
        let info = self.info();
        [info.cntvoff, info.cntpoff].map(|offset| info.host_count.wrapping_sub(offset))
    }

    /// The virtual count, without telling any vCPU.
    pub(crate) fn virt(&mut self) -> u64 {
        self.counts()[0]
    }

    /// The physical count, without telling any vCPU.
    pub(crate) fn phys(&mut self) -> u64 {
        self.counts()[1]
    }

    /// Reads something, and sees that it lies between a clock's counts before and after.
    #[track_caller]
    pub(crate) fn reads_now(&mut self, clock: Clock, read: impl FnOnce(&mut Self) -> u64) -> u64 {
        let at = usize::from(clock.code());
        let before = self.counts()[at];
        let count = read(self);
        let after = self.counts()[at];
        let past = count.wrapping_sub(before);
        assert!(past <= after.wrapping_sub(before), "{count} is not now");
        count
    }

    /// Sets a timer's control and compare value in one. Returns the vCPU's lines.
    #[track_caller]
    pub(crate) fn arm(&mut self, vcpu: u32, clock: Clock, control: u64, cval: u64) -> u32 {
        let [ctl, _, compare] = clock.registers();
        self.set(vcpu, &[(ctl, control), (compare, cval)]).0
    }

    /// RESTORE_DONE of one vCPU, with what it must bring.
    #[track_caller]
    pub(crate) fn restored(&mut self, vcpu: u32, count: u64) -> u32 {
        self.bring(vcpu, count);
        self.restore_done(vcpu)
    }

    // Events.

    /// Whatever events there are, as a frontend with plenty of buffers gets them. No buffer stays.
    pub(crate) fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            self.post_event_buffer();
            self.settle();
            match self.driver.used_already(0) {
                Some(used) => events.push(Event::of(&used)),
                None => break,
            }
        }
        self.driver.stop(0);
        self.driver.start(0);
        events
    }

    /// The timers that events report, sorted: vCPU and clock's code. Other events are dropped.
    pub(crate) fn fired(&mut self) -> Vec<(u32, u16)> {
        let events = self.events();
        let asserted = events.iter().filter(|event| event.kind == TIMER_ASSERTED);
        let mut fired: Vec<_> = asserted.map(|event| (event.vcpu, event.timer)).collect();
        fired.sort_unstable();
        fired
    }
}

/// SET_VM's body.
pub(crate) fn vm_body(vcpus: &[Vcpu]) -> Vec<u8> {
    vcpus.iter().flat_map(|vcpu| vcpu.to_bytes()).collect()
}
