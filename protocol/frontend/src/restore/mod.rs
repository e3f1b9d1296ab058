//! A restore as an object: nobody runs before every vCPU has its timers back, and if that cannot
//! be, nobody runs at all.

mod options;
mod vcpu;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::error::VmShape;
use crate::sys::{eventfd, lock, signal};
use crate::wait::Woken;
use crate::wait_set::WaitSet;
use crate::{
    Deadline, Error, Frontend, Info, InvalidArgument, NewEpoch, Operation, RequestQueue, SavedVcpu,
    SavedVm,
};
use vhost_user_timer_protocol::{Phase, Status};

pub use options::RestoreOptions;
pub use vcpu::VcpuRestore;

/// A restore that is open in the backend. [`Frontend::restore`] opens it.
///
/// Each vCPU thread gets its [part](Self::vcpu) and [runs](VcpuRestore::run) it. The thread that
/// holds this object [waits](Self::wait) until all vCPUs have their registers back.
///
/// Dropping it aborts the restore (RESTORE_ABORT) unless every vCPU has its registers back by then:
/// the VM is PAUSED as it was before, and every part ends with an error. The abort names this
/// restore's epoch, so it never ends a later restore. It takes
/// [`Options::timeout`](crate::Options::timeout) at most, also over a dead backend.
#[must_use = "dropping a restore aborts it"]
pub struct Restore {
    shared: Arc<Shared>,
    /// Reports when `shared` has changed, or the connection has.
    wait_set: WaitSet,
}

/// What a restore's parts share.
struct Shared {
    queues: Box<[RequestQueue]>,
    epoch: u64,
    /// By index.
    vcpus: Box<[SavedVcpu]>,
    /// How long an abort may take.
    timeout: Duration,
    progress: Mutex<Progress>,
    /// Readable when `progress` has changed.
    changed: OwnedFd,
}

/// How far a restore is.
struct Progress {
    /// By vCPU: its part was given away.
    taken: Box<[bool]>,
    /// By vCPU: RESTORE_DONE was answered.
    done: Box<[bool]>,
    end: Option<End>,
}

/// How a restore ended.
#[derive(Clone, Debug)]
enum End {
    /// Every vCPU has its registers back.
    Complete,
    /// One has not, so it was aborted.
    Failed(RestoreFailure),
    /// It was dropped, and thereby aborted.
    Dropped,
}

/// Which vCPU made a restore fail, and how.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the restore was aborted because vCPU {vcpu} failed")]
#[non_exhaustive]
pub struct RestoreFailure {
    /// The vCPU that failed first; of a restore that timed out, the first one that was missing.
    pub vcpu: u32,
    /// Why.
    #[source]
    pub cause: Arc<Error>,
}

impl Frontend {
    /// Saves the VM, by one GET_INFO and one GET_VM. Pause it first: a running VM is read at one
    /// instant, but goes on.
    ///
    /// # Errors
    ///
    /// As every operation of a [`RequestQueue`]; in NEW there is nothing to save (EBUSY).
    pub fn save(&self, deadline: impl Into<Deadline>) -> Result<SavedVm, Error> {
        self.queue().save(deadline)
    }

    /// Opens a restore: configures the VM if it is NEW, and begins a new epoch (RESTORE_BEGIN),
    /// which every request of the restore names.
    ///
    /// It takes [`Options::timeout`](crate::Options::timeout) at most.
    ///
    /// # Errors
    ///
    /// [`InvalidArgument::OtherVm`] where the backend is configured for another VM;
    /// [`Error::Refused`] with EBUSY where the VM is RUNNING; [`Error::TimedOut`]; or what ended
    /// the queue.
    pub fn restore(&self, saved: &SavedVm, options: RestoreOptions) -> Result<Restore, Error> {
        let queue = self.queue();
        let timeout = self.session.timeout;
        let deadline = Deadline::from(timeout);
        let changed = eventfd()?;
        let wait_set = WaitSet::new(&self.session.watch, changed.as_fd())?;
        let vcpus: Box<[SavedVcpu]> = saved.vcpus().into();
        let count = vcpus.len() as u32;
        let info = queue.info(deadline)?;
        if info.phase == Phase::New {
            queue.configure(count, saved.abi(), Some(saved.frequency()), deadline)?;
        } else {
            is_the_same_vm(saved, &info)?;
        }
        let begin = Operation::restore_begin(count, options);
        let NewEpoch(epoch) = queue.perform(&begin, deadline)?;
        let none = || vec![false; vcpus.len()].into();
        let progress = Progress {
            taken: none(),
            done: none(),
            end: None,
        };
        let shared = Arc::new(Shared {
            queues: self.queues().into(),
            epoch,
            vcpus,
            timeout,
            progress: Mutex::new(progress),
            changed,
        });
        Ok(Restore { shared, wait_set })
    }
}

fn is_the_same_vm(saved: &SavedVm, info: &Info) -> Result<(), Error> {
    let backend = VmShape {
        vcpus: info.vcpus,
        abi: info.abi,
        frequency: info.frequency,
    };
    let saved = VmShape {
        vcpus: saved.vcpus().len() as u32,
        abi: saved.abi(),
        frequency: saved.frequency().get(),
    };
    match saved == backend {
        true => Ok(()),
        false => Err(InvalidArgument::OtherVm { saved, backend }.into()),
    }
}

impl Restore {
    /// The restore's epoch.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// The part of one vCPU, for its thread. `None` where there is no such vCPU, and where its
    /// part was given away already.
    pub fn vcpu(&self, index: u32) -> Option<VcpuRestore> {
        let mut progress = self.shared.progress();
        let taken = progress.taken.get_mut(usize::try_from(index).ok()?)?;
        let free = !std::mem::replace(taken, true);
        drop(progress);
        free.then(|| VcpuRestore::new(self.shared.clone(), index))
    }

    /// The parts that were not given away yet, by index.
    pub fn vcpus(&self) -> impl Iterator<Item = VcpuRestore> {
        (0..self.shared.vcpus.len() as u32).filter_map(|index| self.vcpu(index))
    }

    /// The vCPUs that do not have their registers back yet, by index.
    pub fn missing(&self) -> Vec<u32> {
        self.shared.progress().missing().collect()
    }

    /// Waits until every vCPU has its registers back. Then the VM is RUNNING, with
    /// [`RestoreOptions::autorun`], or PAUSED, and waits for
    /// [`resume`](RequestQueue::resume).
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] names the first vCPU that failed: the restore is aborted.
    /// [`Error::TimedOut`] at the deadline: it goes on, and may be waited for again. Or what ended
    /// the queues.
    pub fn wait(&mut self, deadline: impl Into<Deadline>) -> Result<(), Error> {
        let deadline = deadline.into();
        let session = self.shared.queues[0].session();
        let mut late = false;
        loop {
            match &self.shared.progress().end {
                Some(End::Complete) => return Ok(()),
                Some(End::Failed(failure)) => return Err(failure.clone().into()),
                Some(End::Dropped) | None => {}
            }
            if late {
                return Err(Error::TimedOut { what: "a restore" });
            }
            let generation = session.generation();
            late = match self.wait_set.sleep(&session.watch, deadline)? {
                Woken::Called => false,
                Woken::TimedOut => true,
                Woken::Failed(failure) => match session.outlive(failure, generation, deadline) {
                    Some(failure) => return Err(failure.into()),
                    None => deadline.has_passed(),
                },
            };
        }
    }

    /// As [`wait`](Self::wait), once: a restore that is not complete at the deadline is aborted.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn finish(mut self, deadline: impl Into<Deadline>) -> Result<(), Error> {
        self.wait(deadline)
    }
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }

    fn queue_of(&self, vcpu: u32) -> &RequestQueue {
        &self.queues[vcpu as usize % self.queues.len()]
    }

    /// RESTORE_DONE was answered.
    fn is_done(&self, vcpu: u32, remaining: u32) {
        let mut progress = self.progress();
        progress.done[vcpu as usize] = true;
        if remaining == 0 {
            progress.end.get_or_insert(End::Complete);
        }
        drop(progress);
        signal(&self.changed);
    }

    /// Why a vCPU whose request ended with `error` does not run. The first such vCPU ends the
    /// restore.
    fn failed(&self, vcpu: u32, error: Error) -> Error {
        let mut progress = self.progress();
        match &progress.end {
            Some(End::Complete) => return error,
            Some(End::Failed(failure)) => return failure.clone().into(),
            Some(End::Dropped) => return self.canceled(vcpu),
            None => {}
        }
        // The one that waits is not the one that makes the others wait.
        let timed_out = error.status() == Some(Status::TimedOut);
        let missing = progress.missing().next().filter(|_| timed_out);
        let failure = RestoreFailure {
            vcpu: missing.unwrap_or(vcpu),
            cause: Arc::new(error),
        };
        progress.end = Some(End::Failed(failure.clone()));
        drop(progress);
        self.abort();
        signal(&self.changed);
        failure.into()
    }

    /// What a vCPU of a dropped restore gets.
    fn canceled(&self, vcpu: u32) -> Error {
        let context = Operation::wait_run(vcpu).context();
        context.refused(Status::Canceled, self.epoch).into()
    }

    /// Aborts this restore, and no later one. If it is over already, the backend refuses, and
    /// nothing changes.
    fn abort(&self) {
        let abort = Operation::restore_abort().in_epoch(self.epoch);
        let _ = self.queues[0].perform(&abort, self.timeout);
    }
}

impl Progress {
    fn missing(&self) -> impl Iterator<Item = u32> {
        (0..)
            .zip(&*self.done)
            .filter(|(_, done)| !**done)
            .map(|(index, _)| index)
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        let mut progress = self.shared.progress();
        if progress.end.is_none() {
            progress.end = Some(End::Dropped);
            drop(progress);
            self.shared.abort();
        }
    }
}

impl std::fmt::Debug for Restore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restore")
            .field("epoch", &self.shared.epoch)
            .field("end", &self.shared.progress().end)
            .finish_non_exhaustive()
    }
}
