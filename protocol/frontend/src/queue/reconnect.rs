//! A request queue's way from one connection to the next.
//!
//! It goes in steps that all queues take together, since what becomes of one's requests depends
//! on the others': [`suspend`](Shared::suspend) when the loss is noticed,
//! [`collect_unanswered`](Shared::collect_unanswered) when the new backend is there and the old one therefore gone,
//! [`settle_aborts`](Shared::settle_aborts) and [`refill`](Shared::refill) when the VM's state is
//! known, and [`resume_service`](Shared::resume_service) when the backend has the rings.

use super::Shared;
use super::slots::{Stage, State};
use crate::operation::HEADER;
use crate::replay::{Recovered, Replay};
use crate::wait::{drain, signal};
use vhost_user_timer_protocol::wire::ResponseHeader;
use vhost_user_timer_protocol::{Op, Status};
use zerocopy::IntoBytes;

/// A request's epoch in its header (SPEC.md, "Requests").
const EPOCH: usize = 8;

impl Shared {
    /// Publishes nothing from now on.
    pub(crate) fn suspend(&self) {
        self.lock().down = true;
    }

    /// Takes what was answered, and counts what may have been done without an answer.
    pub(crate) fn collect_unanswered(&self, found: &mut Recovered) {
        let mut state = self.lock();
        self.reap(&mut state);
        found.unanswered_begins += self.unanswered(&state, Op::RestoreBegin);
        found.unanswered_dones += self.unanswered(&state, Op::RestoreDone);
    }

    fn unanswered(&self, state: &State, op: Op) -> usize {
        let slots = state.slots.iter();
        let unanswered = slots.filter(|slot| {
            matches!(slot.stage, Stage::InFlight | Stage::Orphaned)
                && slot.intent.is_some_and(|intent| intent.op == op)
                && state.was_published(slot)
        });
        unanswered.count()
    }

    /// Answers the RESTORE_ABORTs that were done: that says something of other queues' requests.
    pub(crate) fn settle_aborts(&self, found: &Recovered) {
        let mut state = self.lock();
        for slot in 0..state.slots.len() as u16 {
            let entry = state.slots[usize::from(slot)];
            // One that was given up may have been done none the less.
            let open = matches!(entry.stage, Stage::InFlight | Stage::Orphaned);
            let abort = entry
                .intent
                .is_some_and(|intent| intent.op == Op::RestoreAbort);
            if open && abort && state.was_published(&entry) {
                let again = self.again(&mut state, slot, found, 0);
                if let Replay::Answer(status) = again {
                    self.answer(&mut state, slot, status, found.epoch);
                }
            }
        }
    }

    /// Puts all that is to be sent again on an empty ring, in the order of submission.
    pub(crate) fn refill(&self, found: &Recovered) {
        let mut state = self.lock();
        let begins_here = self.unanswered(&state, Op::RestoreBegin);
        state.ring.restart(0);
        if state.failure.is_some() {
            return;
        }
        let mut begins = 0;
        for slot in 0..state.slots.len() as u16 {
            if state.slot(slot).stage == Stage::Orphaned {
                self.free(&mut state, slot);
            }
        }
        for slot in in_order(&state) {
            let again = if state.was_published(&state.slots[usize::from(slot)]) {
                self.again(&mut state, slot, found, begins_here)
            } else {
                if let Some(intent) = &mut state.slot(slot).intent {
                    self.session.history.meant_in(intent, begins);
                }
                Replay::Send
            };
            match again {
                Replay::Answer(status) => {
                    self.answer(&mut state, slot, status, found.epoch);
                    continue;
                }
                Replay::SendIn(epoch) => {
                    let large = state.slot(slot).large;
                    let (request, _) = self.layout.buffers(slot, large);
                    self.session
                        .memory
                        .write(request + EPOCH, &epoch.to_le_bytes());
                }
                Replay::Send => {}
            }
            let entry = state.slot(slot);
            let (room, op) = (entry.room, entry.intent.map(|intent| intent.op));
            begins += u16::from(op == Some(Op::RestoreBegin));
            state
                .ring
                .push(slot * self.layout.descriptors_per_slot(), room);
        }
        state.begins = begins;
        state.publish_all();
    }

    /// Publishes again, and makes sure that nobody has missed anything: the backend a kick,
    /// those who wait an answer.
    pub(crate) fn resume_service(&self) {
        let mut state = self.lock();
        state.down = false;
        state.publish();
        drop(state);
        signal(&self.kick);
        // A former backend may have filled it up; then the next one's calls would go unheard.
        drain(&self.call);
        signal(&self.call);
    }

    fn again(&self, state: &mut State, slot: u16, found: &Recovered, begins_here: usize) -> Replay {
        match &mut state.slot(slot).intent {
            Some(intent) => self.session.history.again(intent, found, begins_here),
            None => Replay::Send,
        }
    }

    /// Answers a request in the backend's place: with zeros, where the answer has a body.
    fn answer(&self, state: &mut State, slot: u16, status: Status, epoch: u64) {
        let large = state.slot(slot).large;
        let (_, at) = self.layout.buffers(slot, large);
        let header = ResponseHeader {
            status: status.errno().into(),
            detail: 0.into(),
            epoch: epoch.into(),
        };
        self.session.memory.write(at, header.as_bytes());
        self.complete(state, slot, HEADER as u32);
    }
}

/// The slots whose answers are waited for, as they were submitted.
fn in_order(state: &State) -> Vec<u16> {
    let mut slots: Vec<u16> = (0..)
        .zip(&*state.slots)
        .filter(|(_, slot)| slot.stage == Stage::InFlight)
        .map(|(n, _)| n)
        .collect();
    slots.sort_unstable_by_key(|slot| state.slots[usize::from(*slot)].sequence);
    slots
}
