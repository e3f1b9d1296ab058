//! The last metre: the VM's offsets go into the hypervisor, and nobody runs before that.
//!
//! In a VM with CONFIRM, RESUME and the end of a restore lead to ARMED: the offsets are decided,
//! and every vCPU still waits. The thread whose [`Turn`] it is applies them, by the caller's
//! closure, and says CONFIRM_RUN.

use std::sync::Arc;

use crate::session::Session;
use crate::turn::{ApplyError, ApplyFailure, Turn};
use crate::{
    Deadline, Error, Frontend, Info, InvalidArgument, Operation, OtherCounter, Refusal,
    RequestQueue, Run,
};
use vhost_user_timer_protocol::{Phase, Status};

impl Frontend {
    /// RESUME, `apply`, CONFIRM_RUN: lets the time of a VM with
    /// [`confirm`](crate::VmOptions::confirm) go on, and lets its vCPUs run once its offsets are
    /// where the guest's counter is made. Returns CONFIRM_RUN's answer, which is also what every
    /// waiting vCPU gets.
    ///
    /// `apply` gets the ARMED VM's GET_INFO and puts its offsets into the hypervisor. It is called
    /// once for each ARMED: not again where only the confirmation was lost, or is late, and not in
    /// RUNNING. It must not call PAUSE, RESUME, RESTORE_BEGIN, RESTORE_ABORT or CONFIRM_RUN: they
    /// wait for it, on every thread of this frontend.
    ///
    /// # Errors
    ///
    /// [`Error::Apply`] with the error of `apply`: nobody runs, the VM stays ARMED, and every vCPU
    /// that waits gets the same. Call this again to try again; PAUSE ends the ARMED. Without a call
    /// of `apply`, its cause is an [`OtherCounter`] where the backend does not count by
    /// [`Options::host_counter`](crate::Options::host_counter). [`InvalidArgument::WithoutConfirm`]
    /// for a VM that would run without confirmation: nothing happens. [`Error::Refused`] with EBUSY
    /// where another thread paused the VM meanwhile; [`Error::TimedOut`]; or what ended the queue.
    pub fn resume_with(
        &self,
        deadline: impl Into<Deadline>,
        apply: impl FnOnce(&Info) -> Result<(), ApplyError>,
    ) -> Result<Run, Error> {
        let deadline = deadline.into();
        if !self.queue().info(deadline)?.confirm {
            return Err(InvalidArgument::WithoutConfirm.into());
        }
        self.queue().resume(deadline)?;
        confirm(self.queues(), None, deadline, apply)
    }
}

/// Applies the offsets of the ARMED VM, in this epoch if one is given, and confirms them. A VM that
/// is RUNNING was confirmed before.
pub(crate) fn confirm(
    queues: &[RequestQueue],
    epoch: Option<u64>,
    deadline: Deadline,
    apply: impl FnOnce(&Info) -> Result<(), ApplyError>,
) -> Result<Run, Error> {
    let session = queues[0].session();
    let turn = session.applying.turn(deadline)?;
    let info = settled(queues, deadline)?;
    let confirmed = confirm_in_turn(&turn, queues, &info, epoch, deadline, apply);
    confirmed.map_err(|error| session.not_applied(&turn, info.epoch, error))
}

fn confirm_in_turn(
    turn: &Turn<'_>,
    queues: &[RequestQueue],
    info: &Info,
    epoch: Option<u64>,
    deadline: Deadline,
    apply: impl FnOnce(&Info) -> Result<(), ApplyError>,
) -> Result<Run, Error> {
    if !info.confirm {
        return Err(InvalidArgument::WithoutConfirm.into());
    }
    let confirm = Operation::confirm_run(info.cntvoff, info.cntpoff).in_epoch(info.epoch);
    // As the backend would refuse it.
    let refused = |status, detail| {
        let refusal = confirm.context().refused(status, info.epoch);
        Error::Refused(Refusal { detail, ..refusal })
    };
    if epoch.is_some_and(|epoch| epoch != info.epoch) {
        return Err(refused(Status::Stale, 0));
    }
    match info.phase {
        Phase::Armed => {
            let same = queues[0].session().check_counter(info);
            same.map_err(|other| ApplyFailure {
                cause: Arc::new(other),
            })?;
            turn.apply_once(info, apply)?;
        }
        Phase::Running => {}
        phase => return Err(refused(Status::Busy, phase.code())),
    }
    queues[0].perform(&confirm, deadline)
}

/// The VM, once everything that was sent before is carried out: the requests of one queue are, in
/// their order. What would end an ARMED waits, so from here on the VM's phase and offsets stay.
fn settled(queues: &[RequestQueue], deadline: Deadline) -> Result<Info, Error> {
    let ask = |queue: &RequestQueue| queue.submit_by(&Operation::get_info(), deadline);
    let asked: Vec<_> = queues.iter().map(ask).collect::<Result<_, _>>()?;
    queues.iter().for_each(RequestQueue::kick);
    let mut info = None;
    for ticket in asked {
        info = Some(ticket.wait(deadline)?);
    }
    match info {
        Some(info) if queues.len() == 1 => Ok(info),
        // One queue's answer may be older than what another queue's request did.
        _ => queues[0].info(deadline),
    }
}

impl Session {
    /// Wakes the vCPUs that wait in this epoch with the reason why they do not run. The caller gets
    /// the error itself.
    fn not_applied(&self, turn: &Turn<'_>, epoch: u64, error: Error) -> Error {
        let (failure, error) = match error {
            Error::Apply(failure) => (failure.clone(), Error::Apply(failure)),
            // The confirmation may come, or each waiting thread learns this by itself.
            late @ Error::TimedOut { .. } => return late,
            end if end.ends_queue() => return end,
            error => {
                let text = crate::error::chain(&error);
                let cause = ApplyError::from(text).into();
                (ApplyFailure { cause }, error)
            }
        };
        turn.failed(failure);
        self.history.recall(epoch);
        self.wake_waiters();
        error
    }

    /// Whether the backend counts by what the caller expects.
    pub(crate) fn check_counter(&self, info: &Info) -> Result<(), OtherCounter> {
        match self.host_counter {
            Some(expected) => OtherCounter::check(expected, info),
            None => Ok(()),
        }
    }
}
