//! The rings' hot path: chains in, model call, used entries out.

use std::collections::HashMap;

use vhost_user_timer_protocol::{EVENT_QUEUE, wire};
use vm_memory::GuestAddressSpace;
use zerocopy::IntoBytes;

use super::super::chain::{Gathered, Segment};
use super::super::link::{BATCH, Served};
use super::super::ring::Ring;
use super::super::vring::{Memory, Vring};
use super::Core;
use crate::failpoint::{Point, reached};
use crate::vm::{Call, Handled, Released, Token};

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
    gathered: Gathered,
    /// Where the answers of those who wait to run go.
    held: HashMap<Token, Vec<Segment>>,
    deferred: Vec<Deferred>,
}

impl Rings {
    /// Serves requests of one ring until there is a reason to stop.
    pub(super) fn serve(
        &mut self,
        core: &mut Core,
        vring: &Vring,
        queue: u16,
        memory: &Memory<()>,
    ) -> Served {
        let mem = memory.memory();
        let Some(mut ring) = Ring::usable(vring, queue, &mem) else {
            return Served::All;
        };
        self.give_deferred(&mut ring, queue);
        for _ in 0..BATCH {
            let Some(head) = ring.next_chain(&mut self.gathered) else {
                return Served::All;
            };
            let token = Token { queue, head };
            if self.held.contains_key(&token) {
                ring.stop(&format_args!("chain {head} is made available twice"));
                return Served::All;
            }
            self.serve_one(core, &mut ring, token, memory);
            if !core.effects.released.is_empty() || !core.effects.notices.is_empty() {
                return Served::ToEffects;
            }
        }
        Served::ToBatch
    }

    fn serve_one(
        &mut self,
        core: &mut Core,
        ring: &mut Ring<'_, ()>,
        token: Token,
        memory: &Memory<()>,
    ) {
        if !self.gathered.has_room(token.queue, HEADER) {
            ring.give_back(token.head, 0);
            return;
        }
        let call = Call {
            request: self.gathered.request(),
            room: self.gathered.room(),
            token,
        };
        if call.may_freeze() {
            core.page.open(memory);
        }
        let now = core.now();
        let handled = core.vm.handle(now, &call, &mut core.effects);
        if let Some(order) = core.effects.page.take() {
            core.turn_page(order, memory);
        }
        core.persist(memory);
        reached(Point::AnswerReady);
        match handled {
            Handled::Answered => {
                let len = ring.write(self.gathered.writable(), &core.effects.response);
                reached(Point::AnswerWritten);
                ring.give_back(token.head, len);
                reached(Point::AnswerUsed);
            }
            Handled::Waiting => {
                self.held.insert(token, self.gathered.writable_for(RUN));
            }
        }
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
            let mut ring = Ring::usable(vring, queue, &mem);
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

    fn give_deferred(&mut self, ring: &mut Ring<'_, ()>, queue: u16) {
        for deferred in self
            .deferred
            .extract_if(.., |deferred| deferred.token.queue == queue)
        {
            let answer = deferred.bytes.get(..deferred.len).unwrap_or_default();
            let written = ring.write(&deferred.segments, answer);
            ring.give_back(deferred.token.head, written);
        }
    }

    /// Gives back all that is still to be given of a ring that is being stopped. It belongs to
    /// the backend until GET_VRING_BASE is answered, enabled or not.
    pub(super) fn close(&mut self, vring: &Vring, queue: u16, memory: &Memory<()>) {
        let mem = memory.memory();
        self.give_deferred(&mut Ring::stopping(vring, queue, &mem), queue);
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
        core: &mut Core,
        vring: &Vring,
        memory: &Memory<()>,
    ) -> Served {
        if !core.vm.has_event() {
            return Served::All;
        }
        let mem = memory.memory();
        let Some(mut ring) = Ring::usable(vring, EVENT_QUEUE, &mem) else {
            return Served::All;
        };
        for _ in 0..BATCH {
            let Some(head) = ring.next_chain(&mut self.gathered) else {
                return Served::All;
            };
            if !self.gathered.has_room(EVENT_QUEUE, EVENT) {
                ring.give_back(head, 0);
                continue;
            }
            let now = core.now();
            let Some(event) = core.vm.next_event(now) else {
                ring.put_back();
                return Served::All;
            };
            let written = ring.write(self.gathered.writable(), event.as_bytes());
            ring.give_back(head, written);
            if !core.vm.has_event() {
                return Served::All;
            }
        }
        Served::ToBatch
    }
}
