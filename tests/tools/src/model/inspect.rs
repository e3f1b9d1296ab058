//! What can be checked in a single state.

use std::fmt;

use vhost_user_timer_protocol::{Phase, Status, VM_WIDE};

use super::OPENS;
use super::action::Action;
use super::device::{Device, Reply};
use super::request::{Ask, Request};
use super::system::{System, Thread};

impl<D: Device> System<D> {
    /// Whether the device asks to be woken before anything happens by time alone.
    pub fn wakes_in_time(&self) -> bool {
        let wakes = self.device.ticks_to_next(self.now()).unwrap_or(u64::MAX);
        let owed_is_known = !self.ghost.owes() || self.device.vm().has_event() || wakes == 0;
        owed_is_known
            && self
                .ghost
                .ticks_to_next(self.host)
                .is_none_or(|ticks| wakes <= ticks)
    }

    /// Whether the missing vCPUs can be restored, the VM resumed and its offsets confirmed, and
    /// whether all waiters are released then.
    pub fn gate_can_be_opened(&self) -> bool {
        if !self.holds(OPENS) {
            return false;
        }
        let waiting = self.waiting();
        if self.phase() == Phase::Running {
            return waiting.is_empty();
        }
        let now = self.now();
        let mut device = self.device.clone();
        let mut replies = device.advance(now).replies;
        let mut serve = |device: &mut D, request: Request| {
            replies.extend(device.handle(now, u16::MAX, &request.bytes()).replies);
        };
        for vcpu in (0..self.vcpus()).filter(|vcpu| self.ghost.misses(*vcpu)) {
            for request in self.bringing(vcpu, 0) {
                serve(&mut device, request);
            }
        }
        serve(&mut device, Request::of_vm(Ask::Resume));
        if device.vm().phase() == Phase::Armed {
            let info = device.vm().info(now);
            let offsets = [info.cntvoff.get(), info.cntpoff.get()];
            serve(&mut device, Request::of_vm(Ask::Confirm(offsets)));
        }
        let in_peace = |reply: &Reply| {
            let status = Status::from(reply.header.status.get());
            matches!(status, Status::Ok | Status::TimedOut)
        };
        let mut answered: Vec<_> = replies
            .iter()
            .map(|reply| usize::from(reply.queue))
            .collect();
        answered.sort_unstable();
        device.vm().phase() == Phase::Running && replies.iter().all(in_peace) && answered == waiting
    }
}

impl<D: Device> fmt::Display for System<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vm = self.device.vm();
        let info = vm.info(self.now());
        let count = self.host.wrapping_sub(info.cntvoff.get());
        let (phase, epoch, host) = (vm.phase(), vm.epoch(), self.host);
        write!(f, "{phase}, epoch {epoch}, host {host}, count {count}")?;
        if phase == Phase::Restoring {
            write!(f, ", {} of {} done", info.restored, self.vcpus())?;
        }
        for (vcpu, thread) in self.threads.iter().enumerate() {
            match thread {
                Thread::Idle => {}
                Thread::Waiting { .. } => write!(f, "; vCPU {vcpu} waits")?,
                Thread::Running([cntvoff, _]) => write!(f, "; vCPU {vcpu} runs at {cntvoff}")?,
            }
        }
        if self.left.confirm {
            write!(f, "; in the hypervisor: {}", self.put_in[0])?;
        }
        Ok(())
    }
}

impl<D: Device> System<D> {
    /// Which thread asks for what, in an action in which the device serves a request.
    pub fn request_of(&self, action: Action) -> Option<(String, Request)> {
        match action {
            Action::Serve(queue) | Action::ServeAndDie(queue) => {
                let request = self.queues[queue].first()?;
                Some((self.thread_name(queue), *request))
            }
            Action::Vmm(deed) | Action::VmmAndDie(deed) => {
                Some(("the VMM".to_owned(), deed.request(self.vcpus())))
            }
            _ => None,
        }
    }

    fn thread_name(&self, queue: usize) -> String {
        match u32::try_from(queue).map_or(0, |queue| queue.wrapping_sub(self.vcpus())) {
            _ if queue == self.applier() => "the VMM's applier".to_owned(),
            vmm if vmm < VM_WIDE / 2 => format!("VMM thread {vmm}"),
            _ => format!("the thread of vCPU {queue}"),
        }
    }
}
