//! A naive VM, told by SPEC.md's text: every count is moved whenever time passes and every timer
//! is looked at each time. It keeps no offset and no order of deadlines, and it copies itself
//! before each request so that a refusal changes nothing.
//!
//! It reads no clock. Its owner says how much time passes ([`Reference::pass`]) and hands
//! it requests ([`Reference::handle`]). What SPEC.md leaves to the device around the VM is not
//! here: rings, the memory behind SET_TIME_PAGE, device state.

mod counts;
mod registers;
mod requests;
mod restore;

use crate::contract::{Event, PHASE_CHANGED, TIMER_ASSERTED, phase, status, words};
use registers::{Told, Vcpu};
use restore::Restore;

/// Nanoseconds in a second.
const NS: u128 = 1_000_000_000;

/// The virtual clock's and timer's index, and the physical one's.
const PHYSICAL: usize = 1;

/// What the backend was started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The most vCPUs that a VM may have.
    pub max_vcpus: u32,
    /// How many request queues there are.
    pub request_queues: u16,
    /// The frequency of a VM that names none, Hz.
    pub frequency: u64,
    /// Whether a VM may have no other frequency.
    pub frequency_fixed: bool,
    /// What the host counter counts by, as `info` gives it.
    pub source: u8,
}

/// Where the answer of a WAIT_RUN belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// The request queue.
    pub queue: u16,
    /// The head of the descriptor chain.
    pub head: u16,
}

/// Waiters that are answered, all with the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Released {
    /// The waiters, in the order of their requests.
    pub waiters: Vec<Waiter>,
    /// The answer, header first.
    pub answer: Vec<u8>,
}

/// Something that the log must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The phase changed.
    Phase {
        /// The phase that ended.
        from: u32,
        /// The phase that began.
        to: u32,
        /// The epoch.
        epoch: u64,
    },
    /// A restore's time-out passed.
    RestoreTimedOut {
        /// The vCPUs that are missing.
        missing: Vec<u32>,
        /// The number of vCPUs.
        vcpus: u32,
    },
    /// With ONE_OFFSET, the vCPUs brought another physical count than the virtual one.
    PhysicalCountMoved {
        /// By how many ticks the physical count moves.
        ticks: i64,
    },
    /// ELAPSED found the wall clock before `saved_realtime_ns`.
    RealtimeWentBack {
        /// By how much, ns.
        ns: u64,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Clock {
    count: u64,
    counting: bool,
}

/// A refusal: status and detail.
type Refusal = (u32, u32);

/// The naive VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    profile: Profile,
    host: u64,
    realtime_ns: u64,
    phase: u32,
    epoch: u64,
    abi: usize,
    frequency: u64,
    clocks: [Clock; 2],
    /// CONFIRM.
    confirms: bool,
    /// ONE_OFFSET.
    one_offset: bool,
    physical_is_own: bool,
    pinned: bool,
    anchor: Option<(u64, u64)>,
    vcpus: Vec<Vcpu>,
    /// The counts that the last GET_VM reported.
    vm_told: [Told; 2],
    /// The restore that is open, or that has armed the VM.
    restore: Option<Restore>,
    waiters: Vec<Waiter>,
    /// The phase that PHASE_CHANGED must still report.
    phase_to_report: Option<u32>,
    released: Vec<Released>,
    notices: Vec<Notice>,
}

impl Reference {
    /// A VM in NEW, at this host counter and this CLOCK_REALTIME, ns.
    pub fn new(profile: Profile, host: u64, realtime_ns: u64) -> Self {
        Reference {
            profile,
            host,
            realtime_ns,
            phase: phase::NEW,
            epoch: 1,
            abi: 0,
            frequency: profile.frequency,
            clocks: [Clock::default(); 2],
            confirms: false,
            one_offset: false,
            physical_is_own: false,
            pinned: false,
            anchor: None,
            vcpus: Vec::new(),
            vm_told: [None; 2],
            restore: None,
            waiters: Vec::new(),
            phase_to_report: None,
            released: Vec::new(),
            notices: Vec::new(),
        }
    }

    // What can be seen of it at any time.

    /// The host counter, ticks.
    pub fn host(&self) -> u64 {
        self.host
    }

    /// The phase.
    pub fn phase(&self) -> u32 {
        self.phase
    }

    /// The epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number of vCPUs; 0 in NEW.
    pub fn vcpus(&self) -> u32 {
        self.vcpus.len() as u32
    }

    /// `monotonic_ns` and `count` of the last SET_COUNTER_ANCHOR.
    pub fn anchor(&self) -> Option<(u64, u64)> {
        self.anchor
    }

    /// The virtual and the physical count.
    pub fn counts(&self) -> [u64; 2] {
        self.clocks.map(|clock| clock.count)
    }

    /// The vCPUs that are missing in the restore, in order.
    pub fn missing(&self) -> Vec<u32> {
        let open = self.restore.is_some();
        (0..self.vcpus())
            .filter(|vcpu| open && !self.vcpus[*vcpu as usize].done)
            .collect()
    }

    /// The registers that a vCPU lacks for RESTORE_DONE, as `present` bits.
    pub fn lacks(&self, vcpu: u32) -> u32 {
        if self.restore.is_none() {
            return 0;
        }
        // With a pinned offset the counts are ignored, so none is needed.
        let needed: &[usize] = if self.pinned { &[0, 2] } else { &[0, 1, 2] };
        let set = &self.vcpus[vcpu as usize].set;
        let lacks = needed.iter().filter(|register| set[**register].is_none());
        lacks.map(|register| 1 << register).sum()
    }

    /// The answers to waiters since the last call.
    pub fn take_released(&mut self) -> Vec<Released> {
        std::mem::take(&mut self.released)
    }

    /// The notices since the last call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// The events that are due, as a frontend with enough buffers gets them.
    pub fn take_events(&mut self) -> Vec<Event> {
        let [virt, phys] = self.counts();
        let epoch = self.epoch;
        let mut events = Vec::new();
        if let Some(phase) = self.phase_to_report.take() {
            events.push(Event {
                kind: PHASE_CHANGED,
                timer: 0,
                vcpu: phase,
                cval: 0,
                count: virt,
                epoch,
            });
        }
        for (index, vcpu) in (0..).zip(&mut self.vcpus) {
            for (n, (timer, count)) in (0..).zip(vcpu.timers.iter_mut().zip([virt, phys])) {
                if std::mem::take(&mut timer.to_report) {
                    events.push(Event {
                        kind: TIMER_ASSERTED,
                        timer: n,
                        vcpu: index,
                        cval: timer.cval,
                        count,
                        epoch,
                    });
                }
            }
        }
        events
    }

    // What happens around it.

    /// GET_VRING_BASE of a request queue.
    pub fn stop_queue(&mut self, queue: u16) {
        let all = std::mem::take(&mut self.waiters);
        self.waiters = all.iter().copied().filter(|w| w.queue == queue).collect();
        self.release(status::ECANCELED, 0);
        self.waiters = all.into_iter().filter(|w| w.queue != queue).collect();
    }

    /// The connection ends.
    pub fn disconnect(&mut self) {
        self.waiters.clear();
        if self.phase == phase::RUNNING {
            self.report_all_lines();
        }
    }

    /// RESET_DEVICE.
    pub fn reset(&mut self) {
        *self = Reference {
            epoch: self.epoch,
            released: self.take_released(),
            notices: self.take_notices(),
            ..Reference::new(self.profile, self.host, self.realtime_ns)
        };
    }

    // What comes of it.

    /// Answers all who wait.
    fn release(&mut self, status: u32, detail: u32) {
        if self.waiters.is_empty() {
            return;
        }
        let mut answer = self.header(status, detail);
        if status == status::OK {
            answer.extend(self.run());
        }
        self.released.push(Released {
            waiters: std::mem::take(&mut self.waiters),
            answer,
        });
    }

    fn header(&self, status: u32, detail: u32) -> Vec<u8> {
        words(&[u64::from(status) | u64::from(detail) << 32, self.epoch])
    }

    /// `run`, at this instant.
    fn run(&self) -> Vec<u8> {
        let [virt, phys] = self.counts();
        let offset = |count| self.host.wrapping_sub(count);
        words(&[offset(virt), offset(phys), virt, phys, self.host])
    }

    /// The phase in which the clocks count and vCPUs run, or wait for CONFIRM_RUN.
    fn running_or_armed(&self) -> u32 {
        if self.confirms {
            phase::ARMED
        } else {
            phase::RUNNING
        }
    }

    fn report_all_lines(&mut self) {
        for vcpu in &mut self.vcpus {
            for (timer, clock) in vcpu.timers.iter_mut().zip(&self.clocks) {
                timer.to_report = timer.line(clock.count);
            }
        }
    }

    fn enter(&mut self, to: u32) {
        let from = std::mem::replace(&mut self.phase, to);
        if from == to {
            return;
        }
        let epoch = self.epoch;
        self.notices.push(Notice::Phase { from, to, epoch });
        self.phase_to_report = Some(to);
        for timer in self.vcpus.iter_mut().flat_map(|vcpu| &mut vcpu.timers) {
            timer.to_report = false;
        }
        if [phase::RUNNING, phase::ARMED].contains(&to) {
            self.clocks
                .iter_mut()
                .for_each(|clock| clock.counting = true);
        }
        if to == phase::RUNNING {
            self.report_all_lines();
            self.release(status::OK, 0);
        }
    }
}
