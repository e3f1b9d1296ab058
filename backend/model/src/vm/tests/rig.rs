//! One VM, a host counter turned by hand, typed requests.

use vhost_user_timer_protocol::wire;
use vhost_user_timer_protocol::{CounterSource, Phase, Register, Status};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::vm::{Effects, Handled, Incoming, Notice, Now, Profile, Released, Timeline, Token, Vm};
pub(super) use vhost_user_timer_reference::{Ask, whole_vcpu};

/// Counter frequency, as in the KVM measurements: a tick is a nanosecond.
pub(super) const HZ: u64 = 1_000_000_000;

/// The host counter when a test begins.
pub(super) const START: u64 = 5 * HZ;

/// CLOCK_REALTIME when a test begins, ns. It advances with the host counter.
pub(super) const START_REALTIME: u64 = 1_800_000_000 * HZ;

pub(super) const PROFILE: Profile = Profile {
    max_vcpus: 4096,
    request_queues: 2,
    frequency: HZ,
    frequency_fixed: false,
    source: CounterSource::Cntvct,
};

pub(super) const PHASES: [Phase; 5] = Phase::ALL;

/// A control register that lets the timer's line rise.
pub(super) const ON: u64 = wire::ctl::ENABLE;

/// An answer, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: Status,
    pub(super) detail: u32,
    pub(super) epoch: u64,
    pub(super) body: Vec<u8>,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        let (header, body) = wire::ResponseHeader::read_from_prefix(bytes).unwrap();
        Reply {
            status: header.status.get().into(),
            detail: header.detail.get(),
            epoch: header.epoch.get(),
            body: body.to_vec(),
        }
    }

    /// Status and detail.
    pub(super) fn verdict(&self) -> (Status, u32) {
        (self.status, self.detail)
    }

    /// The whole body of the answer of a granted request.
    pub(super) fn read<T>(&self) -> T
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        assert_eq!(self.verdict(), (Status::Ok, 0));
        T::read_from_bytes(&self.body).expect("the body's length")
    }
}

/// A timer that was reported: vCPU and clock.
pub(super) type Fired = (u32, Timeline);

#[derive(Clone)]
pub(super) struct Rig {
    pub(super) vm: Vm,
    pub(super) now: Now,
    pub(super) effects: Effects,
    next_head: u16,
}

impl Rig {
    /// A VM in NEW.
    pub(super) fn new() -> Self {
        Rig::with_profile(PROFILE)
    }

    pub(super) fn reset(&mut self) {
        self.vm.reset(&mut self.effects);
    }

    pub(super) fn with_profile(profile: Profile) -> Self {
        Rig {
            vm: Vm::new(profile),
            now: Now {
                host: START,
                realtime_ns: START_REALTIME,
            },
            effects: Effects::default(),
            next_head: 0,
        }
    }

    /// A VM just configured.
    pub(super) fn paused(vcpus: u32) -> Self {
        let mut rig = Rig::new();
        rig.done(&Ask::configure(vcpus, 0, 0));
        rig
    }

    pub(super) fn running(vcpus: u32) -> Self {
        let mut rig = Rig::paused(vcpus);
        rig.done(&Ask::resume());
        rig.events();
        rig
    }

    pub(super) fn restoring(vcpus: u32, flags: u32) -> Self {
        let mut rig = Rig::paused(vcpus);
        rig.done(&Ask::begin(vcpus, flags));
        rig
    }

    /// A VM just configured with these flags.
    pub(super) fn configured(vcpus: u32, flags: u8) -> Self {
        let mut rig = Rig::new();
        rig.done(&Ask::configure_with(vcpus, 0, flags, 0));
        rig
    }

    /// A VM with CONFIRM that RESUME has armed.
    pub(super) fn armed(vcpus: u32) -> Self {
        let mut rig = Rig::configured(vcpus, wire::configure_flags::CONFIRM);
        rig.resume();
        rig
    }

    /// A VM with these flags that a restore has armed, in which every vCPU brought this count.
    pub(super) fn armed_by_restore(vcpus: u32, flags: u8, count: u64) -> Self {
        let mut rig = Rig::configured(vcpus, flags | wire::configure_flags::CONFIRM);
        rig.done(&Ask::begin(vcpus, wire::restore_flags::AUTORUN));
        for vcpu in 0..vcpus {
            rig.bring(vcpu, count);
            rig.restored(vcpu);
        }
        assert_eq!(rig.vm.phase(), Phase::Armed);
        rig
    }

    /// A VM of `vcpus` vCPUs in a phase.
    pub(super) fn in_phase(phase: Phase, vcpus: u32) -> Self {
        match phase {
            Phase::New => Rig::new(),
            Phase::Paused => Rig::paused(vcpus),
            Phase::Running => Rig::running(vcpus),
            Phase::Restoring => Rig::restoring(vcpus, 0),
            Phase::Armed => Rig::armed(vcpus),
        }
    }

    // Time.

    /// Time passes; the VM notices at its next call.
    pub(super) fn drift(&mut self, ticks: u64) {
        self.now.host = self.now.host.wrapping_add(ticks);
        self.now.realtime_ns = self.now.realtime_ns.wrapping_add(ticks);
    }

    /// Time passes, and the VM is advanced.
    pub(super) fn pass(&mut self, ticks: u64) {
        self.drift(ticks);
        self.vm.advance(self.now, &mut self.effects);
    }

    // Requests.

    /// The token that the next request on a queue bears.
    pub(super) fn next_token(&self, queue: u16) -> Token {
        Token {
            queue,
            head: self.next_head,
        }
    }

    /// Sends bytes as they are. `None` if the answer waits.
    pub(super) fn offer_bytes(&mut self, bytes: &[u8], room: usize, queue: u16) -> Option<Reply> {
        let call = Incoming::parse(bytes, room, self.next_token(queue));
        match self.vm.handle(self.now, &call, &mut self.effects) {
            Handled::Answered => {
                let response = &self.effects.response;
                assert!(response.len() <= room, "more than there was room for");
                Some(Reply::parse(response))
            }
            Handled::Waiting => {
                self.next_head += 1;
                None
            }
        }
    }

    pub(super) fn offer(&mut self, ask: &Ask) -> Option<Reply> {
        self.offer_bytes(&ask.bytes(), ask.room, ask.queue)
    }

    /// Sends a request that is answered at once, one way or another.
    pub(super) fn send(&mut self, ask: &Ask) -> Reply {
        self.offer(ask).expect("an answer at once")
    }

    /// Sends a request that is refused. Returns status and detail.
    pub(super) fn refused(&mut self, ask: &Ask) -> (Status, u32) {
        let reply = self.send(ask);
        assert_ne!(reply.status, Status::Ok, "{ask:?}");
        assert!(reply.body.is_empty(), "only the header is written");
        reply.verdict()
    }

    /// Sends a request that is done.
    pub(super) fn done(&mut self, ask: &Ask) -> Reply {
        let reply = self.send(ask);
        assert_eq!(reply.verdict(), (Status::Ok, 0), "{ask:?}");
        reply
    }

    /// Sends a WAIT_RUN that waits. Returns its token.
    pub(super) fn wait(&mut self, ask: &Ask) -> Token {
        let token = self.next_token(ask.queue);
        assert_eq!(self.offer(ask), None, "{ask:?} was answered at once");
        token
    }

    // What tests use most often.

    /// The value that a vCPU's register reads, by GET_REGS.
    pub(super) fn get(&mut self, vcpu: u32, register: Register) -> u64 {
        let entry: wire::RegValue = self.done(&Ask::get_regs(vcpu, &[register])).read();
        entry.value.get()
    }

    /// All six registers of a vCPU at one instant, in the order of [`Register::ALL`].
    pub(super) fn get_all(&mut self, vcpu: u32) -> [(Register, u64); 6] {
        let entries: [wire::RegValue; 6] = self.done(&Ask::get_regs(vcpu, &Register::ALL)).read();
        std::array::from_fn(|n| (Register::ALL[n], entries[n].value.get()))
    }

    pub(super) fn set(&mut self, vcpu: u32, values: &[(Register, u64)]) -> wire::SetRegsResult {
        self.done(&Ask::set_regs(vcpu, values)).read()
    }

    /// Sets a timer's control and compare value in one. Returns the vCPU's lines.
    pub(super) fn arm(&mut self, vcpu: u32, clock: Timeline, control: u64, cval: u64) -> u32 {
        let [ctl, _, compare] = registers_of(clock);
        let result = self.set(vcpu, &[(ctl, control), (compare, cval)]);
        result.lines.get()
    }

    /// GET_INFO, which reports no vCPU a count, unlike GET_REGS and GET_VM.
    pub(super) fn info(&mut self) -> wire::Info {
        self.done(&Ask::get_info()).read()
    }

    pub(super) fn offset(&mut self, clock: Timeline) -> u64 {
        let info = self.info();
        match clock {
            Timeline::Virtual => info.cntvoff,
            Timeline::Physical => info.cntpoff,
        }
        .get()
    }

    /// A clock's count, without reporting it to any vCPU.
    pub(super) fn count(&mut self, clock: Timeline) -> u64 {
        self.now.host.wrapping_sub(self.offset(clock))
    }

    pub(super) fn virt(&mut self) -> u64 {
        self.count(Timeline::Virtual)
    }

    pub(super) fn phys(&mut self) -> u64 {
        self.count(Timeline::Physical)
    }

    pub(super) fn pause(&mut self) -> wire::Run {
        self.done(&Ask::pause()).read()
    }

    pub(super) fn pause_counting(&mut self) -> wire::Run {
        self.done(&Ask::pause_counting()).read()
    }

    pub(super) fn resume(&mut self) -> wire::Run {
        self.done(&Ask::resume()).read()
    }

    /// CONFIRM_RUN with the VM's offsets.
    pub(super) fn confirm(&mut self) -> wire::Run {
        let info = self.info();
        let ask = Ask::confirm(info.cntvoff.get(), info.cntpoff.get());
        self.done(&ask).read()
    }

    /// Sets the registers that a vCPU needs for RESTORE_DONE.
    pub(super) fn bring(&mut self, vcpu: u32, count: u64) {
        let values = [
            (Register::TimerCtl, 0),
            (Register::TimerCnt, count),
            (Register::TimerCval, 0),
        ];
        self.set(vcpu, &values);
    }

    /// RESTORE_DONE. Returns how many vCPUs remain.
    pub(super) fn restored(&mut self, vcpu: u32) -> u32 {
        let reply = self.done(&Ask::restore_done(vcpu));
        let result: wire::RestoreDoneResult = reply.read();
        assert_eq!(result.reserved.get(), 0);
        result.remaining.get()
    }

    // Effects.

    /// All events, as a frontend with plenty of buffers gets them.
    pub(super) fn events(&mut self) -> Vec<wire::Event> {
        std::iter::from_fn(|| self.vm.next_event(self.now)).collect()
    }

    /// The timers that events report, sorted; other events are dropped.
    pub(super) fn fired(&mut self) -> Vec<Fired> {
        let mut fired: Vec<_> = self.events().iter().filter_map(fired_by).collect();
        fired.sort_unstable();
        fired
    }

    pub(super) fn released(&mut self) -> Vec<Released> {
        std::mem::take(&mut self.effects.released)
    }

    pub(super) fn notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.effects.notices)
    }
}

/// Control, count and compare value of a clock's timer.
pub(super) fn registers_of(clock: Timeline) -> [Register; 3] {
    match clock {
        Timeline::Virtual => [Register::TimerCtl, Register::TimerCnt, Register::TimerCval],
        Timeline::Physical => [
            Register::PtimerCtl,
            Register::PtimerCnt,
            Register::PtimerCval,
        ],
    }
}

/// The timer that an event reports; `None` for another event.
pub(super) fn fired_by(event: &wire::Event) -> Option<Fired> {
    let clock = match event.timer.get() {
        wire::TIMER_VIRTUAL => Timeline::Virtual,
        wire::TIMER_PHYSICAL => Timeline::Physical,
        other => panic!("no timer {other}"),
    };
    (event.kind.get() == wire::EVENT_TIMER_ASSERTED).then(|| (event.vcpu.get(), clock))
}
