//! The rings' hot path: chains in, model call, used entries out.

use std::collections::HashMap;

use vhost_user_backend::{VringStateMutGuard, VringT};
use vhost_user_timer_protocol::{EVENT_QUEUE, wire};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::Core;
use super::chain::{Gathered, Segment, scatter};
use super::vring::{Memory, Vring};
use crate::failpoint::{Point, reached};
use crate::vm::{Call, Handled, Released, Token};

/// How many requests are served before other rings and the clock get their turn.
const BATCH: usize = 256;

const HEADER: usize = size_of::<wire::ResponseHeader>();
const EVENT: usize = size_of::<wire::Event>();
/// A WAIT_RUN's answer.
const RUN: usize = HEADER + size_of::<wire::Run>();

type RingState<'a> = <Vring as VringStateMutGuard<'a, Memory>>::G;

/// Why serving a ring came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// There is nothing left to serve, or nothing that may be.
    All,
    /// A request had effects that must be carried out before the next.
    ToEffects,
    /// There is more, but it is somebody else's turn.
    ToBatch,
}

/// An answer for a ring that is disabled for now.
#[derive(Debug)]
struct Deferred {
    token: Token,
    segments: Vec<Segment>,
    bytes: [u8; RUN],
    len: usize,
}

/// What a connection's rings hold.
#[derive(Debug, Default)]
pub(super) struct Rings {
    gathered: Gathered,
    /// Where the answers of those who wait to run go.
    held: HashMap<Token, Vec<Segment>>,
    deferred: Vec<Deferred>,
    /// How many chains were taken from the rings.
    taken: u64,
    /// How many chains had too little room.
    complaints: u64,
}

fn usable(ring: &RingState<'_>) -> bool {
    ring.get_queue().ready() && ring.is_enabled()
}

/// Stops serving a ring whose driver breaks the rules. The frontend can start it anew.
fn stop(ring: &mut RingState<'_>, queue: u16, why: &dyn std::fmt::Display) {
    log::error!("Queue {queue} is stopped until the frontend starts it again: {why}");
    ring.get_queue_mut().set_ready(false);
}

/// Gives a chain back. A ring that cannot take it is stopped.
fn give_back(ring: &mut RingState<'_>, mem: &GuestMemoryMmap, token: Token, len: u32) {
    if let Err(error) = ring.get_queue_mut().add_used(mem, token.head, len) {
        stop(ring, token.queue, &error);
    }
}

/// Tells the driver of what it was given back since its used index was `told`, where it wants
/// to be told.
fn notify(ring: &mut RingState<'_>, mem: &GuestMemoryMmap, told: u16) {
    // An unreadable used_event is one more reason to tell it.
    if ring.get_queue().next_used() != told
        && ring.get_queue_mut().needs_notification(mem).unwrap_or(true)
        && let Err(error) = ring.signal_used_queue()
    {
        // A full pipe: the driver has been told often enough.
        log::debug!("The call descriptor takes no notification: {error}");
    }
}

impl Rings {
    /// Serves requests of one ring until there is a reason to stop.
    pub(super) fn serve(
        &mut self,
        core: &mut Core,
        vring: &Vring,
        queue: u16,
        memory: &Memory,
    ) -> Served {
        let mem = memory.memory();
        let mem: &GuestMemoryMmap = &mem;
        let mut ring = vring.get_mut();
        if !usable(&ring) {
            return Served::All;
        }
        let told = ring.get_queue().next_used();
        self.give_deferred(&mut ring, mem, queue);
        let mut served = Served::ToBatch;
        for _ in 0..BATCH {
            let Some(token) = self.next_chain(&mut ring, mem, queue) else {
                served = Served::All;
                break;
            };
            if self.held.contains_key(&token) {
                let twice = format_args!("chain {} is made available twice", token.head);
                stop(&mut ring, queue, &twice);
                served = Served::All;
                break;
            }
            self.serve_one(core, &mut ring, mem, token);
            if !core.effects.released.is_empty() || !core.effects.notices.is_empty() {
                served = Served::ToEffects;
                break;
            }
        }
        notify(&mut ring, mem, told);
        served
    }

    fn serve_one(
        &mut self,
        core: &mut Core,
        ring: &mut RingState<'_>,
        mem: &GuestMemoryMmap,
        token: Token,
    ) {
        let room = self.gathered.room();
        if room < HEADER {
            self.complain(token.queue, HEADER);
            give_back(ring, mem, token, 0);
            return;
        }
        let call = Call {
            request: self.gathered.request(),
            room,
            token,
        };
        let now = core.now();
        let handled = core.vm.handle(now, &call, &mut core.effects);
        core.persist();
        reached(Point::AnswerReady);
        match handled {
            Handled::Answered => {
                let len = scatter(mem, self.gathered.writable(), &core.effects.response);
                reached(Point::AnswerWritten);
                give_back(ring, mem, token, len);
                reached(Point::AnswerUsed);
            }
            Handled::Waiting => {
                self.held.insert(token, self.gathered.writable_for(RUN));
            }
        }
    }

    /// Logs the first, second, fourth, eighth … chain that cannot be used, the one gathered
    /// last.
    fn complain(&mut self, queue: u16, needed: usize) {
        self.complaints = self.complaints.saturating_add(1);
        if self.complaints.is_power_of_two() {
            log::warn!(
                "A chain on queue {queue} has {} writable bytes and needs {needed}: it is given \
                 back as it is (such chains so far: {})",
                self.gathered.room(),
                self.complaints
            );
        }
    }

    /// Answers waiters. A ring that is disabled gets its answers when it is enabled again.
    pub(super) fn release(&mut self, released: &Released, vrings: &[Vring], memory: &Memory) {
        let mem = memory.memory();
        let mem: &GuestMemoryMmap = &mem;
        let mut bytes = [0; RUN];
        let (header, run) = bytes.split_at_mut(HEADER);
        header.copy_from_slice(released.header.as_bytes());
        let len = match &released.run {
            Some(answer) => {
                run.copy_from_slice(answer.as_bytes());
                RUN
            }
            None => HEADER,
        };
        let answer = bytes.get(..len).unwrap_or_default();
        let mut touched = Vec::new();
        for &token in &released.waiters {
            let Some(segments) = self.held.remove(&token) else {
                continue;
            };
            let Some(vring) = vrings.get(usize::from(token.queue)) else {
                continue;
            };
            let mut ring = vring.get_mut();
            if usable(&ring) {
                let written = scatter(mem, &segments, answer);
                let told = ring.get_queue().next_used();
                give_back(&mut ring, mem, token, written);
                if touched.iter().all(|(queue, _)| *queue != token.queue) {
                    touched.push((token.queue, told));
                }
            } else {
                self.deferred.push(Deferred {
                    token,
                    segments,
                    bytes,
                    len,
                });
            }
        }
        for (queue, told) in touched {
            if let Some(vring) = vrings.get(usize::from(queue)) {
                notify(&mut vring.get_mut(), mem, told);
            }
        }
    }

    fn give_deferred(&mut self, ring: &mut RingState<'_>, mem: &GuestMemoryMmap, queue: u16) {
        for deferred in self
            .deferred
            .extract_if(.., |deferred| deferred.token.queue == queue)
        {
            let answer = deferred.bytes.get(..deferred.len).unwrap_or_default();
            let written = scatter(mem, &deferred.segments, answer);
            give_back(ring, mem, deferred.token, written);
        }
    }

    /// Gives back all that is still to be given of a ring that is being stopped. It belongs to
    /// the backend until GET_VRING_BASE is answered, enabled or not.
    pub(super) fn close(&mut self, vring: &Vring, queue: u16, memory: &Memory) {
        let mem = memory.memory();
        let mut ring = vring.get_mut();
        let told = ring.get_queue().next_used();
        self.give_deferred(&mut ring, &mem, queue);
        notify(&mut ring, &mem, told);
    }

    /// How many chains were ever taken from the rings.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Forgets what the rings held: they are gone.
    pub(super) fn clear(&mut self) {
        self.held.clear();
        self.deferred.clear();
    }

    /// Writes events into the buffers that the frontend posted for them.
    pub(super) fn deliver_events(
        &mut self,
        core: &mut Core,
        vring: &Vring,
        memory: &Memory,
    ) -> Served {
        if !core.vm.has_event() {
            return Served::All;
        }
        let mem = memory.memory();
        let mem: &GuestMemoryMmap = &mem;
        let mut ring = vring.get_mut();
        if !usable(&ring) {
            return Served::All;
        }
        let told = ring.get_queue().next_used();
        let mut served = Served::ToBatch;
        for _ in 0..BATCH {
            let Some(token) = self.next_chain(&mut ring, mem, EVENT_QUEUE) else {
                served = Served::All;
                break;
            };
            if self.gathered.room() < EVENT {
                self.complain(token.queue, EVENT);
                give_back(&mut ring, mem, token, 0);
                continue;
            }
            let now = core.now();
            let Some(event) = core.vm.next_event(now) else {
                ring.get_queue_mut().go_to_previous_position();
                served = Served::All;
                break;
            };
            let written = scatter(mem, self.gathered.writable(), event.as_bytes());
            give_back(&mut ring, mem, token, written);
            if !core.vm.has_event() {
                served = Served::All;
                break;
            }
        }
        notify(&mut ring, mem, told);
        served
    }

    /// Gathers the next available chain. Without one, the driver is asked to kick when there
    /// is; a ring that makes no sense is stopped.
    fn next_chain(
        &mut self,
        ring: &mut RingState<'_>,
        mem: &GuestMemoryMmap,
        queue: u16,
    ) -> Option<Token> {
        // A chain that comes between the look and the request for a kick takes a second look.
        for _ in 0..2 {
            match ring.get_queue_mut().iter(mem) {
                Ok(mut chains) => {
                    if let Some(chain) = chains.next() {
                        let head = chain.head_index();
                        self.gathered.gather(mem, chain);
                        self.taken += 1;
                        return Some(Token { queue, head });
                    }
                }
                Err(error) => {
                    stop(ring, queue, &error);
                    return None;
                }
            }
            match ring.get_queue_mut().enable_notification(mem) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    stop(ring, queue, &error);
                    return None;
                }
            }
        }
        stop(
            ring,
            queue,
            &"its index says that chains are available, and there are none",
        );
        None
    }
}
