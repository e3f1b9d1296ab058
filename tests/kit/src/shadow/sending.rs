//! Requests over the frontend's library, and what became of them.

use vhost_user_timer_frontend::{Error, Operation, RawAnswer, RequestQueue, Ticket};
use vhost_user_timer_protocol::Op;
use vhost_user_timer_reference::Ask;

/// What became of a request that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done: the answer's body.
    Done(Vec<u8>),
    /// It was refused: status and detail.
    Refused(u32, u32),
}

/// Puts a request on a queue, without a kick.
///
/// # Errors
///
/// Those of [`RequestQueue::submit`].
pub fn submit(queue: &RequestQueue, ask: &Ask) -> Result<Ticket<RawAnswer>, Error> {
    let operation = Operation::raw(Op::from(ask.op), ask.vcpu, &ask.body, ask.answer_len());
    queue.submit(&operation.in_epoch(ask.epoch).with_flags(ask.flags))
}

/// What a ticket gave; `None` if the backend is gone without an answer.
///
/// # Errors
///
/// Any other failure.
pub fn outcome(given: Result<RawAnswer, Error>) -> Result<Option<Outcome>, Error> {
    match given {
        Ok(RawAnswer(body)) => Ok(Some(Outcome::Done(body))),
        Err(Error::Refused(refusal)) => Ok(Some(Outcome::Refused(
            refusal.status.errno(),
            refusal.detail,
        ))),
        Err(Error::Disconnected) => Ok(None),
        Err(error) => Err(error),
    }
}
