//! A request queue: many threads, one ring.
//!
//! Guarantees:
//!
//! - Each answer goes to the thread that asked, in whatever order the backend answers.
//! - A waiting thread is woken by its own answer, its deadline, or the queue's end, and rarely by
//!   anything else (a thread in WAIT_RUN, by any answer to a WAIT_RUN).
//! - Small requests allocate nothing.
//! - WAIT_RUNs, however many, never keep another request out.
//!
//! One waiting thread at a time leads: it sleeps on the call eventfd and hands the other threads
//! their answers. The followers sleep on condition variables: one per slot, and one for all
//! WAIT_RUNs. A leader that leaves appoints the next. The library has no thread of its own.
//!
//! A request that its caller abandons stays with the backend, and keeps its slot, until it is
//! answered: the wire has no cancelling. An abandoned WAIT_RUN is taken over by the next one for
//! the same vCPU, so a vCPU thread can wait in short turns.

mod blocking;
mod layout;
mod locked;
mod reconnect;
mod slots;
mod submit;
mod ticket;
mod waiting;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use zerocopy::FromBytes;

use crate::error::{Failure, Fault};
use crate::operation::{Answer, HEADER, OperationContext, Rejection};
use crate::replay::Verdict;
use crate::ring::{self, DESCRIPTOR, DriverRing};
use crate::session::{Session, Survivor};
use crate::sys::{drain, eventfd, signal};
use crate::wait::Deadline;
use crate::wait_set::WaitSet;
use crate::{Error, Operation};
use locked::Locked;
use slots::{Canceled, Stage, State};
use vhost_user_timer_protocol::wire::{self, ResponseHeader};
use vhost_user_timer_protocol::{Op, Status};

pub(crate) use layout::QueueLayout;
pub use ticket::Ticket;

/// Bytes of a slot's own request buffer, and of its response buffer. Longer messages use the
/// queue's one large pair of buffers.
const SMALL: usize = 512;

/// Descriptors of a request: one that the device reads, one that it writes.
const CHAIN: u16 = 2;

/// A request queue, which any number of threads can clone and use.
///
/// Every operation is a method that waits, and an [`Operation`] for [`submit`](Self::submit). That
/// returns a [`Ticket`], which a caller waits for, polls, or is told of by the queue's descriptor
/// ([`AsFd`]).
///
/// Some errors end the queue ([`Error::ends_queue`]): every request in flight and every later one
/// fails with the same error.
#[derive(Clone)]
pub struct RequestQueue {
    pub(crate) shared: Arc<Shared>,
}

/// What a queue's users share.
pub(crate) struct Shared {
    index: u16,
    session: Arc<Session>,
    layout: QueueLayout,
    call: OwnedFd,
    /// Where a leader sleeps.
    wait_set: WaitSet,
    kick: OwnedFd,
    state: Mutex<State>,
    /// By slot: notified when its request is answered, or its waiter is to lead.
    done: Box<[Condvar]>,
    /// The same for all WAIT_RUNs, which are mostly answered together: one system call wakes them.
    runs: Condvar,
    /// By [`Need`]: notified when there may be room again, or a waiter is to lead.
    room: [Condvar; 3],
}

impl RequestQueue {
    pub(crate) fn new(
        index: u16,
        session: Arc<Session>,
        layout: QueueLayout,
    ) -> Result<Self, Error> {
        let memory = &session.memory;
        let event_idx = session.negotiated.event_idx();
        let ring = DriverRing::new(memory.clone(), layout.ring, event_idx, 0);
        let slots = layout.slots();
        if let Some(tables) = layout.tables {
            let len = DESCRIPTOR * usize::from(CHAIN);
            for slot in 0..slots {
                let table = memory.address(tables + usize::from(slot) * len);
                let descriptor = ring::descriptor(table, len as u32, ring::INDIRECT, 0);
                memory.write(ring.descriptor(slot), &descriptor);
            }
        }
        let call = eventfd()?;
        Ok(RequestQueue {
            shared: Arc::new(Shared {
                index,
                wait_set: WaitSet::new(&session.watch, call.as_fd())?,
                session,
                layout,
                call,
                kick: eventfd()?,
                state: Mutex::new(State::new(ring, slots)),
                done: (0..slots).map(|_| Condvar::new()).collect(),
                runs: Condvar::new(),
                room: Default::default(),
            }),
        })
    }

    pub(crate) fn survivor(&self) -> Weak<dyn Survivor> {
        Arc::<Shared>::downgrade(&self.shared)
    }

    /// The virtqueue's index, from 1.
    pub fn index(&self) -> u16 {
        self.shared.index
    }

    /// How many requests can be in flight at once. Three quarters of them can be WAIT_RUNs.
    pub fn capacity(&self) -> usize {
        self.shared.done.len()
    }

    /// Notifies the backend whether or not it asked for that: it may have missed a notification
    /// while the ring was disabled.
    pub(crate) fn force_kick(&self) {
        signal(&self.shared.kick);
    }

    /// Submits an operation, after waiting for room if need be, and waits for its answer until the
    /// deadline.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] by the backend, [`Error::TimedOut`], [`Error::InvalidArgument`], or the
    /// error that ended the queue.
    pub fn perform<T: Answer>(
        &self,
        operation: &Operation<'_, T>,
        deadline: impl Into<Deadline>,
    ) -> Result<T, Error> {
        let deadline = deadline.into();
        self.submit_by(operation, deadline)?.wait(deadline)
    }

    /// Puts an operation on the ring without notifying the backend; [`kick`](Self::kick) does that
    /// for any number of them.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`], [`Error::InvalidArgument`], or the error that ended the queue.
    pub fn submit<T: Answer>(&self, operation: &Operation<'_, T>) -> Result<Ticket<T>, Error> {
        let slot = self.shared.start(operation, None)?;
        Ok(Ticket::new(self.shared.clone(), operation, slot))
    }

    /// As [`submit`](Self::submit), and waits for room until the deadline.
    pub(crate) fn submit_by<T: Answer>(
        &self,
        operation: &Operation<'_, T>,
        deadline: Deadline,
    ) -> Result<Ticket<T>, Error> {
        let slot = self.shared.start(operation, Some(deadline))?;
        Ok(Ticket::new(self.shared.clone(), operation, slot))
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.shared.session
    }

    /// Makes everything submitted available to the backend, and notifies it if it asked for that.
    pub fn kick(&self) {
        self.shared.kick();
    }

    /// Kicks, takes the answers that have come, for [`Ticket::try_wait`], and makes the queue's
    /// descriptor report the next answer.
    ///
    /// An event loop calls this when the descriptor ([`AsFd`]) is readable, and once before it
    /// first sleeps. It reads the descriptor; the caller must not. A blocking wait on the same
    /// queue takes the descriptor's reports, so an event loop should have a queue of its own. The
    /// descriptor does not report a dead backend: watch the one of [`Frontend`](crate::Frontend)
    /// for that.
    ///
    /// It never blocks, and so never reconnects; see
    /// [`keep_connected`](crate::Frontend::keep_connected). The descriptor stays the same over
    /// reconnects.
    ///
    /// # Errors
    ///
    /// The error that ended the queue. Tickets that were answered before can still be tried.
    pub fn process(&self) -> Result<(), Error> {
        let shared = &*self.shared;
        shared.kick();
        let generation = shared.session.generation();
        // A thread that can wait reconnects, unless it is too late for that.
        let now = Duration::ZERO.into();
        let failure = shared.session.watch.failure()?;
        let failure = failure.and_then(|failure| shared.session.outlive(failure, generation, now));
        let mut state = shared.lock();
        // Before the look at the ring: a later answer makes the descriptor readable again. A leader
        // may miss a call by this.
        drain(&shared.call);
        loop {
            shared.reap(&mut state);
            if state.failure.is_some() || !state.ring.arm() {
                break;
            }
        }
        if let Some(failure) = failure {
            shared.fail(&mut state, failure);
        }
        shared.call_leader(&state);
        state.failure.map_or(Ok(()), |failure| Err(failure.into()))
    }
}

impl AsFd for RequestQueue {
    /// The call eventfd: readable when there may be answers. See
    /// [`process`](RequestQueue::process).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.call.as_fd()
    }
}

impl fmt::Debug for RequestQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestQueue")
            .field("index", &self.shared.index)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// How many answers the backend has given, modulo 2^16. Takes no lock.
    fn used_index(&self) -> u16 {
        let index = self.session.memory.atomic(self.layout.ring.used_idx());
        u16::from_le(index.load(Ordering::Acquire))
    }

    fn kick(&self) {
        let wanted = self.lock().publish();
        // Outside the lock: the system call wakes the backend.
        if wanted {
            signal(&self.kick);
        }
    }

    /// Takes the used chains off the ring.
    fn reap(&self, state: &mut State) {
        while state.failure.is_none() {
            match state.ring.pop() {
                Ok(Some(used)) => {
                    let slot = used.head / self.layout.descriptors_per_slot();
                    self.complete(state, slot, used.len);
                }
                Ok(None) => break,
                Err(fault) => self.fault(state, fault.into()),
            }
        }
        self.cancel_overtaken(state);
    }

    /// Answers the WAIT_RUNs that a RESTORE_ABORT has overtaken, and those of threads that are
    /// recalled.
    fn cancel_overtaken(&self, state: &mut State) {
        let history = &self.session.history;
        let cancels = (history.aborted(), history.recalled());
        if std::mem::replace(&mut state.cancels, cancels) == cancels {
            return;
        }
        for (n, slot) in (0..).zip(&mut state.slots) {
            let Some(intent) = slot.intent.filter(|_| slot.stage == Stage::InFlight) else {
                continue;
            };
            let canceled = match &intent {
                intent if history.was_overtaken(intent) => Canceled::Aborted,
                intent if history.was_recalled(intent) => Canceled::Recalled,
                _ => continue,
            };
            slot.canceled = Some(canceled);
            if slot.followed {
                state.wakes.add(n, true);
            }
        }
    }

    fn complete(&self, state: &mut State, slot: u16, len: u32) {
        let entry = *state.slot(slot);
        let orphaned = match entry.stage {
            Stage::InFlight => false,
            Stage::Orphaned => true,
            // The ring returns only heads that were posted.
            Stage::Free | Stage::Done { .. } => return,
        };
        self.learn(state, slot, len, orphaned);
        if orphaned {
            self.free(state, slot);
            return;
        }
        state.slot(slot).stage = Stage::Done { len };
        if entry.followed {
            state.wakes.add(slot, entry.wait_run.is_some());
        }
    }

    /// Learns from an answer what concerns more than its request.
    fn learn(&self, state: &mut State, slot: u16, len: u32, orphaned: bool) {
        let &mut slots::Slot { large, intent, .. } = state.slot(slot);
        let Some(kind) = intent.map(|intent| intent.kind) else {
            return;
        };
        let op = kind.op;
        state.begins -= u16::from(op == Op::RestoreBegin && state.begins > 0);
        let session = &self.session;
        if !session.answered.load(Ordering::Relaxed) {
            session.answered.store(true, Ordering::Relaxed);
        }
        let mut bytes = [0; HEADER + size_of::<wire::SetRegsDone>()];
        let (_, at) = self.layout.buffers(slot, large);
        let len = bytes.len().min(len as usize);
        session.memory.read(at, &mut bytes[..len]);
        let Ok((header, body)) = ResponseHeader::ref_from_prefix(&bytes[..len]) else {
            return;
        };
        let status = Status::from(header.status.get());
        // The last of three numbers, or the first of two.
        let remaining = match op {
            Op::SetRegs => wire::SetRegsDone::ref_from_prefix(body)
                .ok()
                .map(|(answer, _)| answer.remaining),
            _ => wire::RestoreDoneResult::ref_from_prefix(body)
                .ok()
                .map(|(answer, _)| answer.remaining),
        };
        let remaining = remaining.map(|remaining| remaining.get());
        session
            .history
            .learn(kind, status, header.epoch.get(), remaining);
        if op == Op::RestoreAbort && status == Status::Ok {
            session.wake_waiters();
        }
        if orphaned && op == Op::SetTimePage && status != Status::Ok {
            session.page.invalidate();
        }
    }

    fn free(&self, state: &mut State, slot: u16) {
        state.free(slot);
        self.offer_room(state);
    }

    fn fault(&self, state: &mut State, fault: Fault) {
        let queue = self.index;
        self.fail(state, Failure::Protocol { queue, fault });
    }

    /// Takes a slot's answer and frees the slot.
    fn take<T: Answer>(
        &self,
        mut state: Locked<'_>,
        slot: u16,
        len: u32,
        context: &OperationContext,
    ) -> Result<T, Error> {
        let &mut slots::Slot { large, intent, .. } = state.slot(slot);
        let (_, at) = self.layout.buffers(slot, large);
        // The ring bounds it by the room that was posted.
        let len = len as usize;
        let mut small = [0; SMALL];
        let mut heap = Vec::new();
        let bytes = match small.get_mut(..len) {
            Some(bytes) => bytes,
            None => {
                heap.resize(len, 0);
                &mut heap[..]
            }
        };
        self.session.memory.read(at, bytes);
        self.free(&mut state, slot);
        let history = &self.session.history;
        let judge =
            |status| intent.map_or(Verdict::Refused, |intent| history.judge(&intent, status));
        let answer = match context.parse(bytes) {
            Err(Rejection::Refused(refusal)) => match judge(refusal.status) {
                Verdict::Refused => Err(Rejection::Refused(refusal)),
                Verdict::Done => context.parse_done(),
                Verdict::Uncertain => return Err(Error::Uncertain(refusal)),
            },
            answer => answer,
        };
        answer.map_err(|reply| match reply {
            Rejection::Refused(refusal) => refusal.into(),
            Rejection::Version(version) => {
                self.fail(&mut state, Failure::Version(version));
                Error::Version(version)
            }
            Rejection::Fault(fault) => {
                self.fault(&mut state, fault);
                Error::Protocol {
                    queue: self.index,
                    fault,
                }
            }
        })
    }
}
