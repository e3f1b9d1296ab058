//! Whose turn it is to apply a VM's offsets.
//!
//! The thread that applies has its [`Turn`] from before it reads the phase and the offsets until
//! CONFIRM_RUN is answered. No other thread applies meanwhile, and whatever ends an ARMED
//! ([`ends_armed`]) waits for the turn's end before it is put on a ring. So nothing is applied that
//! is over, and nothing in RUNNING.

use std::error::Error as StdError;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, ThreadId};

use rustix::event::{PollFd, PollFlags};

use crate::sys::{drain, eventfd, lock, poll, signal};
use crate::{Deadline, Error, Info, InvalidArgument, ShutdownHandle};
use vhost_user_timer_protocol::Op;

/// Why an `apply` closure could not put the offsets into the hypervisor.
pub type ApplyError = Box<dyn StdError + Send + Sync>;

/// The offsets could not be applied, so nobody runs.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the VM's offsets were not applied to the hypervisor, so no vCPU runs")]
#[non_exhaustive]
pub struct ApplyFailure {
    /// Why: the closure's error, or what the library or the backend refused.
    #[source]
    pub cause: Arc<dyn StdError + Send + Sync>,
}

/// Whether an operation may end an ARMED, or change its offsets.
pub(crate) fn ends_armed(op: Op) -> bool {
    matches!(
        op,
        Op::Pause | Op::Resume | Op::RestoreBegin | Op::RestoreAbort | Op::ConfirmRun
    )
}

/// Who applies, and what was applied.
pub(crate) struct Applying {
    state: Mutex<State>,
    /// Readable while nobody has the turn.
    free: OwnedFd,
    shutdown: ShutdownHandle,
}

#[derive(Default)]
pub(crate) struct State {
    /// The thread that has the turn.
    by: Option<ThreadId>,
    /// That thread is in the caller's closure.
    in_closure: bool,
    /// How many operations that end an ARMED were sent.
    moves: u64,
    /// The ARMED whose offsets were applied last.
    applied: Option<Armed>,
    failure: Option<ApplyFailure>,
}

/// What tells one ARMED from another.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Armed {
    epoch: u64,
    moves: u64,
    cntvoff: u64,
    cntpoff: u64,
}

/// The right to apply. Dropping it ends the turn, also where the closure panics.
pub(crate) struct Turn<'a>(&'a Applying);

/// Kept while an operation that ends an ARMED is put on its ring: until then nobody gets the turn.
pub(crate) struct Entry<'a>(MutexGuard<'a, State>);

impl Applying {
    pub(crate) fn new(shutdown: ShutdownHandle) -> Result<Self, Error> {
        let free = eventfd()?;
        signal(&free);
        Ok(Applying {
            state: Mutex::default(),
            free,
            shutdown,
        })
    }

    /// Waits for the turn.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`], [`Error::ShutDown`], and [`InvalidArgument::InsideApply`] where this
    /// thread has it.
    pub(crate) fn turn(&self, deadline: Deadline) -> Result<Turn<'_>, Error> {
        let mut state = self.free(deadline)?;
        state.by = Some(thread::current().id());
        drain(&self.free);
        Ok(Turn(self))
    }

    /// Lets an operation that ends an ARMED in; `None` while another thread has the turn.
    pub(crate) fn enter(&self) -> Result<Option<Entry<'_>>, Error> {
        let state = lock(&self.state);
        let this = thread::current().id();
        match state.by {
            Some(by) if by != this => Ok(None),
            Some(_) if state.in_closure => Err(InvalidArgument::InsideApply.into()),
            _ => Ok(Some(Entry(state))),
        }
    }

    /// Waits until nobody has the turn.
    pub(crate) fn wait_until_free(&self, deadline: Deadline) -> Result<(), Error> {
        self.free(deadline).map(drop)
    }

    fn free(&self, deadline: Deadline) -> Result<MutexGuard<'_, State>, Error> {
        loop {
            let state = lock(&self.state);
            match state.by {
                None => return Ok(state),
                Some(by) if by == thread::current().id() => {
                    return Err(InvalidArgument::InsideApply.into());
                }
                Some(_) => drop(state),
            }
            let mut fds = [
                PollFd::new(&self.free, PollFlags::IN),
                PollFd::from_borrowed_fd(self.shutdown.as_fd(), PollFlags::IN),
            ];
            poll(&mut fds, deadline)?;
            if !fds[1].revents().is_empty() {
                return Err(Error::ShutDown);
            } else if fds[0].revents().is_empty() {
                return Err(Error::TimedOut {
                    what: "the thread that applies the offsets",
                });
            }
        }
    }

    /// Why the offsets could not be applied the last time.
    pub(crate) fn failure(&self) -> Option<ApplyFailure> {
        lock(&self.state).failure.clone()
    }
}

impl Entry<'_> {
    /// The operation is on the ring. The confirmation, from within the turn, leads on to RUNNING
    /// and to no other ARMED.
    pub(crate) fn sent(mut self) {
        self.0.moves += u64::from(self.0.by.is_none());
    }
}

impl Turn<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }

    /// Keeps why the offsets could not be applied.
    pub(crate) fn failed(&self, failure: ApplyFailure) {
        self.state().failure = Some(failure);
    }

    /// Calls the closure, unless this ARMED's offsets were applied already: then only the
    /// confirmation is missing.
    pub(crate) fn apply_once(
        &self,
        info: &Info,
        apply: impl FnOnce(&Info) -> Result<(), ApplyError>,
    ) -> Result<(), ApplyFailure> {
        let mut state = self.state();
        let armed = Armed {
            epoch: info.epoch,
            moves: state.moves,
            cntvoff: info.cntvoff,
            cntpoff: info.cntpoff,
        };
        if state.applied == Some(armed) {
            return Ok(());
        }
        state.applied = None;
        state.in_closure = true;
        drop(state);
        let applied = apply(info);
        let mut state = self.state();
        state.in_closure = false;
        applied.map_err(|cause| ApplyFailure {
            cause: cause.into(),
        })?;
        state.applied = Some(armed);
        Ok(())
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.state();
        (state.by, state.in_closure) = (None, false);
        signal(&self.0.free);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn what_ends_an_armed_waits_for_the_turn_or_the_shutdown_and_fails_inside_of_the_closure() {
        let applying = Applying::new(ShutdownHandle::new().unwrap()).unwrap();
        let turn = applying.turn(LONG.into()).unwrap();
        // This thread may send the confirmation.
        applying.enter().unwrap().unwrap().sent();
        thread::scope(|scope| {
            let others = scope.spawn(|| {
                assert!(applying.enter().unwrap().is_none());
                let late = applying.wait_until_free(Duration::ZERO.into());
                assert!(matches!(late, Err(Error::TimedOut { .. })));
            });
            others.join().unwrap();
        });
        turn.state().in_closure = true;
        let inside = |error| matches!(error, Error::InvalidArgument(InvalidArgument::InsideApply));
        assert!(applying.enter().is_err_and(inside));
        assert!(applying.turn(LONG.into()).is_err_and(inside));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| applying.wait_until_free(Deadline::NEVER));
            drop(turn);
            waiting.join().unwrap().unwrap();
        });
        assert!(applying.enter().unwrap().is_some());
        let _turn = applying.turn(LONG.into()).unwrap();
        applying.shutdown.shut_down();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| applying.wait_until_free(Deadline::NEVER));
            let ended = waiting.join().unwrap();
            assert!(matches!(ended, Err(Error::ShutDown)), "{ended:?}");
        });
    }

    #[test]
    fn a_closure_that_panics_gives_the_turn_back() {
        let applying = Applying::new(ShutdownHandle::new().unwrap()).unwrap();
        thread::scope(|scope| {
            let panics = scope.spawn(|| {
                let turn = applying.turn(LONG.into()).unwrap();
                turn.state().in_closure = true;
                std::panic::resume_unwind(Box::new("as a closure might"));
            });
            panics.join().unwrap_err();
        });
        assert!(applying.enter().unwrap().is_some());
    }
}
