//! One vCPU's part of a restore, on the thread that is that vCPU.

use std::sync::Arc;

use super::Shared;
use crate::{Deadline, Error, Offsets, Operation, Remaining, RequestQueue, Run, SavedVcpu, Ticket};

/// One vCPU's part of a [`Restore`](super::Restore). It can be sent to the vCPU's thread, which
/// calls [`run`](Self::run).
///
/// Dropping it before the vCPU has its registers back, as a thread that panics does, fails the
/// whole restore, which could never complete.
#[must_use = "dropping a vCPU's part fails the restore"]
pub struct VcpuRestore {
    shared: Arc<Shared>,
    index: u32,
    step: Step,
    /// How often waiting vCPUs had been recalled when this one last learnt of it.
    recalled: u64,
}

/// What is next.
enum Step {
    BringBack,
    /// SET_VM with DONE is in flight, and the WAIT_RUN behind it, if there was room.
    BringingBack(Ticket<Remaining>, Option<Ticket<Run>>),
    /// The vCPU has its registers back. Its WAIT_RUN may be in flight.
    Wait(Option<Ticket<Run>>),
}

/// How the vCPU waits once its registers are back.
#[derive(Clone, Copy)]
enum By {
    Request,
    Page,
}

impl VcpuRestore {
    pub(super) fn new(shared: Arc<Shared>, index: u32) -> Self {
        VcpuRestore {
            recalled: shared.queues[0].session().history.recalled(),
            shared,
            index,
            step: Step::BringBack,
        }
    }

    /// The vCPU's index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The registers that it brings. The VMM loads them into its hypervisor, too.
    pub fn registers(&self) -> &SavedVcpu {
        &self.shared.vcpus[self.index as usize]
    }

    /// Brings the vCPU's registers back (SET_VM with DONE) and waits for all the others, and
    /// for the confirmation where the VM has [`VmOptions::confirm`](crate::VmOptions::confirm)
    /// (WAIT_RUN). It returns when the vCPU may run, and not before, with the offsets that all
    /// vCPUs run with.
    ///
    /// Both requests go to the backend with one kick.
    ///
    /// After [`Error::TimedOut`] and [`Error::Apply`] it may be called again and goes on where it
    /// was.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] at the deadline. [`Error::Apply`], once, where the offsets were not
    /// applied: nobody runs before the next attempt. Any other error ends the restore if it is not
    /// complete yet: it is aborted, and this and every other vCPU get [`Error::Restore`], which
    /// names the first vCPU that failed. Where the [`Restore`](super::Restore) was dropped it is
    /// [`Status::Canceled`](crate::Status::Canceled), after a new restore
    /// [`Status::Stale`](crate::Status::Stale). The restore's time-out in ARMED is
    /// [`Status::TimedOut`](crate::Status::TimedOut), which ends nothing.
    pub fn run(&mut self, deadline: impl Into<Deadline>) -> Result<Run, Error> {
        let deadline = deadline.into();
        let brought = self.bring_back(By::Request, deadline);
        let ran = brought.and_then(|()| self.wait(deadline));
        self.outcome(ran)
    }

    /// As [`run`](Self::run), and waits by the time page
    /// ([`wait_run_by_page`](RequestQueue::wait_run_by_page)): all threads that do so share one
    /// WAIT_RUN. After [`Restore::bring_all_back`](super::Restore::bring_all_back) a vCPU makes no
    /// request of its own.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn run_by_page(&mut self, deadline: impl Into<Deadline>) -> Result<Offsets, Error> {
        let deadline = deadline.into();
        let brought = self.bring_back(By::Page, deadline);
        let ran = brought.and_then(|()| self.wait_by_page(deadline));
        self.outcome(ran)
    }

    /// Brings the vCPU's registers back, unless they are.
    fn bring_back(&mut self, by: By, deadline: Deadline) -> Result<(), Error> {
        let (shared, vcpu) = (&*self.shared, self.index);
        loop {
            self.step = match &mut self.step {
                Step::BringBack if shared.progress().done[vcpu as usize] => Step::Wait(None),
                Step::BringBack => {
                    let registers = &shared.vcpus[vcpu as usize];
                    let done = Operation::set_vm_done(std::slice::from_ref(registers));
                    let queue = shared.queue_of(vcpu);
                    let done = queue.submit_by(&done.in_epoch(shared.epoch), deadline)?;
                    // One kick for both. A WAIT_RUN whose vCPU is refused is answered with the
                    // restore's end, and releases nobody.
                    let run = match by {
                        By::Request => queue.submit(&wait_run(vcpu, shared)).ok(),
                        By::Page => None,
                    };
                    Step::BringingBack(done, run)
                }
                Step::BringingBack(done, run) => {
                    let Remaining(remaining) = done.wait_longer(deadline)?;
                    let this = vcpu as usize;
                    shared.are_done(this..=this, remaining);
                    Step::Wait(run.take())
                }
                Step::Wait(_) => return Ok(()),
            };
        }
    }

    /// Returns when the vCPU may run.
    fn wait(&mut self, deadline: Deadline) -> Result<Run, Error> {
        let in_flight = match &mut self.step {
            Step::Wait(run) => run.take(),
            _ => None,
        };
        let wait = wait_run(self.index, &self.shared);
        let ticket = match in_flight {
            Some(ticket) => ticket,
            None => self.queue().submit_by(&wait, deadline)?,
        };
        self.check()?;
        ticket.wait(deadline)
    }

    /// The same, by the time page.
    fn wait_by_page(&self, deadline: Deadline) -> Result<Offsets, Error> {
        let epoch = self.shared.epoch;
        self.queue()
            .wait_by_page_in(self.index, epoch, || self.check(), deadline)
    }

    /// Whether the vCPU may go on waiting, asked once its WAIT_RUN is submitted: what happens later
    /// ends the WAIT_RUN.
    fn check(&self) -> Result<(), Error> {
        let (session, epoch) = (self.queue().session(), self.shared.epoch);
        // A WAIT_RUN that comes after the abort would wait for the next RESUME and then run a vCPU
        // that was not restored.
        if session.history.was_aborted(epoch) {
            return Err(self.shared.canceled(self.index));
        }
        let recalled = session.history.recalled_since(self.recalled, epoch);
        match session.applying.failure().filter(|_| recalled) {
            Some(failure) => Err(failure.into()),
            None => Ok(()),
        }
    }

    fn queue(&self) -> &RequestQueue {
        self.shared.queue_of(self.index)
    }

    /// What the vCPU's thread gets, and what that means for the restore.
    fn outcome<T>(&mut self, ran: Result<T, Error>) -> Result<T, Error> {
        match ran {
            Err(late @ Error::TimedOut { .. }) => Err(late),
            Err(failure @ Error::Apply(_)) => {
                self.recalled = self.queue().session().history.recalled();
                Err(failure)
            }
            Err(error) => Err(self.shared.failed(self.index, error)),
            Ok(ran) => Ok(ran),
        }
    }
}

fn wait_run(vcpu: u32, shared: &Shared) -> Operation<'static, Run> {
    Operation::wait_run(vcpu).in_epoch(shared.epoch)
}

impl Drop for VcpuRestore {
    fn drop(&mut self) {
        let is_back = || self.shared.progress().done[self.index as usize];
        if !matches!(self.step, Step::Wait(_)) && !is_back() {
            self.shared.failed(self.index, Error::Abandoned);
        }
    }
}

impl std::fmt::Debug for VcpuRestore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuRestore")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}
