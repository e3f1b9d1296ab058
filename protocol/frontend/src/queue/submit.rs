//! Putting a request on a queue's ring.

use super::slots::{Await, Need};
use super::{CHAIN, SMALL, Shared};
use crate::ring::{self, DESCRIPTOR};
use crate::turn::ends_armed;
use crate::{Deadline, Error, Operation};
use vhost_user_timer_protocol::Op;

impl Shared {
    /// Puts an operation on the ring; with a deadline, waits for room, and for the thread that
    /// applies offsets if the operation has to.
    pub(super) fn start<T>(
        &self,
        operation: &Operation<'_, T>,
        deadline: Option<Deadline>,
    ) -> Result<u16, Error> {
        loop {
            if let Some(slot) = self.try_start(operation, deadline)? {
                return Ok(slot);
            }
            let Some(deadline) = deadline else {
                let op = operation.op();
                return Err(Error::Applying { op });
            };
            self.session.applying.wait_until_free(deadline)?;
        }
    }

    /// As [`start`](Self::start); `None` if the operation has to wait for the thread that applies
    /// offsets.
    fn try_start<T>(
        &self,
        operation: &Operation<'_, T>,
        deadline: Option<Deadline>,
    ) -> Result<Option<u16>, Error> {
        let (request, answer) = operation.lens()?;
        let large = request.max(answer) > SMALL;
        let wait_run = operation.as_wait_run();
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
        if let Some(slot) = wait_run.and_then(|of| state.adopt(of)) {
            if let Some(intent) = &mut state.slot(slot).intent {
                self.session.history.reissued(intent);
            }
            return Ok(Some(slot));
        }
        if !state.has_room(need) {
            let Some(deadline) = deadline else {
                return Err(Error::QueueFull { queue: self.index });
            };
            // Other requests' answers make room, and those requests may be waiting for a kick.
            drop(state);
            self.kick();
            let waited = self.wait(Await::Room(need), "a free slot", deadline);
            state = waited?;
        }
        let entry = match ends_armed(operation.op()) {
            true => match self.session.applying.enter()? {
                None => return Ok(None),
                entry => entry,
            },
            false => None,
        };
        // `lens` keeps both below 2^32.
        let (request, answer) = (request as u32, answer as u32);
        let history = &self.session.history;
        let intent = history.intent(operation.kind(), operation.epoch(), state.begins);
        let Some(slot) = state.take_free(need, wait_run, answer, intent) else {
            return Err(Error::QueueFull { queue: self.index });
        };
        state.begins += u16::from(operation.op() == Op::RestoreBegin);

        let memory = &self.session.memory;
        let (request_at, answer_at) = self.layout.buffers(slot, large);
        operation.write(memory, request_at);
        let head = slot * self.layout.descriptors_per_slot();
        let (first, next) = match self.layout.tables {
            Some(tables) => (tables + DESCRIPTOR * usize::from(slot * CHAIN), 1),
            None => (state.ring.descriptor(head), head + 1),
        };
        // Mostly unchanged; then the lines stay in the backend's cache.
        let laid = Some((request, answer, large));
        if std::mem::replace(&mut state.laid[usize::from(slot)], laid) != laid {
            let readable = memory.address(request_at);
            let readable = ring::descriptor(readable, request, ring::NEXT, next);
            let writable = memory.address(answer_at);
            let writable = ring::descriptor(writable, answer, ring::WRITE, 0);
            memory.write(first, &readable);
            memory.write(first + DESCRIPTOR, &writable);
        }
        state.ring.push(head, answer);
        if let Some(entry) = entry {
            entry.sent();
        }
        Ok(Some(slot))
    }
}
