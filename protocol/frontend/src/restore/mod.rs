//! A restore as an object: nobody runs before every vCPU has its timers back, and if that cannot
//! be, nobody runs at all.

mod options;
mod vcpu;

use std::os::fd::{AsFd, OwnedFd};
use std::slice::SliceIndex;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::confirm::confirm;
use crate::error::VmShape;
use crate::sys::{eventfd, lock, signal};
use crate::wait::Woken;
use crate::wait_set::WaitSet;
use crate::{
    ApplyError, ApplyFailure, Deadline, Error, Frontend, Info, InvalidArgument, NewEpoch,
    Operation, Remaining, RequestQueue, Run, SavedVcpu, SavedVm, VmOptions,
};
use vhost_user_timer_protocol::{Phase, Status};

pub use options::RestoreOptions;
pub use vcpu::VcpuRestore;

/// A restore that is open in the backend. [`Frontend::restore`] opens it.
///
/// Each vCPU thread gets its [part](Self::vcpu) and [runs](VcpuRestore::run) it. The thread that
/// holds this object [waits](Self::wait) until all vCPUs have their registers back. Where the VM
/// has [`VmOptions::confirm`], that thread also [applies](Self::apply) the offsets to the
/// hypervisor, and only then do the vCPUs run.
///
/// Dropping it aborts the restore (RESTORE_ABORT) unless every vCPU has its registers back by then,
/// and the offsets are confirmed where they have to be: the VM is PAUSED as it was before, and
/// every part ends with an error. The abort names this restore's epoch, so it never ends a later
/// restore. It takes [`Options::timeout`](crate::Options::timeout) at most, also over a dead
/// backend.
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
    /// The VM has CONFIRM.
    confirm: bool,
    /// How long an abort may take.
    timeout: Duration,
    progress: Mutex<Progress>,
    /// Readable when the end has come.
    changed: OwnedFd,
}

/// How far a restore is.
struct Progress {
    /// By vCPU: its part was given away.
    taken: Box<[bool]>,
    /// By vCPU: RESTORE_DONE was answered.
    done: Box<[bool]>,
    end: Option<End>,
    /// Why the last attempt to apply the offsets failed.
    unapplied: Option<ApplyFailure>,
}

/// How a restore ended.
#[derive(Clone, Debug)]
enum End {
    /// Every vCPU has its registers back, and the VM is ARMED: it can still be aborted.
    Armed,
    /// Every vCPU has its registers back, and none waits for a confirmation.
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
        let confirm = if info.phase == Phase::New {
            let (abi, frequency) = (saved.abi(), Some(saved.frequency()));
            queue.configure_with(count, abi, frequency, options.vm, deadline)?;
            options.vm.confirm
        } else {
            is_the_same_vm(saved, options.vm, &info)?;
            info.confirm
        };
        // Or its end would be PAUSED, and the RESUME behind that could not be aborted.
        let autorun = options.autorun || confirm;
        let options = options.autorun(autorun);
        let begin = Operation::restore_begin(count, options);
        let NewEpoch(epoch) = queue.perform(&begin, deadline)?;
        let none = || vec![false; vcpus.len()].into();
        let progress = Progress {
            taken: none(),
            done: none(),
            end: None,
            unapplied: None,
        };
        let shared = Arc::new(Shared {
            queues: self.queues().into(),
            epoch,
            vcpus,
            confirm,
            timeout,
            progress: Mutex::new(progress),
            changed,
        });
        Ok(Restore { shared, wait_set })
    }
}

fn is_the_same_vm(saved: &SavedVm, options: VmOptions, info: &Info) -> Result<(), Error> {
    let backend = VmShape {
        vcpus: info.vcpus,
        abi: info.abi,
        frequency: info.frequency,
        options: info.into(),
    };
    let saved = VmShape {
        vcpus: saved.vcpus().len() as u32,
        abi: saved.abi(),
        frequency: saved.frequency().get(),
        options,
    };
    // A VM that has more than is asked for is restored with that.
    let same = VmShape {
        options: backend.options,
        ..saved
    } == backend;
    match same && backend.options.include(options) {
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

    /// Brings back the registers of all vCPUs, by one request: for a VMM that has them in one
    /// place. The vCPUs' parts only wait then, [by the time page](VcpuRestore::run_by_page) without
    /// a request of their own.
    ///
    /// It may be called again: a vCPU that has its registers back already keeps them.
    ///
    /// # Errors
    ///
    /// As [`set_vm_done`](RequestQueue::set_vm_done). The restore stays open then, with no vCPU's
    /// registers changed.
    pub fn bring_all_back(&self, deadline: impl Into<Deadline>) -> Result<(), Error> {
        let shared = &self.shared;
        let all = Operation::set_vm_done(&shared.vcpus).in_epoch(shared.epoch);
        let Remaining(remaining) = shared.queues[0].perform(&all, deadline)?;
        shared.are_done(.., remaining);
        Ok(())
    }

    /// Waits until every vCPU has its registers back. Then the VM is RUNNING, with
    /// [`RestoreOptions::autorun`], or PAUSED, and waits for
    /// [`resume`](RequestQueue::resume). One with [`VmOptions::confirm`] is ARMED, and waits for
    /// [`apply`](Self::apply). A [`pause`](RequestQueue::pause) ends the restore there: the VM is
    /// PAUSED with what the vCPUs brought.
    ///
    /// # Errors
    ///
    /// [`Error::Restore`] names the first vCPU that failed: the restore is aborted.
    /// [`Error::TimedOut`] at the deadline: it goes on, and may be waited for again.
    /// [`Error::Apply`] where the last call of [`apply`](Self::apply) failed. Or what ended the
    /// queues.
    pub fn wait(&mut self, deadline: impl Into<Deadline>) -> Result<(), Error> {
        self.wait_until_back(deadline.into())?;
        let unapplied = self.shared.progress().unapplied.clone();
        unapplied.map_or(Ok(()), |failure| Err(failure.into()))
    }

    fn wait_until_back(&mut self, deadline: Deadline) -> Result<(), Error> {
        let session = self.shared.queues[0].session();
        let mut late = false;
        loop {
            match &self.shared.progress().end {
                Some(End::Complete | End::Armed) => return Ok(()),
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
    /// As [`wait`](Self::wait). For a VM with [`VmOptions::confirm`]
    /// [`InvalidArgument::NeedsApply`], and the restore is aborted.
    pub fn finish(mut self, deadline: impl Into<Deadline>) -> Result<(), Error> {
        match self.shared.confirm {
            true => Err(InvalidArgument::NeedsApply.into()),
            false => self.wait(deadline),
        }
    }

    /// Waits until every vCPU has its registers back and the VM is ARMED, has `apply` put the
    /// offsets into the hypervisor, and confirms them (CONFIRM_RUN). Then the VM is RUNNING, and
    /// every vCPU runs. Returns CONFIRM_RUN's answer, which is also what every vCPU gets.
    ///
    /// `apply` is as in [`Frontend::resume_with`]: called once for each ARMED, and not again where
    /// only the confirmation was lost, or is late.
    ///
    /// # Errors
    ///
    /// As [`Frontend::resume_with`]. After [`Error::Apply`] nobody runs: every vCPU's
    /// [`run`](VcpuRestore::run), and [`wait`](Self::wait), return the same. Call this again, or
    /// drop the restore, which aborts it. [`Error::Restore`] names the vCPU by which the restore
    /// failed before.
    pub fn apply(
        &mut self,
        deadline: impl Into<Deadline>,
        apply: impl FnOnce(&Info) -> Result<(), ApplyError>,
    ) -> Result<Run, Error> {
        let deadline = deadline.into();
        if !self.shared.confirm {
            return Err(InvalidArgument::WithoutConfirm.into());
        }
        self.wait_until_back(deadline)?;
        let shared = &self.shared;
        shared.progress().unapplied = None;
        let confirmed = confirm(&shared.queues, Some(shared.epoch), deadline, apply);
        let mut progress = shared.progress();
        match &confirmed {
            Ok(_) => progress.end = Some(End::Complete),
            Err(Error::Apply(failure)) => progress.unapplied = Some(failure.clone()),
            Err(_) => {}
        }
        confirmed
    }

    /// As [`apply`](Self::apply), once: a restore that is not confirmed then is aborted.
    ///
    /// # Errors
    ///
    /// As [`apply`](Self::apply).
    pub fn finish_with(
        mut self,
        deadline: impl Into<Deadline>,
        apply: impl FnOnce(&Info) -> Result<(), ApplyError>,
    ) -> Result<Run, Error> {
        self.apply(deadline, apply)
    }
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }

    fn queue_of(&self, vcpu: u32) -> &RequestQueue {
        &self.queues[vcpu as usize % self.queues.len()]
    }

    /// DONE was answered, for these vCPUs.
    fn are_done(&self, vcpus: impl SliceIndex<[bool], Output = [bool]>, remaining: u32) {
        let mut progress = self.progress();
        progress.done[vcpus].fill(true);
        if remaining > 0 {
            return;
        }
        let end = match self.confirm {
            true => End::Armed,
            false => End::Complete,
        };
        progress.end.get_or_insert(end);
        drop(progress);
        signal(&self.changed);
    }

    /// Why a vCPU whose request ended with `error` does not run. The first such vCPU ends the
    /// restore.
    fn failed(&self, vcpu: u32, error: Error) -> Error {
        let mut progress = self.progress();
        match &progress.end {
            Some(End::Complete | End::Armed) => return error,
            Some(End::Failed(failure)) => return failure.clone().into(),
            Some(End::Dropped) => return self.canceled(vcpu),
            None => {}
        }
        let refusal = error.refusal();
        let late = refusal.filter(|refusal| refusal.status == Status::TimedOut);
        // None is missing: it is the confirmation that is late.
        if late.is_some_and(|refusal| refusal.detail == 0) {
            return error;
        }
        // The one that waits is not the one that makes the others wait.
        let timed_out = late.is_some();
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
        if matches!(progress.end, None | Some(End::Armed)) {
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
