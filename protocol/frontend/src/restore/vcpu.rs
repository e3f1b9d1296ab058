//! One vCPU's part of a restore, on the thread that is that vCPU.

use std::sync::Arc;

use super::Shared;
use crate::{Deadline, Error, Operation, Remaining, RequestQueue, Run, SavedVcpu, Ticket};
use vhost_user_timer_protocol::Status;

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
}

/// What is next.
enum Step {
    Stage,
    /// SET_VM is in flight.
    Staging(Ticket<()>),
    Complete,
    /// RESTORE_DONE is in flight.
    Completing(Ticket<Remaining>),
    /// The vCPU has its registers back.
    Wait,
}

impl VcpuRestore {
    pub(super) fn new(shared: Arc<Shared>, index: u32) -> Self {
        VcpuRestore {
            shared,
            index,
            step: Step::Stage,
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

    /// Brings the vCPU's registers back and waits until it may run: stages them (SET_VM), says
    /// RESTORE_DONE, and waits for all the others (WAIT_RUN). It returns when the vCPU may run,
    /// and not before, with the offsets that all vCPUs run with.
    ///
    /// After [`Error::TimedOut`] it may be called again and goes on where it was.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] at the deadline. Any other error ends the restore if it is not complete
    /// yet: it is aborted, and this and every other vCPU get [`Error::Restore`], which names the
    /// first vCPU that failed. Where the [`Restore`](super::Restore) was dropped it is
    /// [`Status::Canceled`], after a new restore [`Status::Stale`].
    pub fn run(&mut self, deadline: impl Into<Deadline>) -> Result<Run, Error> {
        match self.advance(deadline.into()) {
            Err(late @ Error::TimedOut { .. }) => Err(late),
            Err(error) => Err(self.shared.failed(self.index, error)),
            Ok(run) => Ok(run),
        }
    }

    fn advance(&mut self, deadline: Deadline) -> Result<Run, Error> {
        let (vcpu, epoch) = (self.index, self.shared.epoch);
        let queue = self.shared.queue_of(vcpu);
        loop {
            self.step = match &mut self.step {
                Step::Stage => {
                    let registers = &self.shared.vcpus[vcpu as usize];
                    let stage = Operation::set_vm(std::slice::from_ref(registers));
                    Step::Staging(queue.submit_by(&stage.in_epoch(epoch), deadline)?)
                }
                // Not pipelined: after a refused SET_VM there must be no RESTORE_DONE.
                Step::Staging(ticket) => {
                    ticket.wait_longer(deadline)?;
                    Step::Complete
                }
                Step::Complete => {
                    let done = Operation::restore_done(vcpu).in_epoch(epoch);
                    Step::Completing(queue.submit_by(&done, deadline)?)
                }
                Step::Completing(ticket) => {
                    let Remaining(remaining) = ticket.wait_longer(deadline)?;
                    self.shared.is_done(vcpu, remaining);
                    Step::Wait
                }
                Step::Wait => return wait_at_the_gate(queue, vcpu, epoch, deadline),
            };
        }
    }
}

/// Returns when the vCPU may run. Here the decision about the offsets has arrived and the vCPU
/// does not run yet, on each thread of the restore, and nowhere else.
fn wait_at_the_gate(
    queue: &RequestQueue,
    vcpu: u32,
    epoch: u64,
    deadline: Deadline,
) -> Result<Run, Error> {
    let wait = Operation::wait_run(vcpu).in_epoch(epoch);
    let ticket = queue.submit_by(&wait, deadline)?;
    // A WAIT_RUN that comes after the abort would wait for the next RESUME and then run a vCPU that
    // was not restored. One that was submitted before is canceled with it.
    if queue.session().history.was_aborted(epoch) {
        let context = wait.context();
        return Err(context.refused(Status::Canceled, epoch).into());
    }
    ticket.wait(deadline)
}

impl Drop for VcpuRestore {
    fn drop(&mut self) {
        if !matches!(self.step, Step::Wait) {
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
