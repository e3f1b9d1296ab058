//! A request queue's slots: a request each, from its submission until its answer is taken.

use crate::error::Failure;
use crate::replay::Intent;
use crate::ring::DriverRing;
use vhost_user_timer_protocol::MAX_QUEUE_SIZE;

const WORDS: usize = MAX_QUEUE_SIZE as usize / u64::BITS as usize;

/// The slots whose waiters are to be woken, one bit each. A queue has at most as many slots as
/// descriptors.
#[derive(Clone, Copy, Default)]
pub(super) struct Wakes {
    any: bool,
    /// All that wait to run.
    runs: bool,
    slots: [u64; WORDS],
}

impl Wakes {
    /// Adds the waiter of a slot. One that waits to run is woken together with all that do.
    pub(super) fn add(&mut self, slot: u16, runs: bool) {
        self.any = true;
        self.runs |= runs;
        if runs {
            return;
        }
        let (word, bit) = (slot / 64, slot % 64);
        self.slots[usize::from(word)] |= 1 << bit;
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.any
    }

    /// Whether all that wait to run are to be woken.
    pub(super) fn runs(&self) -> bool {
        self.runs
    }

    /// Calls for each slot whose waiter is to be woken.
    pub(super) fn for_each_slot(&self, mut wake: impl FnMut(usize)) {
        for (word, mut bits) in self.slots.into_iter().enumerate() {
            while bits != 0 {
                wake(64 * word + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }
}

/// A queue's state, under one lock.
pub(super) struct State {
    pub(super) ring: DriverRing,
    pub(super) slots: Box<[Slot]>,
    /// By slot, what its descriptors hold: bytes of the request, bytes of the answer, and whether
    /// they are in the large buffers.
    pub(super) laid: Box<[Option<(u32, u32, bool)>]>,
    free: Vec<u16>,
    large_taken: bool,
    /// Slots that hold a WAIT_RUN.
    wait_runs: u16,
    /// WAIT_RUNs in flight that no thread waits for.
    orphans: usize,
    /// RESTORE_BEGINs in flight.
    pub(super) begins: u16,
    /// The sequence number of the next request, and of the first that is not published.
    next: u64,
    unpublished: u64,
    /// The numbers of RESTORE_ABORTs and of recalls at the last look for WAIT_RUNs that they
    /// cancel.
    pub(super) cancels: (u32, u64),
    /// The connection is lost: requests are accepted, but not published.
    pub(super) down: bool,
    /// Threads that wait for room, by [`Need`].
    pub(super) want_room: [usize; 3],
    /// Threads that wait for a slot's answer without leading.
    pub(super) followers: usize,
    /// What the leader waits for, the thread that sleeps on the call eventfd. Any other thread that
    /// reads the eventfd or moves used_event must make sure that the leader does not miss its
    /// answer.
    pub(super) leader: Option<Await>,
    pub(super) failure: Option<Failure>,
    /// The threads to wake when the lock is free.
    pub(super) wakes: Wakes,
}

/// Why a waiting thread does not wait for its WAIT_RUN's answer any longer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Canceled {
    /// Its restore was aborted.
    Aborted,
    /// The offsets could not be applied.
    Recalled,
}

#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub(super) stage: Stage,
    pub(super) large: bool,
    /// The vCPU and epoch of a WAIT_RUN.
    pub(super) wait_run: Option<(u32, u64)>,
    /// A thread sleeps on the slot's condition variable.
    pub(super) followed: bool,
    /// Its waiting thread gets this. The backend may never answer it.
    pub(super) canceled: Option<Canceled>,
    /// Room for the answer, in bytes.
    pub(super) room: u32,
    /// The request's place in the order of submission.
    pub(super) sequence: u64,
    /// `None` in a free slot.
    pub(super) intent: Option<Intent>,
}

const FREE: Slot = Slot {
    stage: Stage::Free,
    large: false,
    wait_run: None,
    followed: false,
    canceled: None,
    room: 0,
    sequence: 0,
    intent: None,
};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Free,
    InFlight,
    /// In flight, and abandoned by its caller.
    Orphaned,
    Done {
        len: u32,
    },
}

impl Slot {
    /// Whether there is an answer to be taken.
    pub(super) fn is_answered(&self) -> bool {
        matches!(self.stage, Stage::Done { .. }) || self.canceled.is_some()
    }
}

/// What a request needs room for.
#[derive(Clone, Copy)]
pub(super) enum Need {
    Small,
    WaitRun,
    Large,
}

/// What a thread waits for.
#[derive(Clone, Copy)]
pub(super) enum Await {
    Slot(u16),
    Room(Need),
}

impl State {
    pub(super) fn new(ring: DriverRing, slots: u16) -> Self {
        State {
            ring,
            slots: vec![FREE; usize::from(slots)].into(),
            laid: vec![None; usize::from(slots)].into(),
            free: (0..slots).rev().collect(),
            large_taken: false,
            wait_runs: 0,
            orphans: 0,
            begins: 0,
            next: 0,
            unpublished: 0,
            cancels: (0, 0),
            down: false,
            want_room: [0; 3],
            followers: 0,
            leader: None,
            failure: None,
            wakes: Wakes::default(),
        }
    }

    pub(super) fn has_room(&self, need: Need) -> bool {
        !self.free.is_empty()
            && match need {
                Need::Small => true,
                // The rest is for the requests that make the VM run: a waiting vCPU must not keep
                // out the vCPUs that it waits for.
                Need::WaitRun => usize::from(self.wait_runs) < self.slots.len() * 3 / 4,
                Need::Large => !self.large_taken,
            }
    }

    /// Whether what a thread waits for is there.
    pub(super) fn has(&self, what: Await) -> bool {
        match what {
            Await::Slot(slot) => self.slots[usize::from(slot)].is_answered(),
            Await::Room(need) => self.has_room(need),
        }
    }

    pub(super) fn slot(&mut self, slot: u16) -> &mut Slot {
        &mut self.slots[usize::from(slot)]
    }

    /// Takes a free slot for a request.
    pub(super) fn take_free(
        &mut self,
        need: Need,
        wait_run: Option<(u32, u64)>,
        room: u32,
        intent: Intent,
    ) -> Option<u16> {
        let slot = self.free.pop()?;
        let large = matches!(need, Need::Large);
        *self.slot(slot) = Slot {
            stage: Stage::InFlight,
            large,
            wait_run,
            followed: false,
            canceled: None,
            room,
            sequence: self.next,
            intent: Some(intent),
        };
        self.next += 1;
        self.large_taken |= large;
        self.wait_runs += u16::from(wait_run.is_some());
        Some(slot)
    }

    pub(super) fn free(&mut self, slot: u16) {
        let freed = std::mem::replace(self.slot(slot), FREE);
        if freed.wait_run.is_some() {
            self.wait_runs -= 1;
            self.orphans -= usize::from(freed.stage == Stage::Orphaned);
        }
        if freed.large {
            self.large_taken = false;
        }
        self.free.push(slot);
    }

    /// The caller abandons the answer.
    pub(super) fn orphan(&mut self, slot: u16) {
        let entry = self.slot(slot);
        entry.stage = Stage::Orphaned;
        let wait_run = entry.wait_run.is_some();
        self.orphans += usize::from(wait_run);
    }

    /// Takes over a WAIT_RUN that its caller abandoned.
    pub(super) fn adopt(&mut self, of: (u32, u64)) -> Option<u16> {
        if self.orphans == 0 {
            return None;
        }
        let orphan = |slot: &Slot| slot.stage == Stage::Orphaned && slot.wait_run == Some(of);
        let slot = self.slots.iter().position(orphan)?;
        self.slots[slot].stage = Stage::InFlight;
        self.slots[slot].canceled = None;
        self.orphans -= 1;
        u16::try_from(slot).ok()
    }

    /// Makes everything submitted available to the backend, if there is one. Returns whether to
    /// notify it.
    pub(super) fn publish(&mut self) -> bool {
        if self.down {
            return false;
        }
        self.unpublished = self.next;
        self.ring.publish()
    }

    /// Whether the backend can have seen the slot's request.
    pub(super) fn was_published(&self, slot: &Slot) -> bool {
        slot.sequence < self.unpublished
    }

    /// Publishes everything in flight. The ring must be published before the backend gets it.
    pub(super) fn publish_all(&mut self) {
        self.unpublished = self.next;
        self.ring.publish();
    }
}
