//! The rings' hot path: chains in, model call, used entries out.

use std::collections::HashMap;

use vhost_user_timer_protocol::{EVENT_QUEUE, wire};
use vm_memory::GuestAddressSpace;
use zerocopy::IntoBytes;

use super::TimerState;
use crate::failpoint::{Point, reached};
use crate::vhost_user::link::{BATCH, Stop};
use crate::vhost_user::vring::{Memory, Vring};
use crate::virtio::chain::{ChainBuffer, Segment};
use crate::virtio::ring::{DeviceRing, RingScratch, WhenIdle};
use vhost_user_timer_model::vm::{Effect, Handled, Incoming, Released, Token};

const HEADER: usize = size_of::<wire::ResponseHeader>();
const EVENT: usize = size_of::<wire::Event>();
/// A WAIT_RUN's answer.
const RUN: usize = HEADER + size_of::<wire::Run>();

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
    gathered: ChainBuffer,
    work: RingScratch,
    /// Where the answers of those who wait to run go.
    held: HashMap<Token, Vec<Segment>>,
    deferred: Vec<Deferred>,
}

impl Rings {
    /// Serves requests of one ring until there is a reason to stop.
    pub(super) fn serve(
        &mut self,
        core: &mut TimerState,
        vring: &Vring,
        queue: u16,
        memory: &Memory<()>,
        idle: WhenIdle,
    ) -> Stop {
        let mem = memory.memory();
        let Rings {
            gathered,
            work,
            held,
            deferred,
        } = self;
        let Some(mut ring) = DeviceRing::usable(vring, queue, &mem, work) else {
            return Stop::Drained;
        };
        ring.when_idle(idle);
        give_deferred(deferred, &mut ring, queue);
        let served = serve_requests(core, &mut ring, queue, gathered, held, memory);
        publish(&mut ring);
        served
    }

    /// Answers waiters. A ring that is disabled gets its answers when it is enabled again.
    pub(super) fn release(&mut self, released: &Released, vrings: &[Vring], memory: &Memory<()>) {
        let mem = memory.memory();
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
        for (queue, vring) in (0..).zip(vrings) {
            let mut waiters = released
                .waiters
                .iter()
                .filter(|w| w.queue == queue)
                .peekable();
            if waiters.peek().is_none() {
                continue;
            }
            let mut ring = DeviceRing::usable(vring, queue, &mem, &mut self.work);
            for &token in waiters {
                let Some(segments) = self.held.remove(&token) else {
                    continue;
                };
                match &mut ring {
                    Some(ring) => {
                        let written = ring.write(&segments, answer);
                        ring.give_back(token.head, written);
                    }
                    None => self.deferred.push(Deferred {
                        token,
                        segments,
                        bytes,
                        len,
                    }),
                }
            }
        }
    }

    /// Gives back all that is still to be given of a ring that is being stopped. It belongs to
    /// the backend until GET_VRING_BASE is answered, enabled or not.
    pub(super) fn close(&mut self, vring: &Vring, queue: u16, memory: &Memory<()>) {
        let mem = memory.memory();
        if let Some(mut ring) = DeviceRing::stopping(vring, queue, &mem, &mut self.work) {
            give_deferred(&mut self.deferred, &mut ring, queue);
            ring.leave();
        }
    }

    /// How many chains were ever taken from the rings.
    pub(super) fn taken(&self) -> u64 {
        self.gathered.count()
    }

    /// Forgets what the rings held: they are gone.
    pub(super) fn clear(&mut self) {
        self.held.clear();
        self.deferred.clear();
    }

    /// Writes events into the buffers that the frontend posted for them.
    pub(super) fn deliver_events(
        &mut self,
        core: &mut TimerState,
        vring: &Vring,
        memory: &Memory<()>,
    ) -> Stop {
        if !core.vm.has_event() {
            return Stop::Drained;
        }
        let mem = memory.memory();
        let Some(mut ring) = DeviceRing::usable(vring, EVENT_QUEUE, &mem, &mut self.work) else {
            return Stop::Drained;
        };
        for _ in 0..BATCH {
            let Some(head) = ring.next_chain(&mut self.gathered) else {
                return Stop::Drained;
            };
            if !self.gathered.has_room(EVENT_QUEUE, EVENT) {
                ring.give_back(head, 0);
                continue;
            }
            let now = core.now();
            let Some(event) = core.vm.next_event(now) else {
                ring.put_back();
                return Stop::Drained;
            };
            let written = ring.write(self.gathered.writable(), event.as_bytes());
            ring.give_back(head, written);
            if !core.vm.has_event() {
                return Stop::Drained;
            }
        }
        Stop::BatchFull
    }
}

fn serve_requests(
    core: &mut TimerState,
    ring: &mut DeviceRing<'_, ()>,
    queue: u16,
    gathered: &mut ChainBuffer,
    held: &mut HashMap<Token, Vec<Segment>>,
    memory: &Memory<()>,
) -> Stop {
    let mut changed = false;
    for _ in 0..BATCH {
        if !ring.has_found() {
            publish(ring);
        }
        let Some(head) = ring.next_chain(gathered) else {
            return Stop::Drained;
        };
        let token = Token { queue, head };
        if held.contains_key(&token) {
            ring.stop(&format_args!("chain {head} is made available twice"));
            return Stop::Drained;
        }
        if !gathered.has_room(queue, HEADER) {
            ring.give_back(head, 0);
            continue;
        }
        let incoming = Incoming::parse(gathered.request(), gathered.room(), token);
        // Of requests that change something only one at a time is done without an answer: a frontend
        // that finds two such unanswered after a kill could not tell in which order to do what again.
        // Readings are answered together.
        let effect = incoming.effect();
        let changes = effect.changes_anything();
        if changes || changed {
            publish(ring);
        }
        changed = changes;
        if effect == Effect::Freezes {
            core.page.open(memory);
        }
        let now = core.now();
        let handled = core.vm.handle(now, &incoming, &mut core.effects);
        if let Some(order) = core.effects.page.take() {
            core.turn_page(order, memory);
        }
        core.persist(memory);
        reached(Point::AnswerReady);
        match handled {
            Handled::Answered => {
                let len = ring.write(gathered.writable(), &core.effects.response);
                reached(Point::AnswerWritten);
                ring.give_back(head, len);
            }
            Handled::Waiting => {
                held.insert(token, gathered.writable_for(RUN));
            }
        }
        if !core.effects.released.is_empty() || !core.effects.notices.is_empty() {
            return Stop::EffectsPending;
        }
    }
    Stop::BatchFull
}

/// Lets the frontend see the answers.
fn publish(ring: &mut DeviceRing<'_, ()>) {
    if ring.publish() {
        reached(Point::AnswerUsed);
    }
}

/// Gives back what is still to be given of a ring.
fn give_deferred(deferred: &mut Vec<Deferred>, ring: &mut DeviceRing<'_, ()>, queue: u16) {
    for deferred in deferred.extract_if(.., |deferred| deferred.token.queue == queue) {
        let answer = deferred.bytes.get(..deferred.len).unwrap_or_default();
        let written = ring.write(&deferred.segments, answer);
        ring.give_back(deferred.token.head, written);
    }
}
