//! The wire contract once more, by hand, so that a slip in the project's own types is seen.
//!
//! Codes and offsets here are typed from SPEC.md and nothing of the protocol crate is used.
//! [`Client`] makes requests and takes answers apart; it judges only what is the same for
//! every request.

use std::os::unix::net::UnixStream;

use crate::raw_driver::{Driver, Layout, Rig, Setup, Used};

/// Operation codes.
pub mod op {
    pub const GET_INFO: u16 = 0x0001;
    pub const CONFIGURE_VM: u16 = 0x0002;
    pub const GET_REG_LIST: u16 = 0x0010;
    pub const GET_REGS: u16 = 0x0011;
    pub const SET_REGS: u16 = 0x0012;
    pub const GET_VM: u16 = 0x0020;
    pub const SET_VM: u16 = 0x0021;
    pub const SET_COUNTER_OFFSET: u16 = 0x0022;
    pub const SET_COUNTER_ANCHOR: u16 = 0x0023;
    pub const PAUSE: u16 = 0x0030;
    pub const RESUME: u16 = 0x0031;
    pub const RESTORE_BEGIN: u16 = 0x0040;
    pub const RESTORE_DONE: u16 = 0x0041;
    pub const WAIT_RUN: u16 = 0x0042;
    pub const RESTORE_ABORT: u16 = 0x0043;
    pub const SET_TIME_PAGE: u16 = 0x0050;

    /// Every operation, whether it is about one vCPU, and a body that it takes in length.
    pub const ALL: [(u16, bool, usize); 16] = [
        (GET_INFO, false, 0),
        (CONFIGURE_VM, false, 16),
        (GET_REG_LIST, true, 0),
        (GET_REGS, true, 8),
        (SET_REGS, true, 16),
        (GET_VM, false, 8),
        (SET_VM, false, 56),
        (SET_COUNTER_OFFSET, false, 16),
        (SET_COUNTER_ANCHOR, false, 16),
        (PAUSE, false, 8),
        (RESUME, false, 0),
        (RESTORE_BEGIN, false, 24),
        (RESTORE_DONE, true, 0),
        (WAIT_RUN, true, 0),
        (RESTORE_ABORT, false, 0),
        (SET_TIME_PAGE, false, 16),
    ];
}

/// Statuses.
pub mod status {
    pub const OK: u32 = 0;
    pub const ENOENT: u32 = 2;
    pub const ENXIO: u32 = 6;
    pub const E2BIG: u32 = 7;
    pub const EBUSY: u32 = 16;
    pub const EINVAL: u32 = 22;
    pub const ENODATA: u32 = 61;
    pub const EPROTO: u32 = 71;
    pub const EOPNOTSUPP: u32 = 95;
    pub const ETIMEDOUT: u32 = 110;
    pub const ESTALE: u32 = 116;
    pub const ECANCELED: u32 = 125;
}

/// Phases.
pub mod phase {
    pub const NEW: u32 = 0;
    pub const PAUSED: u32 = 1;
    pub const RUNNING: u32 = 2;
    pub const RESTORING: u32 = 3;
}

/// RESTORE_BEGIN's flags.
pub mod restore {
    pub const AUTORUN: u32 = 1;
    pub const STRICT: u32 = 2;
    pub const ELAPSED: u32 = 4;
}

/// The `vcpu` of a VM-wide request.
pub const VM: u32 = 0xffff_ffff;

/// Register ids in the order CTL, CNT, CVAL, PCTL, PCNT, PCVAL.
pub const ARM64: [u64; 6] = [
    0x6030_0000_0013_df19,
    0x6030_0000_0013_df1a,
    0x6030_0000_0013_df02,
    0x6030_0000_0013_df11,
    0x6030_0000_0013_df01,
    0x6030_0000_0013_df12,
];
/// As [`ARM64`], of the 32-bit ABI.
pub const ARM: [u64; 6] = [
    0x4020_0000_000f_7181,
    0x4030_0000_000f_0708,
    0x4030_0000_000f_0718,
    0x4020_0000_000f_7101,
    0x4030_0000_000f_0700,
    0x4030_0000_000f_0710,
];

/// TIMER_CTL.
pub const CTL: u64 = ARM64[0];
/// TIMER_CNT.
pub const CNT: u64 = ARM64[1];
/// TIMER_CVAL.
pub const CVAL: u64 = ARM64[2];
/// PTIMER_CTL.
pub const PCTL: u64 = ARM64[3];
/// PTIMER_CNT.
pub const PCNT: u64 = ARM64[4];
/// PTIMER_CVAL.
pub const PCVAL: u64 = ARM64[5];

/// INFO's flags.
pub mod info_flag {
    pub const OFFSET_PINNED: u8 = 1;
    pub const ANCHORED: u8 = 2;
    pub const PHYS_VIRTUALISED: u8 = 4;
}

/// A little-endian word of 64 bits.
///
/// # Panics
///
/// Where there are not that many bytes.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// A little-endian word of 32 bits.
///
/// # Panics
///
/// Where there are not that many bytes.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// A little-endian word of 16 bits.
///
/// # Panics
///
/// Where there are not that many bytes.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

/// The bytes of 64-bit words.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A request's bytes.
pub fn request(op: u16, vcpu: u32, epoch: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + body.len());
    bytes.extend(op.to_le_bytes());
    bytes.extend(0u16.to_le_bytes());
    bytes.extend(vcpu.to_le_bytes());
    bytes.extend(epoch.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// CONFIGURE_VM's body.
pub fn configure_body(vcpus: u32, abi: u8, frequency: u64) -> Vec<u8> {
    let mut body = vcpus.to_le_bytes().to_vec();
    body.extend([abi, 0, 0, 0]);
    body.extend(frequency.to_le_bytes());
    body
}

/// PAUSE's body.
pub fn pause_body(flags: u32) -> Vec<u8> {
    words(&[u64::from(flags)])
}

/// GET_VM's body.
pub fn range_body(first: u32, count: u32) -> Vec<u8> {
    words(&[u64::from(first) | u64::from(count) << 32])
}

/// RESTORE_BEGIN's body.
pub fn restore_body(vcpus: u32, flags: u32, saved_realtime_ns: u64, timeout_ns: u64) -> Vec<u8> {
    words(&[
        u64::from(vcpus) | u64::from(flags) << 32,
        saved_realtime_ns,
        timeout_ns,
    ])
}

/// SET_REGS's body.
pub fn regs_body(entries: &[(u64, u64)]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|(id, value)| words(&[*id, *value]))
        .collect()
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u32,
    /// The status's detail.
    pub detail: u32,
    /// The epoch it names.
    pub epoch: u64,
    /// What follows the header.
    pub body: Vec<u8>,
}

impl Answer {
    /// Takes a chain apart.
    ///
    /// # Panics
    ///
    /// Where it holds no header, or more than a header with an error, or where bytes past the
    /// used length were written.
    pub fn of(used: &Used) -> Self {
        let bytes = used.bytes();
        assert!(bytes.len() >= 16, "an answer of {} bytes", bytes.len());
        let answer = Answer {
            status: u32_at(bytes, 0),
            detail: u32_at(bytes, 4),
            epoch: u64_at(bytes, 8),
            body: bytes[16..].to_vec(),
        };
        assert!(
            answer.status == status::OK || answer.body.is_empty(),
            "an error has a header and nothing else: {answer:?}"
        );
        answer
    }

    /// Status and detail.
    pub fn outcome(&self) -> (u32, u32) {
        (self.status, self.detail)
    }

    /// The body of an answer that is no error and has this length.
    ///
    /// # Panics
    ///
    /// Where it is none.
    #[track_caller]
    pub fn ok(&self, len: usize) -> &[u8] {
        assert_eq!(self.outcome(), (status::OK, 0), "{self:?}");
        assert_eq!(self.body.len(), len, "the body's length");
        &self.body
    }
}

/// INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    pub version: u32,
    pub phase: u32,
    pub vcpus: u32,
    pub restored: u32,
    pub frequency: u64,
    pub cntvoff: u64,
    pub cntpoff: u64,
    pub epoch: u64,
    pub max_vcpus: u32,
    pub request_queues: u16,
    pub abi: u8,
    pub flags: u8,
    pub host_count: u64,
}

impl Info {
    /// From its 64 bytes.
    ///
    /// # Panics
    ///
    /// Where there are fewer.
    pub fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 64);
        Info {
            version: u32_at(bytes, 0),
            phase: u32_at(bytes, 4),
            vcpus: u32_at(bytes, 8),
            restored: u32_at(bytes, 12),
            frequency: u64_at(bytes, 16),
            cntvoff: u64_at(bytes, 24),
            cntpoff: u64_at(bytes, 32),
            epoch: u64_at(bytes, 40),
            max_vcpus: u32_at(bytes, 48),
            request_queues: u16_at(bytes, 52),
            abi: bytes[54],
            flags: bytes[55],
            host_count: u64_at(bytes, 56),
        }
    }

    /// The same with what moves by itself while the VM is PAUSED left out: the host counter,
    /// and the offset of a frozen clock.
    #[must_use]
    pub fn at_rest(self) -> Self {
        Info {
            cntvoff: self.host_count.wrapping_sub(self.cntvoff),
            cntpoff: match self.flags & info_flag::PHYS_VIRTUALISED {
                0 => self.cntpoff,
                _ => self.host_count.wrapping_sub(self.cntpoff),
            },
            host_count: 0,
            ..self
        }
    }
}

/// RUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub cntvoff: u64,
    pub cntpoff: u64,
    pub virt_count: u64,
    pub phys_count: u64,
    pub host_count: u64,
}

impl Run {
    /// From its 40 bytes.
    ///
    /// # Panics
    ///
    /// Where there are fewer, or where the five are not of one instant.
    pub fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 40);
        let run = Run {
            cntvoff: u64_at(bytes, 0),
            cntpoff: u64_at(bytes, 8),
            virt_count: u64_at(bytes, 16),
            phys_count: u64_at(bytes, 24),
            host_count: u64_at(bytes, 32),
        };
        assert_eq!(run.virt_count, run.host_count.wrapping_sub(run.cntvoff));
        assert_eq!(run.phys_count, run.host_count.wrapping_sub(run.cntpoff));
        run
    }
}

/// One vCPU in GET_VM and SET_VM: registers in the order of [`ARM64`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpu {
    pub vcpu: u32,
    pub present: u32,
    pub registers: [u64; 6],
}

impl Vcpu {
    /// With all six registers.
    pub fn with(vcpu: u32, registers: [u64; 6]) -> Self {
        Vcpu {
            vcpu,
            present: 0x3f,
            registers,
        }
    }

    /// From its 56 bytes.
    ///
    /// # Panics
    ///
    /// Where there are fewer.
    pub fn of(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 56);
        Vcpu {
            vcpu: u32_at(bytes, 0),
            present: u32_at(bytes, 4),
            registers: std::array::from_fn(|i| u64_at(bytes, 8 + 8 * i)),
        }
    }

    /// As its 56 bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.vcpu.to_le_bytes().to_vec();
        bytes.extend(self.present.to_le_bytes());
        bytes.extend(words(&self.registers));
        bytes
    }
}

/// GET_VM's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmState {
    pub virt_count: u64,
    pub phys_count: u64,
    pub host_count: u64,
    pub frequency: u64,
    pub first: u32,
    pub count: u32,
    pub vcpus: Vec<Vcpu>,
}

impl VmState {
    /// From its bytes.
    ///
    /// # Panics
    ///
    /// Where they are too few or too many.
    pub fn of(bytes: &[u8]) -> Self {
        let (head, rest) = bytes.split_at(40);
        let state = VmState {
            virt_count: u64_at(head, 0),
            phys_count: u64_at(head, 8),
            host_count: u64_at(head, 16),
            frequency: u64_at(head, 24),
            first: u32_at(head, 32),
            count: u32_at(head, 36),
            vcpus: rest.chunks(56).map(Vcpu::of).collect(),
        };
        assert_eq!(state.vcpus.len(), state.count as usize);
        state
    }
}

impl VmState {
    /// The same with what moves by itself while the VM is PAUSED left out: the host counter,
    /// and the physical clock where that passes it through.
    #[must_use]
    pub fn at_rest(mut self, physical_stands_still: bool) -> Self {
        self.host_count = 0;
        if !physical_stands_still {
            self.phys_count = 0;
            for vcpu in &mut self.vcpus {
                vcpu.registers[4] = 0;
                // ISTATUS follows the count.
                vcpu.registers[3] &= 3;
            }
        }
        self
    }
}

/// What an event buffer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub kind: u16,
    pub timer: u16,
    pub vcpu: u32,
    pub cval: u64,
    pub count: u64,
    pub epoch: u64,
}

/// TIMER_ASSERTED.
pub const TIMER_ASSERTED: u16 = 1;
/// PHASE_CHANGED.
pub const PHASE_CHANGED: u16 = 2;

impl Event {
    /// From a buffer that was given back.
    ///
    /// # Panics
    ///
    /// Where it holds no event.
    pub fn of(used: &Used) -> Self {
        let bytes = used.bytes();
        assert_eq!(bytes.len(), 32, "an event's length");
        Event {
            kind: u16_at(bytes, 0),
            timer: u16_at(bytes, 2),
            vcpu: u32_at(bytes, 4),
            cval: u64_at(bytes, 8),
            count: u64_at(bytes, 16),
            epoch: u64_at(bytes, 24),
        }
    }

    /// (kind, timer, vCPU or phase).
    pub fn what(&self) -> (u16, u16, u32) {
        (self.kind, self.timer, self.vcpu)
    }
}

/// Queues that take requests and give answers back: a driver's, or those of a model in this process.
pub trait Queues {
    /// Makes a request available on a queue. Returns its chain's head.
    fn submit(&mut self, queue: u16, request: &[u8], room: usize, layout: &Layout) -> u16;

    /// The next chain that is given back on a queue.
    fn used(&mut self, queue: u16) -> Used;

    /// A chain that has been given back on a queue, if one has.
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

/// Makes requests.
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
    /// On a fresh connection.
    pub fn connect(rig: &Rig) -> Self {
        Self::new(rig.connect())
    }

    /// On a fresh connection that is set up so.
    pub fn connect_with(rig: &Rig, setup: Setup) -> Self {
        Self::new(rig.connect_with(setup))
    }

    /// Over a connected socket.
    pub fn over(stream: UnixStream) -> Self {
        Self::new(Driver::over(stream, Setup::default()))
    }

    /// RESET_DEVICE, and the end of the connection.
    ///
    /// # Panics
    ///
    /// Where it is refused.
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

    /// Makes these bytes a request and takes the answer.
    pub fn raw(&mut self, request: &[u8], room: usize) -> Answer {
        let layout = self.layout.clone();
        let head = self.driver.submit(self.queue, request, room, &layout);
        self.released(self.queue, head)
    }

    /// Makes a request with room for any answer and takes it.
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

    /// Brings what a vCPU must bring to a restore.
    #[track_caller]
    pub fn bring(&mut self, vcpu: u32, count: u64) {
        self.set(vcpu, &[(CTL, 0), (CNT, count), (CVAL, u64::MAX)]);
    }

    /// As [`bring`](Self::bring), by way of this queue.
    #[track_caller]
    pub fn bring_on(&mut self, queue: u16, vcpu: u32, count: u64) {
        let queue = std::mem::replace(&mut self.queue, queue);
        self.bring(vcpu, count);
        self.queue = queue;
    }

    /// Makes a WAIT_RUN that will be held. Returns its head.
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

    /// The answers of held requests on one queue, in whatever order they come.
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

    /// Everything that the backend had to do at the time of the call is done: its events too,
    /// which it writes after the answer of the request that brought them.
    #[track_caller]
    pub fn settle(&mut self) {
        self.info();
        self.info();
    }

    /// As [`settle`](Self::settle), by way of this queue: what was made available there before
    /// has been looked at.
    #[track_caller]
    pub fn settle_on(&mut self, queue: u16) {
        let queue = std::mem::replace(&mut self.queue, queue);
        self.settle();
        self.queue = queue;
    }

    /// Whether nothing has come on the event queue, with the backend at rest.
    #[track_caller]
    pub fn no_event(&mut self) {
        self.settle();
        if let Some(used) = self.driver.used_already(0) {
            panic!("an event that there should not be: {:?}", Event::of(&used));
        }
    }
}
