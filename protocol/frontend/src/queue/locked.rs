//! The queue's lock. Threads are woken once it is free: woken earlier, each would run into it.

use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;

use super::Shared;
use super::slots::{State, Wakes};
use crate::sys;

/// The queue's state, locked.
pub(super) struct Locked<'a> {
    shared: &'a Shared,
    /// `None` only once it is given away.
    guard: Option<MutexGuard<'a, State>>,
}

impl Shared {
    pub(super) fn lock(&self) -> Locked<'_> {
        Locked {
            shared: self,
            guard: Some(sys::lock(&self.state)),
        }
    }

    fn wake(&self, wakes: Wakes) {
        if wakes.runs() {
            self.runs.notify_all();
        }
        wakes.for_each_slot(|slot| self.done[slot].notify_one());
    }
}

impl<'a> Locked<'a> {
    /// Wakes the threads that are to be woken, and lends the lock to `wait`, which sleeps on a
    /// condition variable.
    pub(super) fn while_free(
        mut self,
        wait: impl FnOnce(MutexGuard<'a, State>) -> MutexGuard<'a, State>,
    ) -> Self {
        if let Some(mut guard) = self.guard.take() {
            self.shared.wake(std::mem::take(&mut guard.wakes));
            self.guard = Some(wait(guard));
        }
        self
    }
}

const THERE: &str = "the lock is held until it is dropped";

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        self.guard.as_ref().expect(THERE)
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        self.guard.as_mut().expect(THERE)
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else {
            return;
        };
        if guard.wakes.is_empty() {
            return;
        }
        let wakes = std::mem::take(&mut guard.wakes);
        drop(guard);
        self.shared.wake(wakes);
    }
}
