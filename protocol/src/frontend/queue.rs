//! A request queue: many threads, one ring.
//!
//! Guarantees: an answer goes to the one who asked, however the backend orders them; a thread
//! that waits is woken by its own answer, its deadline, or the queue's end, and by little else;
//! small requests allocate nothing; and WAIT_RUNs, however many, never keep another request out.
//!
//! Of the threads that wait, one at a time leads: it sleeps on the call eventfd and hands the
//! others their answers; the others sleep on condition variables, one per slot. A leader that
//! leaves makes another one lead. There is no thread of the library's own.
//!
//! A request that its caller gives up stays with the backend, and its slot taken, until it is
//! answered: there is no cancelling on the wire. A WAIT_RUN given up is taken over by the next
//! one for the same vCPU, so that a vCPU thread can wait in short turns.

mod layout;
mod ticket;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::call::{About, Answer, Reply};
use super::error::{Failure, Fault};
use super::memory::SharedMemory;
use super::ring::{self, DESCRIPTOR, Ring};
use super::wait::{Deadline, Link, Woken, drain, eventfd, signal};
use super::{Call, Error};

pub(super) use layout::QueueLayout;
pub use ticket::Ticket;

/// The bytes of a slot's own request buffer, and of its response buffer. What does not fit goes
/// by the queue's one large pair of buffers.
const SMALL: usize = 512;

/// Descriptors of a request: what the device reads, and what it writes.
const CHAIN: u16 = 2;

/// A request queue, to be cloned and used by any number of threads.
///
/// Every operation comes three ways: as a method that waits, as a [`Call`] for
/// [`submit`](Self::submit), and so as a [`Ticket`], for which a caller waits, polls, or watches
/// the queue's descriptor ([`AsFd`]).
///
/// A queue is ended by the first [`Error::Disconnected`], [`Error::ShutDown`] or
/// [`Error::Protocol`]: every request in flight and every later one fails with the same.
#[derive(Clone)]
pub struct RequestQueue {
    shared: Arc<Shared>,
}

struct Shared {
    index: u16,
    link: Arc<Link>,
    memory: Arc<SharedMemory>,
    layout: QueueLayout,
    call: OwnedFd,
    kick: OwnedFd,
    state: Mutex<State>,
    /// By slot: its request is answered, or its waiter is to lead.
    done: Box<[Condvar]>,
    /// By [`Need`]: there may be room again, or a waiter is to lead.
    room: [Condvar; 3],
}

struct State {
    ring: Ring,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    large_taken: bool,
    /// Slots that hold a WAIT_RUN.
    wait_runs: u16,
    /// WAIT_RUNs in flight that nobody waits for.
    orphans: usize,
    /// How many threads wait for room, by [`Need`].
    want_room: [usize; 3],
    /// How many threads wait for a slot's answer without leading.
    followers: usize,
    /// What the leader waits for: the thread that sleeps on the call eventfd. While there is
    /// one, nobody else reads the eventfd or moves used_event, or it would sleep on.
    leader: Option<Await>,
    failure: Option<Failure>,
}

#[derive(Clone, Copy)]
struct Slot {
    stage: Stage,
    large: bool,
    /// The vCPU and epoch of a WAIT_RUN.
    wait_run: Option<(u32, u64)>,
    /// A thread sleeps on the slot's condition variable.
    followed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Free,
    InFlight,
    /// In flight, and nobody wants the answer.
    Orphaned,
    Done {
        len: u32,
    },
}

/// What a request needs room for.
#[derive(Clone, Copy)]
enum Need {
    Small,
    WaitRun,
    Large,
}

/// What a thread waits for.
#[derive(Clone, Copy)]
enum Await {
    Slot(u16),
    Room(Need),
}

impl State {
    fn has_room(&self, need: Need) -> bool {
        !self.free.is_empty()
            && match need {
                Need::Small => true,
                // The rest is for what makes a VM run: a vCPU that waits must not keep out the
                // ones that it waits for.
                Need::WaitRun => usize::from(self.wait_runs) < self.slots.len() * 3 / 4,
                Need::Large => !self.large_taken,
            }
    }

    fn slot(&mut self, slot: u16) -> &mut Slot {
        &mut self.slots[usize::from(slot)]
    }
}

impl RequestQueue {
    pub(super) fn new(
        index: u16,
        link: Arc<Link>,
        memory: Arc<SharedMemory>,
        layout: QueueLayout,
        event_idx: bool,
    ) -> Result<Self, Error> {
        let ring = Ring::new(memory.clone(), layout.ring, event_idx, 0);
        let slots = layout.slots();
        let free_slot = Slot {
            stage: Stage::Free,
            large: false,
            wait_run: None,
            followed: false,
        };
        if let Some(tables) = layout.tables {
            let len = DESCRIPTOR * usize::from(CHAIN);
            for slot in 0..slots {
                let table = memory.address(tables + usize::from(slot) * len);
                let descriptor = ring::descriptor(table, len as u32, ring::INDIRECT, 0);
                memory.write(ring.descriptor(slot), &descriptor);
            }
        }
        let state = State {
            ring,
            slots: vec![free_slot; usize::from(slots)].into(),
            free: (0..slots).rev().collect(),
            large_taken: false,
            wait_runs: 0,
            orphans: 0,
            want_room: [0; 3],
            followers: 0,
            leader: None,
            failure: None,
        };
        Ok(RequestQueue {
            shared: Arc::new(Shared {
                index,
                link,
                memory,
                layout,
                call: eventfd()?,
                kick: eventfd()?,
                state: Mutex::new(state),
                done: (0..slots).map(|_| Condvar::new()).collect(),
                room: Default::default(),
            }),
        })
    }

    /// The virtqueue's index, from 1.
    pub fn index(&self) -> u16 {
        self.shared.index
    }

    /// How many requests can be in flight at once. Three quarters of them can be WAIT_RUNs.
    pub fn capacity(&self) -> usize {
        self.shared.done.len()
    }

    pub(super) fn vring(&self) -> super::connection::Vring<'_> {
        super::connection::Vring {
            index: self.shared.index,
            layout: self.shared.layout.ring,
            call: &self.shared.call,
            kick: &self.shared.kick,
        }
    }

    /// Notifies the backend whether it wants it or not: it may have missed a notification while
    /// the ring was disabled.
    pub(super) fn force_kick(&self) {
        signal(&self.shared.kick);
    }

    /// Runs a call and waits for its answer, and before that for room, until the deadline.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] by the backend, [`Error::TimedOut`], [`Error::InvalidArgument`], or
    /// what ended the queue.
    pub fn call<T: Answer>(
        &self,
        call: &Call<'_, T>,
        deadline: impl Into<Deadline>,
    ) -> Result<T, Error> {
        let deadline = deadline.into();
        let slot = self.shared.start(call, Some(deadline))?;
        Ticket::new(self.shared.clone(), call, slot).wait(deadline)
    }

    /// Puts a call on the ring without telling the backend; [`kick`](Self::kick) does that for
    /// any number of them.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`], [`Error::InvalidArgument`], or what ended the queue.
    pub fn submit<T: Answer>(&self, call: &Call<'_, T>) -> Result<Ticket<T>, Error> {
        let slot = self.shared.start(call, None)?;
        Ok(Ticket::new(self.shared.clone(), call, slot))
    }

    /// Gives the backend all that was submitted, and notifies it if it wants that.
    pub fn kick(&self) {
        self.shared.kick();
    }

    /// Takes note of what the backend has answered, for tickets that are then
    /// [tried](Ticket::try_wait), and makes the queue's descriptor report the next answer.
    ///
    /// This is what an event loop calls when the descriptor ([`AsFd`]) is readable, and once
    /// before it first sleeps. It reads the descriptor; the caller must not. A blocking wait on
    /// the same queue takes the descriptor's reports for itself, so an event loop should have a
    /// queue of its own. The descriptor does not report a dead backend: watch
    /// [`TimerFrontend`](super::TimerFrontend)'s for that.
    ///
    /// # Errors
    ///
    /// What ended the queue. Tickets that were answered before that can still be tried.
    pub fn process(&self) -> Result<(), Error> {
        let shared = &*self.shared;
        shared.kick();
        let failure = shared.link.failure()?;
        let mut state = shared.lock();
        if state.leader.is_none() {
            // Before the ring is looked at: what comes after that look makes it readable again.
            drain(&shared.call);
        }
        loop {
            shared.reap(&mut state);
            if state.leader.is_some() || state.failure.is_some() || !state.ring.arm() {
                break;
            }
        }
        if let Some(failure) = failure {
            shared.fail(&mut state, failure);
        }
        state.failure.map_or(Ok(()), |failure| Err(failure.into()))
    }
}

impl AsFd for RequestQueue {
    /// The call eventfd: readable when there may be answers. See
    /// [`process`](RequestQueue::process).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.call.as_fd()
    }
}

impl fmt::Debug for RequestQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestQueue")
            .field("index", &self.shared.index)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        let wanted = self.lock().ring.publish();
        // Not under the lock: the system call wakes the backend.
        if wanted {
            signal(&self.kick);
        }
    }

    /// Puts a call on the ring, waiting for room if there is a deadline.
    fn start<T>(&self, call: &Call<'_, T>, deadline: Option<Deadline>) -> Result<u16, Error> {
        let (request, answer) = call.lens()?;
        let large = request.max(answer) > SMALL;
        let wait_run = call.as_wait_run();
        let need = match (large, wait_run) {
            (true, _) => Need::Large,
            (false, Some(_)) => Need::WaitRun,
            (false, None) => Need::Small,
        };
        let mut state = self.lock();
        self.reap(&mut state);
        if let Some(failure) = state.failure {
            return Err(failure.into());
        }
        if let Some(slot) = wait_run.and_then(|of| adopt(&mut state, of)) {
            return Ok(slot);
        }
        if !state.has_room(need) {
            let Some(deadline) = deadline else {
                return Err(Error::QueueFull { queue: self.index });
            };
            // Others' answers make room, and theirs may be waiting for a kick.
            drop(state);
            self.kick();
            let waited = self.wait(Await::Room(need), "a free slot", deadline);
            state = waited?;
        }
        let Some(slot) = state.free.pop() else {
            return Err(Error::QueueFull { queue: self.index });
        };
        *state.slot(slot) = Slot {
            stage: Stage::InFlight,
            large,
            wait_run,
            followed: false,
        };
        state.large_taken |= large;
        state.wait_runs += u16::from(wait_run.is_some());

        let (request_at, answer_at) = self.layout.buffers(slot, large);
        call.write(&self.memory, request_at);
        let head = slot * self.layout.descriptors_per_slot();
        let (first, next) = match self.layout.tables {
            Some(tables) => (tables + DESCRIPTOR * usize::from(slot * CHAIN), 1),
            None => (state.ring.descriptor(head), head + 1),
        };
        // `lens` keeps both below 2^32.
        let (request, answer) = (request as u32, answer as u32);
        let readable = self.memory.address(request_at);
        let readable = ring::descriptor(readable, request, ring::NEXT, next);
        let writable = self.memory.address(answer_at);
        let writable = ring::descriptor(writable, answer, ring::WRITE, 0);
        self.memory.write(first, &readable);
        self.memory.write(first + DESCRIPTOR, &writable);
        state.ring.push(head, answer);
        Ok(slot)
    }

    /// Waits as a leader or a follower. On success the lock is still held.
    fn wait(
        &self,
        what: Await,
        name: &'static str,
        deadline: Deadline,
    ) -> Result<MutexGuard<'_, State>, Error> {
        let mut state = self.lock();
        let result = loop {
            self.reap(&mut state);
            let ready = match what {
                Await::Slot(slot) => matches!(state.slot(slot).stage, Stage::Done { .. }),
                Await::Room(need) => state.has_room(need),
            };
            if ready && (state.failure.is_none() || matches!(what, Await::Slot(_))) {
                break Ok(());
            }
            if let Some(failure) = state.failure {
                break Err(failure.into());
            }
            if deadline.has_passed() {
                break Err(Error::TimedOut { what: name });
            }
            if state.leader.is_some() {
                state = self.follow(state, what, deadline);
                continue;
            }
            if state.ring.arm() {
                continue;
            }
            state.leader = Some(what);
            drop(state);
            let woken = self.link.wait(self.call.as_fd(), deadline);
            if matches!(woken, Ok(Woken::Called)) {
                drain(&self.call);
            }
            state = self.lock();
            state.leader = None;
            state.ring.disarm();
            match woken {
                Ok(Woken::Called | Woken::TimedOut) => {}
                Ok(Woken::Failed(failure)) => {
                    // It may have answered before it went.
                    self.reap(&mut state);
                    self.fail(&mut state, failure);
                }
                Err(error) => break Err(error),
            }
        };
        self.pass_on(&state);
        result.map(|()| state)
    }

    /// Sleeps until a leader says that it is worth another look.
    fn follow<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        what: Await,
        deadline: Deadline,
    ) -> MutexGuard<'a, State> {
        let condvar = match what {
            Await::Slot(slot) => {
                state.slot(slot).followed = true;
                state.followers += 1;
                &self.done[usize::from(slot)]
            }
            Await::Room(need) => {
                state.want_room[need as usize] += 1;
                &self.room[need as usize]
            }
        };
        state = match deadline.remaining() {
            Some(left) => {
                let woken = condvar.wait_timeout(state, left);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
            None => condvar.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
        match what {
            Await::Slot(slot) => {
                state.slot(slot).followed = false;
                state.followers -= 1;
            }
            Await::Room(need) => state.want_room[need as usize] -= 1,
        }
        state
    }

    /// What a thread owes the others when it stops waiting: a leader, and the room that it was
    /// told of and did not take.
    fn pass_on(&self, state: &State) {
        if state.leader.is_none() && state.failure.is_none() {
            let next = match state.followers {
                0 => None,
                _ => state.slots.iter().position(|slot| slot.followed),
            };
            if let Some(slot) = next {
                self.done[slot].notify_one();
            } else if let Some(need) = state.want_room.iter().position(|&waiters| waiters > 0) {
                self.room[need].notify_one();
            }
        }
        self.offer_room(state);
    }

    fn offer_room(&self, state: &State) {
        for need in [Need::Small, Need::WaitRun, Need::Large] {
            if state.want_room[need as usize] > 0 && state.has_room(need) {
                self.room[need as usize].notify_one();
            }
        }
        // A leader sleeps where no condition variable reaches it.
        if let Some(Await::Room(need)) = state.leader
            && state.has_room(need)
        {
            signal(&self.call);
        }
    }

    /// Takes what the backend is done with off the ring.
    fn reap(&self, state: &mut State) {
        while state.failure.is_none() {
            match state.ring.pop() {
                Ok(Some(used)) => {
                    let slot = used.head / self.layout.descriptors_per_slot();
                    self.complete(state, slot, used.len);
                }
                Ok(None) => break,
                Err(fault) => self.fault(state, fault.into()),
            }
        }
    }

    fn complete(&self, state: &mut State, slot: u16, len: u32) {
        let entry = state.slot(slot);
        match entry.stage {
            Stage::InFlight => {
                entry.stage = Stage::Done { len };
                if entry.followed {
                    self.done[usize::from(slot)].notify_one();
                }
            }
            Stage::Orphaned => self.free(state, slot),
            // The ring gives only heads that were posted.
            Stage::Free | Stage::Done { .. } => {}
        }
    }

    fn free(&self, state: &mut State, slot: u16) {
        let Slot {
            stage,
            large,
            wait_run,
            ..
        } = *state.slot(slot);
        if wait_run.is_some() {
            state.wait_runs -= 1;
            state.orphans -= usize::from(stage == Stage::Orphaned);
        }
        if large {
            state.large_taken = false;
        }
        *state.slot(slot) = Slot {
            stage: Stage::Free,
            large: false,
            wait_run: None,
            followed: false,
        };
        state.free.push(slot);
        self.offer_room(state);
    }

    fn fault(&self, state: &mut State, fault: Fault) {
        let queue = self.index;
        self.fail(state, Failure::Protocol { queue, fault });
    }

    /// Ends the queue; the first reason stays.
    fn fail(&self, state: &mut State, failure: Failure) {
        state.failure.get_or_insert(failure);
        for condvar in self.done.iter().chain(&self.room) {
            condvar.notify_all();
        }
        if state.leader.is_some() {
            // The leader sleeps on this.
            signal(&self.call);
        }
    }

    /// The answer of a slot, which is then free.
    fn take<T: Answer>(
        &self,
        mut state: MutexGuard<'_, State>,
        slot: u16,
        len: u32,
        about: &About,
    ) -> Result<T, Error> {
        let large = state.slot(slot).large;
        let (_, at) = self.layout.buffers(slot, large);
        // The ring keeps it at or below what was posted.
        let len = len as usize;
        let mut small = [0; SMALL];
        let mut heap = Vec::new();
        let bytes = match small.get_mut(..len) {
            Some(bytes) => bytes,
            None => {
                heap.resize(len, 0);
                &mut heap[..]
            }
        };
        self.memory.read(at, bytes);
        self.free(&mut state, slot);
        about.parse(bytes).map_err(|reply| match reply {
            Reply::Refused(refusal) => refusal.into(),
            Reply::Version(version) => Error::Version(version),
            Reply::Fault(fault) => {
                self.fault(&mut state, fault);
                Error::Protocol {
                    queue: self.index,
                    fault,
                }
            }
        })
    }
}

/// Takes over a WAIT_RUN that its caller gave up.
fn adopt(state: &mut State, of: (u32, u64)) -> Option<u16> {
    if state.orphans == 0 {
        return None;
    }
    let orphan = |slot: &Slot| slot.stage == Stage::Orphaned && slot.wait_run == Some(of);
    let slot = state.slots.iter().position(orphan)?;
    state.slots[slot].stage = Stage::InFlight;
    state.orphans -= 1;
    u16::try_from(slot).ok()
}
