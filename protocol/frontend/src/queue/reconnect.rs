//! A request queue's way from one connection to the next.

use std::mem::offset_of;

use super::Shared;
use super::slots::{Stage, State};
use crate::Operation;
use crate::connection::VringSetup;
use crate::operation::HEADER;
use crate::replay::{Kind, Recovered, Replay};
use crate::session::Survivor;
use crate::sys::{drain, signal};
use vhost_user_timer_protocol::wire::{RequestHeader, ResponseHeader};
use vhost_user_timer_protocol::{Op, Status};
use zerocopy::IntoBytes;

impl Survivor for Shared {
    fn suspend(&self) {
        self.lock().down = true;
    }

    fn collect_unanswered(&self, recovered: &mut Recovered) {
        let mut state = self.lock();
        self.reap(&mut state);
        recovered.unanswered_begins += self.unanswered(&state, begins);
        recovered.unanswered_dones += self.unanswered(&state, |kind| kind.done);
    }

    fn settle_aborts(&self, recovered: &Recovered) {
        let mut state = self.lock();
        for slot in 0..state.slots.len() as u16 {
            let entry = state.slots[usize::from(slot)];
            // Also an abandoned one may have been carried out.
            let open = matches!(entry.stage, Stage::InFlight | Stage::Orphaned);
            let abort = entry
                .intent
                .is_some_and(|intent| intent.kind.op == Op::RestoreAbort);
            if open && abort && state.was_published(&entry) {
                let again = self.again(&mut state, slot, recovered, 0);
                if let Replay::Answer(status) = again {
                    self.answer(&mut state, slot, status, recovered.epoch);
                }
            }
        }
    }

    fn refill(&self, recovered: &Recovered) {
        let mut state = self.lock();
        let begins_here = self.unanswered(&state, begins);
        state.ring.restart(0);
        if state.failure.is_some() {
            return;
        }
        let mut begun = 0;
        for slot in 0..state.slots.len() as u16 {
            if state.slot(slot).stage == Stage::Orphaned {
                self.free(&mut state, slot);
            }
        }
        for slot in in_order(&state) {
            let again = if state.was_published(&state.slots[usize::from(slot)]) {
                self.again(&mut state, slot, recovered, begins_here)
            } else {
                if let Some(intent) = &mut state.slot(slot).intent {
                    self.session.history.meant_in(intent, begun);
                }
                Replay::Send
            };
            match again {
                Replay::Answer(status) => {
                    self.answer(&mut state, slot, status, recovered.epoch);
                    continue;
                }
                Replay::SendIn(epoch) => {
                    let large = state.slot(slot).large;
                    let (request, _) = self.layout.buffers(slot, large);
                    self.session.memory.write(
                        request + offset_of!(RequestHeader, epoch),
                        &epoch.to_le_bytes(),
                    );
                }
                Replay::Send => {}
            }
            let entry = state.slot(slot);
            let (room, kind) = (entry.room, entry.intent.map(|intent| intent.kind));
            begun += u16::from(kind.is_some_and(begins));
            state
                .ring
                .push(slot * self.layout.descriptors_per_slot(), room);
        }
        state.begins = begun;
        state.publish_all();
    }

    fn vring(&self) -> VringSetup<'_> {
        VringSetup {
            index: self.index,
            layout: self.layout.ring,
            call: &self.call,
            kick: &self.kick,
        }
    }

    fn resume_service(&self) {
        let mut state = self.lock();
        state.down = false;
        state.publish();
        drop(state);
        signal(&self.kick);
        // The previous backend may have filled the counter; then the next one's calls would be
        // lost.
        drain(&self.call);
        signal(&self.call);
    }

    fn wake_waiters(&self) {
        signal(&self.call);
    }

    fn send(&self, operation: &Operation<'_, ()>) -> bool {
        let Ok(slot) = self.start(operation, None) else {
            return false;
        };
        let mut state = self.lock();
        match state.slot(slot).stage {
            // Another thread may have kicked and taken the answer already.
            Stage::Done { len } => {
                self.learn(&mut state, slot, len, true);
                self.free(&mut state, slot);
            }
            _ => state.orphan(slot),
        }
        drop(state);
        self.kick();
        true
    }
}

impl Shared {
    /// How many such requests may have been carried out.
    fn unanswered(&self, state: &State, is: impl Fn(Kind) -> bool) -> usize {
        let slots = state.slots.iter();
        let unanswered = slots.filter(|slot| {
            matches!(slot.stage, Stage::InFlight | Stage::Orphaned)
                && slot.intent.is_some_and(|intent| is(intent.kind))
                && state.was_published(slot)
        });
        unanswered.count()
    }

    fn again(
        &self,
        state: &mut State,
        slot: u16,
        recovered: &Recovered,
        begins_here: usize,
    ) -> Replay {
        match &mut state.slot(slot).intent {
            Some(intent) => self.session.history.again(intent, recovered, begins_here),
            None => Replay::Send,
        }
    }

    /// Answers a request in the backend's place; a body, if the answer has one, is zeros.
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

fn begins(kind: Kind) -> bool {
    kind.op == Op::RestoreBegin
}

/// The slots whose answers are awaited, in the order of submission.
fn in_order(state: &State) -> Vec<u16> {
    let mut slots: Vec<u16> = (0..)
        .zip(&*state.slots)
        .filter(|(_, slot)| slot.stage == Stage::InFlight)
        .map(|(n, _)| n)
        .collect();
    slots.sort_unstable_by_key(|slot| state.slots[usize::from(*slot)].sequence);
    slots
}
