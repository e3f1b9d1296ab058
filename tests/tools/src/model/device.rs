//! The backend as the checker drives it: the model's `Vm`, and the little that its shell adds.

use std::fmt::Debug;
use std::hash::Hash;

use vhost_user_timer_model::vm::{
    Changed, Effects, Handled, Incoming, Now, Profile, Released, Token, VcpuRecord, Vm, VmRecord,
};
use vhost_user_timer_protocol::wire::{Event, ResponseHeader, Run};
use vhost_user_timer_protocol::{CounterSource, Status};
use zerocopy::{FromBytes, IntoBytes};

/// A tick of the host counter is a nanosecond.
pub const FREQUENCY: u64 = 1_000_000_000;

/// Writable bytes of every request: more than any answer here needs.
const ROOM: usize = 256;

/// cntvoff and cntpoff, or the counts of the two clocks.
pub type Pair = [u64; 2];

/// The answer to a WAIT_RUN that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Whose.
    pub queue: u16,
    /// The answer's header.
    pub header: ResponseHeader,
    /// The answer's body.
    pub run: Option<Run>,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its header.
    pub header: ResponseHeader,
    /// What follows.
    pub body: Vec<u8>,
}

impl Answer {
    /// Whether the request was granted.
    pub fn status(&self) -> Status {
        Status::from(self.header.status.get())
    }

    /// The body of a WAIT_RUN, PAUSE or RESUME that was granted.
    pub fn run(&self) -> Option<Run> {
        Run::read_from_bytes(&self.body).ok()
    }
}

/// What came of one call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// `None` where the request waits.
    pub answer: Option<Answer>,
    /// The waiters that are answered, in this order.
    pub replies: Vec<Reply>,
    /// What the state file shall store.
    pub changed: Changed,
}

/// What the VM is, as far as the backend decides it.
pub fn profile(vcpus: u32) -> Profile {
    Profile {
        max_vcpus: vcpus,
        request_queues: 1,
        frequency: FREQUENCY,
        frequency_fixed: true,
        source: CounterSource::NotTold,
    }
}

/// A backend with one VM.
///
/// Its methods do what the real backend does with the real [`Vm`]; a [mutant](super::mutant) gets
/// one of them wrong.
pub trait Device: Clone + Debug + Eq + Hash + Send + Sync + 'static {
    /// The VM.
    fn vm(&self) -> &Vm;

    /// The VM, mutable.
    fn vm_mut(&mut self) -> &mut Vm;

    /// Serves a request from a queue.
    fn handle(&mut self, now: Now, queue: u16, request: &[u8]) -> Served {
        handle(self.vm_mut(), now, queue, request)
    }

    /// The alarm expires.
    fn advance(&mut self, now: Now) -> Served {
        advance(self.vm_mut(), now)
    }

    /// The frontend has a buffer for an event.
    fn next_event(&mut self, now: Now) -> Option<Event> {
        self.vm_mut().next_event(now)
    }

    /// Ticks until the backend wants to be woken, if ever.
    fn ticks_to_next(&self, now: Now) -> Option<u64> {
        self.vm().ticks_to_next(now)
    }

    /// The frontend stops a queue.
    fn stop_queue(&mut self, queue: u16) -> Vec<Reply> {
        let mut effects = Effects::default();
        self.vm_mut().cancel_queue(queue, &mut effects);
        replies(&effects)
    }

    /// The connection ends.
    fn disconnect(&mut self, now: Now) {
        self.vm_mut().disconnect(now);
    }

    /// A vCPU of the VMM enters the guest, released by this answer. `put_in` are the offsets in the
    /// hypervisor, which the VMM has put in before, and which it leaves alone here.
    fn enters(&mut self, _now: Now, _run: &Run, _put_in: &mut Pair) {}

    /// The process is killed, and another resumes from the state file.
    fn restart(&mut self, now: Now) {
        restart(self.vm_mut(), now);
    }
}

impl Device for Vm {
    fn vm(&self) -> &Vm {
        self
    }

    fn vm_mut(&mut self) -> &mut Vm {
        self
    }
}

/// Serves a request as the real backend does.
///
/// # Panics
///
/// If an answer has no header.
pub fn handle(vm: &mut Vm, now: Now, queue: u16, request: &[u8]) -> Served {
    let mut effects = Effects::default();
    let call = Incoming::parse(request, ROOM, Token { queue, head: 0 });
    let handled = vm.handle(now, &call, &mut effects);
    let answer = (handled == Handled::Answered).then(|| {
        let (header, body) = ResponseHeader::read_from_prefix(&effects.response)
            .expect("an answer begins with a header");
        Answer {
            header,
            body: body.to_vec(),
        }
    });
    Served {
        answer,
        replies: replies(&effects),
        changed: effects.take_changed(Changed::clone).unwrap_or_default(),
    }
}

/// Lets time pass as the real backend does.
pub fn advance(vm: &mut Vm, now: Now) -> Served {
    let mut effects = Effects::default();
    vm.advance(now, &mut effects);
    Served {
        answer: None,
        replies: replies(&effects),
        changed: effects.take_changed(Changed::clone).unwrap_or_default(),
    }
}

/// Resumes from the VM's records, as the real backend does.
///
/// # Panics
///
/// If the records are not those of a VM.
pub fn restart(vm: &mut Vm, now: Now) {
    let restarted = Records::of(vm).vm(now);
    *vm = restarted.expect("the records of a VM");
}

fn replies(effects: &Effects) -> Vec<Reply> {
    let each = |released: &Released| {
        let (header, run) = (released.header, released.run);
        let waiters = released.waiters.clone();
        waiters.into_iter().map(move |token| Reply {
            queue: token.queue,
            header,
            run,
        })
    };
    effects.released.iter().flat_map(each).collect()
}

/// What a state file holds of a VM.
#[derive(Debug)]
pub struct Records {
    vm: VmRecord,
    vcpus: Vec<VcpuRecord>,
}

impl Records {
    /// The records of a VM as it is.
    pub fn of(vm: &Vm) -> Self {
        Records {
            vm: vm.vm_record(),
            vcpus: (0..vm.vcpu_records())
                .map(|vcpu| vm.vcpu_record(vcpu))
                .collect(),
        }
    }

    /// Whether a state file with these records, updated by these changes, gives the same VM as one
    /// that stores everything.
    pub fn lead_to(mut self, vm: &Vm, now: Now, changed: &Changed) -> bool {
        let is = Records::of(vm);
        if changed.all {
            return true;
        }
        if changed.any() {
            self.vm = is.vm;
        }
        self.vcpus.resize(is.vcpus.len(), VcpuRecord::default());
        for &vcpu in &changed.vcpus {
            self.vcpus[vcpu as usize] = is.vcpus[vcpu as usize];
        }
        // Records may differ in parts that no longer matter.
        self.same(&is) || self.vm(now) == is.vm(now)
    }

    fn same(&self, other: &Records) -> bool {
        let vcpus = || self.vcpus.iter().zip(&other.vcpus);
        self.vm.as_bytes() == other.vm.as_bytes()
            && vcpus().all(|(one, other)| one.as_bytes() == other.as_bytes())
    }

    fn vm(&self, now: Now) -> Option<Vm> {
        let profile = profile(self.vcpus.len() as u32);
        let vcpu = |vcpu| self.vcpus[vcpu as usize];
        Vm::from_records(profile, &self.vm, vcpu, |_| now).ok()
    }
}
