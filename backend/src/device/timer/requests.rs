//! The rings' hot path: chains in, model call, used entries out.

use std::collections::HashMap;

use rustix::time::ClockId;
use vhost_user_timer_counter::clock_ticks;
use vhost_user_timer_model::vm::{Effect, Handled, Incoming, Released, Token};
use vhost_user_timer_protocol::counter::NS_PER_SEC;
use vhost_user_timer_protocol::{EVENT_QUEUE, Status, wire};
use vm_memory::GuestAddressSpace;
use zerocopy::IntoBytes;

use crate::device::timer::told::{self, Told};
use crate::device::timer::{TimerDevice, TimerState};
use crate::failpoint::{Point, reached};
use crate::vhost_user::{self, ServedRing};
use crate::virtio::Memory;
use crate::virtio::chain::{ChainBuffer, Segment};
use crate::virtio::ring::{Stop, WhenIdle};

const HEADER: usize = size_of::<wire::ResponseHeader>();
const EVENT: usize = size_of::<wire::Event>();
/// A WAIT_RUN's answer.
const RUN: usize = HEADER + size_of::<wire::Run>();

type Turn<'a> = vhost_user::Turn<'a, TimerDevice>;

/// An answer for a ring that is disabled for now.
#[derive(Debug)]
struct Deferred {
    token: Token,
    segments: Vec<Segment>,
    bytes: [u8; RUN],
    len: usize,
}

/// Requests of a connection that were taken from its rings and are yet to be given back.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    /// Where the answers of waiters go.
    held: HashMap<Token, Vec<Segment>>,
    deferred: Vec<Deferred>,
}

impl InFlight {
    /// Forgets what the rings held: they are gone.
    pub(super) fn clear(&mut self) {
        self.held.clear();
        self.deferred.clear();
    }
}

/// Serves requests of one ring until there is a reason to stop.
pub(super) fn serve(
    state: &mut TimerState,
    turn: &mut Turn<'_>,
    queue: u16,
    when_idle: WhenIdle,
) -> Stop {
    let mem = turn.memory.memory();
    let Some(mut ring) = turn
        .vring(queue)
        .and_then(|vring| vring.usable(queue, &mem, turn.scratch))
    else {
        return Stop::Drained;
    };
    ring.when_idle(when_idle);
    let InFlight { held, deferred } = &mut *turn.in_flight;
    give_deferred(deferred, &mut ring, queue);
    let stop = serve_requests(state, &mut ring, queue, turn.chain, held, turn.memory);
    publish(&mut ring);
    stop
}

/// Answers waiters. A ring that is disabled gets its answers when it is enabled again.
pub(super) fn release(released: &Released, turn: &mut Turn<'_>) {
    let mem = turn.memory.memory();
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
    log::debug!(
        "WAIT_RUN of {} waiters is answered {}",
        released.waiters.len(),
        Status::from(released.header.status.get()).name()
    );
    let InFlight { held, deferred } = &mut *turn.in_flight;
    for (queue, vring) in (0..).zip(turn.vrings) {
        let mut waiters = released
            .waiters
            .iter()
            .filter(|w| w.queue == queue)
            .peekable();
        if waiters.peek().is_none() {
            continue;
        }
        let mut ring = vring.usable(queue, &mem, turn.scratch);
        for &token in waiters {
            let Some(segments) = held.remove(&token) else {
                continue;
            };
            match &mut ring {
                Some(ring) => {
                    let written = ring.write(&segments, answer);
                    ring.give_back(token.head, written);
                }
                None => deferred.push(Deferred {
                    token,
                    segments,
                    bytes,
                    len,
                }),
            }
        }
    }
}

/// Gives back all that is still to be given back of a ring that is being stopped. The ring belongs
/// to the backend until GET_VRING_BASE is answered, enabled or not.
pub(super) fn close(turn: &mut Turn<'_>, queue: u16) {
    let mem = turn.memory.memory();
    if let Some(mut ring) = turn
        .vring(queue)
        .and_then(|vring| vring.stopping(queue, &mem, turn.scratch))
    {
        give_deferred(&mut turn.in_flight.deferred, &mut ring, queue);
        ring.leave();
    }
}

/// Writes events into the buffers that the frontend posted for them.
pub(super) fn deliver_events(state: &mut TimerState, turn: &mut Turn<'_>) -> Stop {
    if !state.vm.has_event() {
        return Stop::Drained;
    }
    let mem = turn.memory.memory();
    let Some(mut ring) = turn
        .vring(EVENT_QUEUE)
        .and_then(|vring| vring.usable(EVENT_QUEUE, &mem, turn.scratch))
    else {
        return Stop::Drained;
    };
    loop {
        let head = match ring.next_with_room(turn.chain, EVENT) {
            Ok(head) => head,
            Err(stop) => return stop,
        };
        let now = state.now();
        let Some(event) = state.vm.next_event(now) else {
            ring.put_back();
            return Stop::Drained;
        };
        let written = ring.write(turn.chain.writable(), event.as_bytes());
        ring.give_back(head, written);
        if !state.vm.has_event() {
            return Stop::Drained;
        }
    }
}

fn serve_requests(
    state: &mut TimerState,
    ring: &mut ServedRing<'_, ()>,
    queue: u16,
    chain: &mut ChainBuffer,
    held: &mut HashMap<Token, Vec<Segment>>,
    memory: &Memory<()>,
) -> Stop {
    let mut changed = false;
    while !ring.batch_is_spent() {
        if !ring.has_found() {
            publish(ring);
        }
        let Some(head) = ring.next_chain(chain) else {
            return Stop::Drained;
        };
        let token = Token { queue, head };
        if held.contains_key(&token) {
            ring.stop(&format_args!("chain {head} is made available twice"));
            return Stop::Drained;
        }
        if !chain.has_room(queue, HEADER) {
            ring.give_back(head, 0);
            continue;
        }
        let incoming = Incoming::parse(chain.request(), chain.room(), token);
        // At most one change is carried out without its answer: a frontend that found two changes
        // unanswered after a kill could not tell in which order to repeat them. Readings are
        // answered together.
        let effect = incoming.effect();
        let changes = effect.changes_anything();
        if changes || changed {
            publish(ring);
        }
        changed = changes;
        if effect == Effect::Freezes {
            state.page.open(memory);
        }
        let now = state.now();
        let told = told::is_wanted().then(|| Told::new(&state.vm, now));
        let handled = state.vm.handle(now, &incoming, &mut state.effects);
        if let Some(order) = state.effects.page.take() {
            state.set_page(order, memory);
        }
        state.persist(memory);
        reached(Point::AnswerReady);
        if effect == Effect::Freezes && handled == Handled::Answered && state.effects.is_done() {
            told::elapsed(&incoming, clock_ticks(ClockId::Realtime, NS_PER_SEC));
        }
        if let Some(told) = told {
            let answer = match handled {
                Handled::Answered => Some(&state.effects.response[..]),
                Handled::Waiting => None,
            };
            told.tell(&state.vm, now, chain.request(), &incoming, answer);
        }
        match handled {
            Handled::Answered => {
                let len = ring.write(chain.writable(), &state.effects.response);
                reached(Point::AnswerWritten);
                ring.give_back(head, len);
            }
            Handled::Waiting => {
                held.insert(token, chain.writable_for(RUN));
            }
        }
        if !state.effects.released.is_empty() || !state.effects.notices.is_empty() {
            return Stop::EffectsPending;
        }
    }
    Stop::BatchFull
}

/// Makes the answers visible to the frontend.
fn publish(ring: &mut ServedRing<'_, ()>) {
    if ring.publish() {
        reached(Point::AnswerUsed);
    }
}

/// Gives back answers that waited for the ring.
fn give_deferred(deferred: &mut Vec<Deferred>, ring: &mut ServedRing<'_, ()>, queue: u16) {
    for deferred in deferred.extract_if(.., |deferred| deferred.token.queue == queue) {
        let answer = deferred.bytes.get(..deferred.len).unwrap_or_default();
        let written = ring.write(&deferred.segments, answer);
        ring.give_back(deferred.token.head, written);
    }
}
