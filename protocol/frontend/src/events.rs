//! The event queue, as a stream.
//!
//! The library posts all buffers, and posts them again, in batches, once their events are read.
//! While no buffer is posted the backend keeps its events, so none is lost.
//!
//! Over a reconnect each event arrives at least once. Events that were written but not read stay in
//! their buffers, which are posted on the new connection only once they are read; and the backend
//! reports every high line again (SPEC.md, "Events").

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use zerocopy::FromBytes;

use crate::connection::VringSetup;
use crate::error::{Failure, Fault};
use crate::memory::Layout;
use crate::replay::Recovered;
use crate::ring::{self, DriverRing, RingLayout, Used};
use crate::session::{Session, Survivor};
use crate::sys::{drain, eventfd, lock, signal};
use crate::wait::{Deadline, Woken};
use crate::wait_set::WaitSet;
use crate::{Error, Timer};
use vhost_user_timer_protocol::{EVENT_QUEUE, Phase, wire};

const EVENT: usize = size_of::<wire::Event>();

/// Something that happened in the VM's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A timer's line rose as time passed, or was high at the change to RUNNING.
    TimerAsserted {
        /// The vCPU's index, as the backend gave it.
        vcpu: u32,
        /// Which timer.
        timer: Timer,
        /// The timer's compare value.
        cval: u64,
        /// The timer's count when the event was written.
        count: u64,
        /// The VM's epoch.
        epoch: u64,
    },
    /// The VM's phase changed.
    PhaseChanged {
        /// The new phase.
        phase: Phase,
        /// The virtual count when the event was written.
        count: u64,
        /// The VM's epoch.
        epoch: u64,
    },
    /// An event that this version does not know.
    Unknown {
        /// The event's kind.
        kind: u16,
        /// All of the event's bytes (SPEC.md, "Events").
        bytes: [u8; size_of::<wire::Event>()],
    },
}

impl Event {
    fn parse(event: &wire::Event) -> Self {
        let timer = match event.timer.get() {
            wire::TIMER_VIRTUAL => Some(Timer::Virtual),
            wire::TIMER_PHYSICAL => Some(Timer::Physical),
            _ => None,
        };
        let phase = Phase::from_code(event.vcpu.get());
        let (count, epoch) = (event.count.get(), event.epoch.get());
        match (event.kind.get(), timer, phase) {
            (wire::EVENT_TIMER_ASSERTED, Some(timer), _) => Event::TimerAsserted {
                vcpu: event.vcpu.get(),
                timer,
                cval: event.cval.get(),
                count,
                epoch,
            },
            (wire::EVENT_PHASE_CHANGED, _, Some(phase)) => Event::PhaseChanged {
                phase,
                count,
                epoch,
            },
            _ => Event::Unknown {
                kind: event.kind.get(),
                bytes: zerocopy::transmute!(*event),
            },
        }
    }
}

/// The VM's events, in the order in which the backend wrote them.
///
/// A thread of its own calls [`next`](Self::next). An event loop watches the descriptor
/// ([`AsFd`]: readable when there may be events) and calls [`try_next`](Self::try_next) until it
/// returns `None`; also once before it first sleeps. The descriptor stays the same over reconnects.
/// After a reconnect an event may arrive a second time.
pub struct EventStream {
    queue: Arc<EventQueue>,
}

/// The event queue. Every connection has it, whether events are read or not.
pub(crate) struct EventQueue {
    session: Arc<Session>,
    layout: EventLayout,
    call: OwnedFd,
    /// Where a thread that waits for an event sleeps.
    wait_set: WaitSet,
    kick: OwnedFd,
    state: Mutex<State>,
}

struct State {
    ring: DriverRing,
    /// Events of previous connections.
    unread: VecDeque<Used>,
    failure: Option<Failure>,
}

/// Where the event queue's ring and buffers are.
pub(crate) struct EventLayout {
    ring: RingLayout,
    buffers: usize,
}

impl EventLayout {
    pub(crate) fn reserve(layout: &mut Layout, size: u16) -> Self {
        EventLayout {
            ring: RingLayout::reserve(layout, size),
            buffers: layout.reserve(usize::from(size) * EVENT, 64),
        }
    }

    fn buffer(&self, head: u16) -> usize {
        self.buffers + EVENT * usize::from(head)
    }
}

impl EventQueue {
    /// Posts all buffers. The backend is not notified: it does not have the ring yet.
    pub(crate) fn new(session: Arc<Session>, layout: EventLayout) -> Result<Self, Error> {
        let memory = &session.memory;
        let event_idx = session.negotiated.event_idx();
        let ring = DriverRing::new(memory.clone(), layout.ring, event_idx, 0);
        for head in 0..layout.ring.size {
            let buffer = memory.address(layout.buffer(head));
            let descriptor = ring::descriptor(buffer, EVENT as u32, ring::WRITE, 0);
            memory.write(ring.descriptor(head), &descriptor);
        }
        let call = eventfd()?;
        let queue = EventQueue {
            wait_set: WaitSet::new(&session.watch, call.as_fd())?,
            session,
            layout,
            call,
            kick: eventfd()?,
            state: Mutex::new(State {
                ring,
                unread: VecDeque::new(),
                failure: None,
            }),
        };
        queue.post_all();
        Ok(queue)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Notifies the backend whether or not it asked to be notified.
    pub(crate) fn force_kick(&self) {
        signal(&self.kick);
    }

    /// Keeps the events that were written, and posts all other buffers on an empty ring.
    fn post_all(&self) {
        let mut state = self.lock();
        let State {
            ring,
            unread,
            failure,
        } = &mut *state;
        loop {
            match ring.pop() {
                Ok(Some(used)) => unread.push_back(used),
                Ok(None) => break,
                Err(broken) => {
                    failure.get_or_insert(fault(broken.into()));
                    break;
                }
            }
        }
        ring.restart(0);
        for head in 0..self.layout.ring.size {
            if unread.iter().all(|used| used.head != head) {
                ring.push(head, EVENT as u32);
            }
        }
        ring.publish();
        // The descriptor becomes readable even if the backend serves the ring before anyone waits.
        let _ = ring.arm();
    }

    fn fail(&self, failure: Failure) -> Error {
        (*self.lock().failure.get_or_insert(failure)).into()
    }

    fn pop(&self) -> Result<Option<Event>, Error> {
        let mut state = self.lock();
        if let Some(failure) = state.failure {
            return Err(failure.into());
        }
        let used = match state.unread.pop_front() {
            Some(used) => used,
            None => match state.ring.pop() {
                Ok(Some(used)) => used,
                Ok(None) => return Ok(None),
                Err(broken) => {
                    drop(state);
                    return Err(self.fail(fault(broken.into())));
                }
            },
        };
        let mut bytes = [0; EVENT];
        let buffer = self.layout.buffer(used.head);
        self.session.memory.read(buffer, &mut bytes);
        state.ring.push(used.head, EVENT as u32);
        if state.ring.unpublished() >= self.layout.ring.size / 2 {
            self.repost(&mut state);
        }
        drop(state);
        match wire::Event::ref_from_bytes(&bytes) {
            Ok(event) if used.len as usize == EVENT => Ok(Some(Event::parse(event))),
            _ => Err(self.fail(fault(Fault::EventLength { len: used.len }))),
        }
    }

    fn repost(&self, state: &mut State) {
        if state.ring.publish() {
            signal(&self.kick);
        }
    }

    /// Posts the buffers that were read, and asks to be called at the next event. Returns whether
    /// there is one already.
    fn arm(&self) -> bool {
        let mut state = self.lock();
        self.repost(&mut state);
        // A reconnect in between may have kept events.
        state.ring.arm() || !state.unread.is_empty()
    }
}

impl Survivor for EventQueue {
    /// Keeps the events that were written but not read.
    fn refill(&self, _recovered: &Recovered) {
        self.post_all();
    }

    fn vring(&self) -> VringSetup<'_> {
        VringSetup {
            index: EVENT_QUEUE,
            layout: self.layout.ring,
            call: &self.call,
            kick: &self.kick,
        }
    }

    fn resume_service(&self) {
        signal(&self.kick);
        // As for a request queue: the previous backend may have filled it up.
        drain(&self.call);
        signal(&self.call);
    }
}

fn fault(fault: Fault) -> Failure {
    Failure::Protocol {
        queue: EVENT_QUEUE,
        fault,
    }
}

impl EventStream {
    pub(crate) fn new(queue: Arc<EventQueue>) -> Self {
        EventStream { queue }
    }

    /// The next event, if there is one. If there is none, the descriptor reports the next one.
    ///
    /// It never blocks, and so never reconnects; see
    /// [`keep_connected`](super::Frontend::keep_connected).
    ///
    /// # Errors
    ///
    /// One that [ends the queue](Error::ends_queue), permanently. All but [`Error::Protocol`] come
    /// only after the last event was read.
    pub fn try_next(&mut self) -> Result<Option<Event>, Error> {
        let queue = &*self.queue;
        loop {
            if let Some(event) = queue.pop()? {
                return Ok(Some(event));
            }
            // Before the last look at the ring: nothing arrives after a failure.
            let generation = queue.session.generation();
            let failure = queue.session.watch.failure()?;
            let now = Duration::ZERO.into();
            let failure =
                failure.and_then(|failure| queue.session.outlive(failure, generation, now));
            // Also before the last look: a later event makes the descriptor readable again.
            drain(&queue.call);
            if queue.arm() {
                continue;
            }
            return failure.map_or(Ok(None), |failure| Err(queue.fail(failure)));
        }
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] at the deadline, or as [`try_next`](Self::try_next).
    pub fn next(&mut self, deadline: impl Into<Deadline>) -> Result<Event, Error> {
        let deadline = deadline.into();
        let queue = &*self.queue;
        let session = &queue.session;
        let mut late = false;
        loop {
            if let Some(event) = queue.pop()? {
                return Ok(event);
            }
            if late {
                return Err(Error::TimedOut { what: "an event" });
            }
            if queue.arm() {
                continue;
            }
            let generation = session.generation();
            late = match queue.wait_set.sleep(&session.watch, deadline)? {
                Woken::Called => false,
                Woken::TimedOut => true,
                Woken::Failed(failure) => {
                    if let Some(failure) = session.outlive(failure, generation, deadline) {
                        // The backend may have written events before it went.
                        let last = queue.pop()?;
                        return last.ok_or_else(|| queue.fail(failure));
                    }
                    deadline.has_passed()
                }
            };
        }
    }
}

impl AsFd for EventStream {
    /// Readable when there may be events. [`EventStream::try_next`] reads the descriptor; the
    /// caller must not.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.call.as_fd()
    }
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}
