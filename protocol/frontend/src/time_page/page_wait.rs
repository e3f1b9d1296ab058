//! Waiting for RUNNING by the time page. ARMED is waited in, as RESTORING and PAUSED are.
//!
//! Threads that find the VM in the same state wait together, in a [`SharedWait`]. It has one
//! WAIT_RUN in flight. One thread leads: it waits for that request's answer. The others sleep on
//! the page's futex, and return when the page says RUNNING. The request is older than any of the
//! waits, so from its answer all threads learn what the page cannot tell: that the restore was
//! aborted or timed out, that the backend is gone, that it came back. A leader that leaves, or has
//! an answer, makes the others look again, and one of them leads.

use std::sync::{Arc, Mutex, OnceLock, TryLockError, Weak};
use std::time::Duration;

use super::{NUDGE, PageTime, TimePage};
use crate::sys::lock;
use crate::{ApplyFailure, Deadline, Error, Operation, Refusal, RequestQueue, Run, Ticket};
use vhost_user_timer_protocol::{Phase, Status};

/// The longest sleep on the futex, so that a backend that never wakes it delays nobody for longer.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The offsets that a vCPU runs with: what the time page and WAIT_RUN have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offsets {
    /// Host count − virtual count, modulo 2^64.
    pub cntvoff: u64,
    /// Host count − physical count, modulo 2^64.
    pub cntpoff: u64,
}

impl From<Run> for Offsets {
    fn from(run: Run) -> Self {
        Offsets {
            cntvoff: run.cntvoff,
            cntpoff: run.cntpoff,
        }
    }
}

/// Where threads that wait by the page find each other.
#[derive(Default)]
pub(super) struct PageWait {
    /// The latest one; gone when no thread is in it.
    last: Mutex<Weak<SharedWait>>,
}

/// Threads that wait together. Each of them found the page in the same state as the first, so the
/// request was not answered when it joined.
struct SharedWait {
    epoch: u64,
    wake: u32,
    /// The vCPU that the request names.
    vcpu: u32,
    /// The thread that has locked it leads.
    ticket: Mutex<Ticket<Run>>,
    outcome: OnceLock<Outcome>,
}

/// The result of the shared request.
#[derive(Clone, Debug)]
enum Outcome {
    Run(Offsets),
    /// The offsets could not be applied.
    Unapplied(ApplyFailure),
    /// For a reason that applies to every waiting thread.
    Refused(Refusal),
    /// It ended for a reason that does not apply to every thread.
    Replay,
}

impl RequestQueue {
    /// As [`wait_run`](Self::wait_run), by the time page if the backend writes one
    /// ([`TimePage::start`]). While the page says RUNNING, it makes no request. Otherwise all
    /// waiting threads share one WAIT_RUN and are woken by the page. Without a page it is WAIT_RUN.
    ///
    /// It returns what WAIT_RUN would, with two exceptions: with the page, it does not check that
    /// the vCPU exists; and a RUNNING that ends before the thread has looked may go unnoticed, and
    /// the thread waits on.
    ///
    /// # Errors
    ///
    /// As [`wait_run`](Self::wait_run).
    pub fn wait_run_by_page(
        &self,
        vcpu: u32,
        deadline: impl Into<Deadline>,
    ) -> Result<Offsets, Error> {
        self.wait_by_page_in(vcpu, 0, || Ok(()), deadline.into())
    }

    /// As [`wait_run_by_page`](Self::wait_run_by_page), in this epoch, or in any if that is 0.
    /// `check` says whether to wait on. It is called once a WAIT_RUN is submitted.
    pub(crate) fn wait_by_page_in(
        &self,
        vcpu: u32,
        epoch: u64,
        check: impl Fn() -> Result<(), Error>,
        deadline: Deadline,
    ) -> Result<Offsets, Error> {
        let session = self.shared.session();
        loop {
            let time = session.page.read();
            match time.filter(|time| [0, time.epoch].contains(&epoch)) {
                Some(time) if time.phase == Phase::Running => {
                    check()?;
                    // A page that no backend writes any more may be wrong.
                    if let Some(offsets) = offsets(&time)
                        && session.watch.failure()?.is_none()
                    {
                        return Ok(offsets);
                    }
                }
                Some(time) if time.phase != Phase::New => {
                    if let Some(result) = self.wait_together(&time, vcpu, &check, deadline)? {
                        return result;
                    }
                    continue;
                }
                _ => {}
            }
            let wait = Operation::wait_run(vcpu).in_epoch(epoch);
            let ticket = self.submit_by(&wait, deadline)?;
            check()?;
            return ticket.wait(deadline).map(Offsets::from);
        }
    }

    /// Waits with all threads that found the page in this state; `None` if another look is
    /// worthwhile.
    fn wait_together(
        &self,
        time: &PageTime,
        vcpu: u32,
        check: impl Fn() -> Result<(), Error>,
        deadline: Deadline,
    ) -> Result<Option<Result<Offsets, Error>>, Error> {
        let page = &self.shared.session().page;
        match self.join(page, time, vcpu) {
            Ok(shared) => {
                check()?;
                Ok(shared.wait(page, vcpu, deadline))
            }
            // Other requests fill the queue: there will be room.
            Err(Error::QueueFull { .. }) => {
                let wait = Operation::wait_run(vcpu).in_epoch(time.epoch);
                let ticket = self.submit_by(&wait, deadline)?;
                check()?;
                let run = ticket.wait(deadline)?;
                Ok(Some(Ok(run.into())))
            }
            Err(error) => Err(error),
        }
    }

    fn join(&self, page: &TimePage, time: &PageTime, vcpu: u32) -> Result<Arc<SharedWait>, Error> {
        let mut last = lock(&page.waiters.last);
        let open = last.upgrade().filter(|shared| {
            // Apart from nudges, which say nothing of the VM.
            shared.epoch == time.epoch
                && (shared.wake ^ time.wake).is_multiple_of(NUDGE)
                && shared.outcome.get().is_none()
        });
        if let Some(shared) = open {
            return Ok(shared);
        }
        let ticket = self.submit(&Operation::wait_run(vcpu).in_epoch(time.epoch))?;
        let shared = Arc::new(SharedWait {
            epoch: time.epoch,
            wake: time.wake,
            vcpu,
            ticket: Mutex::new(ticket),
            outcome: OnceLock::new(),
        });
        *last = Arc::downgrade(&shared);
        Ok(shared)
    }
}

impl SharedWait {
    /// `None` if another look is worthwhile.
    fn wait(
        &self,
        page: &TimePage,
        vcpu: u32,
        deadline: Deadline,
    ) -> Option<Result<Offsets, Error>> {
        loop {
            // Read before anything else: a later change ends the sleep at once.
            let wake = page.wake().load(std::sync::atomic::Ordering::Acquire);
            if let Some(outcome) = self.outcome.get() {
                return outcome.of(vcpu);
            }
            if let Some(time) = page.read()
                && time.epoch == self.epoch
                && let Some(offsets) = offsets(&time)
            {
                return Some(Ok(offsets));
            }
            if deadline.has_passed() {
                return Some(Err(Error::TimedOut { what: "WAIT_RUN" }));
            }
            let mut ticket = match self.ticket.try_lock() {
                Ok(ticket) => ticket,
                Err(TryLockError::Poisoned(ticket)) => ticket.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    let left = deadline.remaining().unwrap_or(LOOK_AGAIN);
                    if let Err(error) = page.sleep(wake, left.min(LOOK_AGAIN)) {
                        return Some(Err(error));
                    }
                    continue;
                }
            };
            if self.outcome.get().is_some() {
                // The ticket is spent.
                continue;
            }
            let answer = ticket.wait_longer(deadline);
            let result = self.answered(vcpu, answer);
            drop(ticket);
            page.nudge();
            return result;
        }
    }

    /// Records the answer that the leader got.
    fn answered(&self, vcpu: u32, answer: Result<Run, Error>) -> Option<Result<Offsets, Error>> {
        let outcome = match &answer {
            // The request is still in flight; another thread waits for it.
            Err(Error::TimedOut { .. }) => return answer.err().map(Err),
            Ok(run) => Outcome::Run((*run).into()),
            Err(Error::Refused(refusal))
                if matches!(
                    refusal.status,
                    Status::Stale | Status::Canceled | Status::TimedOut
                ) =>
            {
                Outcome::Refused(*refusal)
            }
            Err(Error::Apply(failure)) => Outcome::Unapplied(failure.clone()),
            Err(_) => Outcome::Replay,
        };
        let _ = self.outcome.set(outcome.clone());
        match outcome {
            // The refusal was about another vCPU.
            Outcome::Replay if matches!(answer, Err(Error::Refused(_))) && self.vcpu != vcpu => {
                None
            }
            Outcome::Replay => answer.err().map(Err),
            outcome => outcome.of(vcpu),
        }
    }
}

impl Outcome {
    fn of(&self, vcpu: u32) -> Option<Result<Offsets, Error>> {
        match self {
            Outcome::Run(offsets) => Some(Ok(*offsets)),
            Outcome::Unapplied(failure) => Some(Err(failure.clone().into())),
            Outcome::Refused(refusal) => {
                let vcpu = Some(vcpu);
                Some(Err(Refusal { vcpu, ..*refusal }.into()))
            }
            Outcome::Replay => None,
        }
    }
}

/// The offsets that a vCPU may run with, if the page says RUNNING.
fn offsets(time: &PageTime) -> Option<Offsets> {
    let counting = time.frozen_virt_count.is_none() && time.frozen_phys_count.is_none();
    (time.phase == Phase::Running && counting).then_some(Offsets {
        cntvoff: time.cntvoff,
        cntpoff: time.cntpoff,
    })
}
