//! The queue's lock, and those who are woken once it is free: woken before, each would run into it.

use std::ops::{Deref, DerefMut};
use std::sync::{MutexGuard, PoisonError};

use super::Shared;
use super::slots::State;
use vhost_user_timer_protocol::MAX_QUEUE_SIZE;

const WORDS: usize = MAX_QUEUE_SIZE as usize / u64::BITS as usize;

/// Slots whose waiters are to be woken, a bit each. There are no more slots than descriptors.
#[derive(Clone, Copy, Default)]
pub(super) struct Wakes {
    any: bool,
    /// Whoever waits to run.
    runs: bool,
    slots: [u64; WORDS],
}

impl Wakes {
    /// The waiter of a slot: one who waits to run, together with all who do.
    pub(super) fn add(&mut self, slot: u16, runs: bool) {
        self.any = true;
        self.runs |= runs;
        if runs {
            return;
        }
        let (word, bit) = (slot / 64, slot % 64);
        self.slots[usize::from(word)] |= 1 << bit;
    }

    /// Wakes them, of whom there are none then.
    fn carry_out(self, shared: &Shared) {
        if self.runs {
            shared.runs.notify_all();
        }
        for (word, mut bits) in self.slots.into_iter().enumerate() {
            while bits != 0 {
                let slot = 64 * word + bits.trailing_zeros() as usize;
                shared.done[slot].notify_one();
                bits &= bits - 1;
            }
        }
    }
}

/// The queue's state for as long as nobody else has it.
pub(super) struct Locked<'a> {
    shared: &'a Shared,
    /// There, until it is taken out.
    guard: Option<MutexGuard<'a, State>>,
}

impl Shared {
    pub(super) fn lock(&self) -> Locked<'_> {
        let guard = self.state.lock();
        Locked {
            shared: self,
            guard: Some(guard.unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

impl<'a> Locked<'a> {
    /// Gives the lock to `wait`, a condition variable's, and has it back from there.
    pub(super) fn while_free(
        mut self,
        wait: impl FnOnce(MutexGuard<'a, State>) -> MutexGuard<'a, State>,
    ) -> Self {
        if let Some(mut guard) = self.guard.take() {
            std::mem::take(&mut guard.wakes).carry_out(self.shared);
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
        if !guard.wakes.any {
            return;
        }
        let wakes = std::mem::take(&mut guard.wakes);
        drop(guard);
        wakes.carry_out(self.shared);
    }
}
