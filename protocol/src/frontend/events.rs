//! The event queue, as a stream.
//!
//! The buffers are posted by the library, and again as soon as an event was read from them, in
//! batches. While none is posted the backend keeps its events; none is lost.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use zerocopy::FromBytes;

use super::connection::Vring;
use super::error::{Failure, Fault};
use super::memory::{Layout, SharedMemory};
use super::ring::{self, Ring, RingLayout};
use super::wait::{Deadline, Link, Woken, drain, eventfd, signal};
use super::{Error, Timer};
use crate::{EVENT_QUEUE, Phase, wire};

const EVENT: usize = size_of::<wire::Event>();

/// Something that happened in the VM's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A timer's line rose by the passing of time, or stood high at the change to RUNNING.
    TimerAsserted {
        /// The vCPU's index, as the backend gave it.
        vcpu: u32,
        /// Which timer.
        timer: Timer,
        /// Its compare value.
        cval: u64,
        /// The count of its clock when the event was written.
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
    Unknown(wire::Event),
}

impl From<&wire::Event> for Event {
    fn from(event: &wire::Event) -> Self {
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
            _ => Event::Unknown(*event),
        }
    }
}

/// The VM's events, in the order in which the backend wrote them.
///
/// An event loop watches the descriptor ([`AsFd`]: readable when there may be events) and calls
/// [`try_next`](Self::try_next) until it gives `None`, once before it first sleeps too. A thread
/// of its own calls [`next`](Self::next).
pub struct EventStream {
    ring: Ring,
    buffers: usize,
    link: Arc<Link>,
    memory: Arc<SharedMemory>,
    layout: RingLayout,
    call: OwnedFd,
    kick: Arc<OwnedFd>,
    failure: Option<Failure>,
}

/// Where the event queue's parts lie.
pub(super) struct EventLayout {
    pub(super) ring: RingLayout,
    buffers: usize,
}

impl EventLayout {
    pub(super) fn reserve(layout: &mut Layout, size: u16) -> Self {
        EventLayout {
            ring: RingLayout::reserve(layout, size),
            buffers: layout.reserve(usize::from(size) * EVENT, 64),
        }
    }
}

impl EventStream {
    /// Posts all buffers. The backend is not notified: it does not have the ring yet.
    pub(super) fn new(
        link: Arc<Link>,
        memory: Arc<SharedMemory>,
        layout: EventLayout,
        event_idx: bool,
    ) -> Result<Self, Error> {
        let mut ring = Ring::new(memory.clone(), layout.ring, event_idx, 0);
        for head in 0..layout.ring.size {
            let buffer = memory.address(layout.buffers + EVENT * usize::from(head));
            let descriptor = ring::descriptor(buffer, EVENT as u32, ring::WRITE, 0);
            memory.write(ring.descriptor(head), &descriptor);
            ring.push(head, EVENT as u32);
        }
        ring.publish();
        // A backend that serves the ring before anyone waits makes the descriptor readable.
        let _ = ring.arm();
        Ok(EventStream {
            ring,
            buffers: layout.buffers,
            link,
            memory,
            layout: layout.ring,
            call: eventfd()?,
            kick: Arc::new(eventfd()?),
            failure: None,
        })
    }

    pub(super) fn vring(&self) -> Vring<'_> {
        Vring {
            index: EVENT_QUEUE,
            layout: self.layout,
            call: &self.call,
            kick: &self.kick,
        }
    }

    pub(super) fn kick_fd(&self) -> Arc<OwnedFd> {
        self.kick.clone()
    }

    /// The next event, if there is one; if there is none, the descriptor reports the next one.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`], [`Error::ShutDown`] or [`Error::Protocol`], for good. The first
    /// two only after the last event was read.
    pub fn try_next(&mut self) -> Result<Option<Event>, Error> {
        // Before the ring is looked at for the last time: nothing more comes after a failure.
        loop {
            if let Some(event) = self.pop()? {
                return Ok(Some(event));
            }
            self.repost();
            let failure = self.link.failure()?;
            drain(&self.call);
            if self.ring.arm() {
                continue;
            }
            return match failure {
                Some(failure) => Err(self.fail(failure)),
                None => Ok(None),
            };
        }
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] at the deadline, or as [`try_next`](Self::try_next).
    pub fn next(&mut self, deadline: impl Into<Deadline>) -> Result<Event, Error> {
        let deadline = deadline.into();
        loop {
            if let Some(event) = self.try_next()? {
                return Ok(event);
            }
            // A failure is told by `try_next`, after what events there still are.
            if self.link.wait(self.call.as_fd(), deadline)? == Woken::TimedOut {
                return Err(Error::TimedOut { what: "an event" });
            }
        }
    }

    fn fail(&mut self, failure: Failure) -> Error {
        (*self.failure.get_or_insert(failure)).into()
    }

    fn pop(&mut self) -> Result<Option<Event>, Error> {
        if let Some(failure) = self.failure {
            return Err(failure.into());
        }
        let fault = |fault| Failure::Protocol {
            queue: EVENT_QUEUE,
            fault,
        };
        let used = match self.ring.pop() {
            Ok(Some(used)) => used,
            Ok(None) => return Ok(None),
            Err(broken) => return Err(self.fail(fault(broken.into()))),
        };
        let mut bytes = [0; EVENT];
        let at = self.buffers + EVENT * usize::from(used.head);
        self.memory.read(at, &mut bytes);
        self.ring.push(used.head, EVENT as u32);
        if self.ring.unpublished() >= self.layout.size / 2 {
            self.repost();
        }
        match wire::Event::ref_from_bytes(&bytes) {
            Ok(event) if used.len as usize == EVENT => Ok(Some(event.into())),
            _ => {
                let fault = fault(Fault::EventLength { len: used.len });
                Err(self.fail(fault))
            }
        }
    }

    fn repost(&mut self) {
        if self.ring.publish() {
            signal(&self.kick);
        }
    }
}

impl AsFd for EventStream {
    /// Readable when there may be events. [`EventStream::try_next`] reads it; the caller must
    /// not.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}
