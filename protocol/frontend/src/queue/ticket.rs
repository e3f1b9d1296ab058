//! One request in flight: waiting for its answer, polling for it, abandoning it.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use super::Shared;
use super::locked::Locked;
use super::slots::{Await, Canceled, Stage};
use crate::operation::{Answer, OperationContext};
use crate::sys::signal;
use crate::{Deadline, Error, InvalidArgument, Operation};
use vhost_user_timer_protocol::Status;

/// Spins of a busy wait between two checks that the backend is still there.
const SPINS_PER_CHECK: u32 = 1024;

/// A request in flight.
///
/// Dropping it abandons the answer. Its slot is free again once the backend has answered.
#[must_use = "dropping a ticket abandons the answer"]
pub struct Ticket<T> {
    shared: Arc<Shared>,
    context: OperationContext,
    /// `None` once the answer is taken.
    slot: Option<u16>,
    answer: PhantomData<fn() -> T>,
}

impl<T> Ticket<T> {
    pub(super) fn new(shared: Arc<Shared>, operation: &Operation<'_, T>, slot: u16) -> Self {
        Ticket {
            shared,
            context: operation.context(),
            slot: Some(slot),
            answer: PhantomData,
        }
    }
}

impl<T: Answer> Ticket<T> {
    /// Waits for the answer. Kicks first.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] by the backend, [`Error::TimedOut`], or the error that ended the queue.
    pub fn wait(mut self, deadline: impl Into<Deadline>) -> Result<T, Error> {
        self.wait_longer(deadline.into())
    }

    /// As [`wait`](Self::wait); after a time-out it may be called again.
    pub(crate) fn wait_longer(&mut self, deadline: Deadline) -> Result<T, Error> {
        let shared = self.shared.clone();
        shared.kick();
        let slot = self.open_slot()?;
        let state = shared.wait(Await::Slot(slot), self.context.name(), deadline)?;
        self.take(&shared, state, slot)
            .unwrap_or(Err(InvalidArgument::SpentTicket.into()))
    }

    /// The answer, if there is one. It makes no system call, unless the backend needs a kick. It
    /// does not notice a lost connection, and so never reconnects.
    ///
    /// After an answer or a refusal the ticket is spent.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] by the backend, the error that ended the queue, or
    /// [`Error::InvalidArgument`] for a spent ticket.
    pub fn try_wait(&mut self) -> Result<Option<T>, Error> {
        let slot = self.open_slot()?;
        let shared = self.shared.clone();
        let mut state = shared.lock();
        if state.ring.unpublished() > 0 && state.publish() {
            signal(&shared.kick);
        }
        shared.reap(&mut state);
        let failure = state.failure;
        match self.take(&shared, state, slot) {
            Some(answer) => answer.map(Some),
            None => failure.map_or(Ok(None), |failure| Err(failure.into())),
        }
    }

    /// Waits without sleeping: the fastest way to an answer, at the price of a CPU.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn spin(mut self, deadline: impl Into<Deadline>) -> Result<T, Error> {
        let deadline = deadline.into();
        let shared = self.shared.clone();
        loop {
            // Read the index before the look: a later answer changes it.
            let mut seen = shared.used_index();
            if let Some(answer) = self.try_wait()? {
                return Ok(answer);
            }
            for _ in 0..SPINS_PER_CHECK {
                std::hint::spin_loop();
                let now = shared.used_index();
                if std::mem::replace(&mut seen, now) != now
                    && let Some(answer) = self.try_wait()?
                {
                    return Ok(answer);
                }
            }
            let session = &self.shared.session;
            let generation = session.generation();
            let failure = session.watch.failure()?;
            let failure =
                failure.and_then(|failure| session.outlive(failure, generation, deadline));
            if let Some(failure) = failure {
                let mut state = self.shared.lock();
                self.shared.reap(&mut state);
                self.shared.fail(&mut state, failure);
            } else if deadline.has_passed() {
                return Err(Error::TimedOut {
                    what: self.context.name(),
                });
            }
        }
    }

    fn open_slot(&self) -> Result<u16, Error> {
        self.slot
            .ok_or(Error::InvalidArgument(InvalidArgument::SpentTicket))
    }

    /// The answer, if the slot has one.
    fn take(
        &mut self,
        shared: &Shared,
        mut state: Locked<'_>,
        slot: u16,
    ) -> Option<Result<T, Error>> {
        match (state.slot(slot).stage, state.slot(slot).canceled) {
            (Stage::Done { len }, _) => {
                self.slot = None;
                Some(shared.take(state, slot, len, &self.context))
            }
            (Stage::InFlight, Some(canceled)) => {
                self.slot = None;
                // The backend still has it.
                state.orphan(slot);
                let session = &shared.session;
                let failure = match canceled {
                    Canceled::Aborted => None,
                    Canceled::Recalled => session.applying.failure().map(Error::Apply),
                };
                Some(Err(failure.unwrap_or_else(|| {
                    let epoch = session.history.epoch();
                    self.context.refused(Status::Canceled, epoch).into()
                })))
            }
            _ => None,
        }
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        let Some(slot) = self.slot else {
            return;
        };
        let mut state = self.shared.lock();
        match state.slot(slot).stage {
            Stage::InFlight => state.orphan(slot),
            Stage::Done { .. } => self.shared.free(&mut state, slot),
            Stage::Free | Stage::Orphaned => {}
        }
    }
}

impl<T> fmt::Debug for Ticket<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("op", &self.context.op)
            .field("vcpu", &self.context.vcpu)
            .finish_non_exhaustive()
    }
}
