//! What can happen in a state.

use vhost_user_timer_protocol::Phase;

use super::action::{Action, Deed};
use super::device::Device;
use super::limits::Limits;
use super::scenario::{AHEAD, BACK};
use super::system::{System, Thread};

impl<D: Device> System<D> {
    /// What can happen here.
    pub fn actions(&self, limits: &Limits, actions: &mut Vec<Action>) {
        if !self.ghost.broken().is_empty() {
            return;
        }
        let left = &self.left;
        if left.ticks > 0 {
            actions.push(Action::Tick);
        }
        let alarm = self.device.ticks_to_next(self.now()) == Some(0);
        if alarm || self.device.vm().has_event() || self.ghost.owes() {
            actions.push(Action::TakeEvents);
        }
        let busy = |queue: usize| !self.queues[queue].is_empty();
        let in_flight = || (0..self.queues.len()).filter(|queue| busy(*queue));
        actions.extend(in_flight().map(Action::Serve));
        for (vcpu, thread) in (0..).zip(&self.threads) {
            match thread {
                Thread::Idle if !busy(vcpu as usize) => actions.push(Action::Enter(vcpu)),
                Thread::Waiting { .. } if self.ghost.misses(vcpu) => {
                    let free = |thread: &u32| !busy((self.vcpus() + thread) as usize);
                    let free = (0..limits.vmm_threads).find(free);
                    actions.extend(free.map(|thread| Action::BringFor { thread, vcpu }));
                }
                _ => {}
            }
        }
        if self.phase() == Phase::Armed && !busy(self.applier()) {
            actions.push(Action::Apply);
        }
        let dies = left.restarts > 0;
        for deed in self.deeds() {
            actions.push(Action::Vmm(deed));
            if dies
                && deed
                    .cost(&mut left.clone())
                    .is_none_or(|_| left.disturbances > 1)
            {
                actions.push(Action::VmmAndDie(deed));
            }
        }
        if dies {
            actions.extend(in_flight().map(Action::ServeAndDie));
        }
        if left.disconnects > 0 {
            let waiting = self.waiting().into_iter();
            actions.extend(waiting.map(|vcpu| Action::StopQueue(vcpu as u32)));
        }
        let submitted = in_flight().next().is_some() || !self.waiting().is_empty();
        for lost in [true, false] {
            if lost || submitted {
                if left.disconnects > 0 {
                    actions.push(Action::Reconnect { lost });
                }
                if dies {
                    actions.push(Action::Restart { lost });
                }
            }
        }
    }

    /// What the VMM can do here.
    fn deeds(&self) -> Vec<Deed> {
        let all = [
            Deed::Resume,
            Deed::Pause {
                keep_counting: false,
            },
            Deed::Pause {
                keep_counting: true,
            },
            Deed::Begin { autorun: true },
            Deed::Begin { autorun: false },
            Deed::Abort,
            Deed::SetOffset,
            Deed::SetCount(BACK),
            Deed::SetCount(AHEAD),
        ];
        let timers = (0..self.vcpus()).map(Deed::SetTimer);
        let allowed = |deed: &Deed| {
            deed.cost(&mut self.left.clone())
                .is_none_or(|left| *left > 0)
        };
        all.into_iter().chain(timers).filter(allowed).collect()
    }
}
