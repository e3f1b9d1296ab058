//! Waiting on a queue: which thread sleeps on what, and which thread wakes which.

use std::sync::Condvar;

use super::Shared;
use super::locked::Locked;
use super::slots::{Await, Need, State};
use crate::Error;
use crate::error::Failure;
use crate::sys::{self, signal};
use crate::wait::{Deadline, Woken};

impl Shared {
    /// Waits as a leader or a follower. On success the lock is still held.
    pub(super) fn wait(
        &self,
        what: Await,
        name: &'static str,
        deadline: Deadline,
    ) -> Result<Locked<'_>, Error> {
        let mut state = self.lock();
        // Set by the sleeps: reading the clock each time would cost more than the rest.
        let mut late = false;
        let result = loop {
            self.reap(&mut state);
            if state.has(what) && (state.failure.is_none() || matches!(what, Await::Slot(_))) {
                break Ok(());
            }
            if let Some(failure) = state.failure {
                break Err(failure.into());
            }
            if late {
                break Err(Error::TimedOut { what: name });
            }
            if state.leader.is_some() {
                state = self.follow(state, what, deadline);
                late = deadline.has_passed();
                continue;
            }
            if state.ring.arm() {
                continue;
            }
            state.leader = Some(what);
            drop(state);
            let (guard, led) = self.lead(deadline);
            state = guard;
            state.leader = None;
            state.ring.disarm();
            match led {
                Ok(passed) => late = passed,
                Err(error) => break Err(error),
            }
        };
        self.pass_on(&state);
        result.map(|()| state)
    }

    /// Sleeps until a call, and reconnects if the connection is lost. Returns when another look is
    /// worthwhile, and whether the deadline has passed.
    fn lead(&self, deadline: Deadline) -> (Locked<'_>, Result<bool, Error>) {
        let generation = self.session.generation();
        let (failure, late) = match self.wait_set.sleep(&self.session.watch, deadline) {
            Ok(Woken::Called) => (None, false),
            Ok(Woken::TimedOut) => (None, true),
            Ok(Woken::Failed(failure)) => {
                let failure = self.session.outlive(failure, generation, deadline);
                (failure, deadline.has_passed())
            }
            Err(error) => return (self.lock(), Err(error)),
        };
        let mut state = self.lock();
        if let Some(failure) = failure {
            // The backend may have answered before it went.
            self.reap(&mut state);
            self.fail(&mut state, failure);
        }
        (state, Ok(late))
    }

    /// Sleeps until a leader says that another look is worthwhile.
    fn follow<'a>(&'a self, mut state: Locked<'a>, what: Await, deadline: Deadline) -> Locked<'a> {
        let condvar = match what {
            Await::Slot(slot) => {
                state.slot(slot).followed = true;
                state.followers += 1;
                self.condvar(&state, slot)
            }
            Await::Room(need) => {
                state.want_room[need as usize] += 1;
                &self.room[need as usize]
            }
        };
        state = state.while_free(|guard| sys::wait(condvar, guard, deadline));
        match what {
            Await::Slot(slot) => {
                state.slot(slot).followed = false;
                state.followers -= 1;
            }
            Await::Room(need) => state.want_room[need as usize] -= 1,
        }
        state
    }

    /// The condition variable that a slot's waiter sleeps on.
    fn condvar(&self, state: &State, slot: u16) -> &Condvar {
        let slot = usize::from(slot);
        match state.slots[slot].wait_run {
            Some(_) => &self.runs,
            None => &self.done[slot],
        }
    }

    /// What a thread owes the others when it stops waiting: a new leader, and the room that it was
    /// woken for and did not take.
    fn pass_on(&self, state: &State) {
        if state.leader.is_none() && state.failure.is_none() {
            let next = match state.followers {
                0 => None,
                // A thread that has an answer is woken for that.
                _ => (0..)
                    .zip(&state.slots)
                    .find(|(_, slot)| slot.followed && !slot.is_answered())
                    .map(|(n, _)| n),
            };
            if let Some(slot) = next {
                self.condvar(state, slot).notify_one();
            } else if let Some(need) = state.want_room.iter().position(|&waiters| waiters > 0) {
                self.room[need].notify_one();
            }
        }
        self.offer_room(state);
    }

    pub(super) fn offer_room(&self, state: &State) {
        for need in [Need::Small, Need::WaitRun, Need::Large] {
            if state.want_room[need as usize] > 0 && state.has_room(need) {
                self.room[need as usize].notify_one();
            }
        }
        // No condition variable wakes a leader.
        if let Some(Await::Room(need)) = state.leader
            && state.has_room(need)
        {
            signal(&self.call);
        }
    }

    /// Wakes the leader from the call eventfd if another thread has found what it waits for, or
    /// that the queue has ended.
    pub(super) fn call_leader(&self, state: &State) {
        if let Some(what) = state.leader
            && (state.has(what) || state.failure.is_some())
        {
            signal(&self.call);
        }
    }

    /// Ends the queue; the first reason stays.
    pub(super) fn fail(&self, state: &mut State, failure: Failure) {
        state.failure.get_or_insert(failure);
        for condvar in self.done.iter().chain(&self.room).chain([&self.runs]) {
            condvar.notify_all();
        }
        self.call_leader(state);
    }
}
