//! Every operation as a method that waits for the answer, and saves and restores built of them.

use std::num::NonZeroU64;

use super::RequestQueue;
use crate::answers::{Info, Run, SetRegs, SetRegsDone, Vm};
use crate::regs::{RegIds, RegValue, RegValues};
use crate::saved::realtime_ns;
use crate::{Deadline, Error, NewEpoch, Operation, RestoreOptions, SavedVcpu, SavedVm, VmOptions};
use vhost_user_timer_protocol::{Abi, Phase, Status};

/// The operations. Each waits for the answer until the deadline: a `Duration` from now or an
/// [`Instant`](std::time::Instant) ([`Deadline`]).
///
/// # Errors
///
/// Each returns [`Error::Refused`] if the backend refuses, with the statuses that its documentation
/// names among others; [`Error::TimedOut`] at the deadline, and then the backend may still carry
/// the request out; or the error that ended the queue.
#[expect(
    clippy::missing_errors_doc,
    reason = "said once, above, for all of them"
)]
impl RequestQueue {
    /// GET_INFO: the VM; in any phase.
    pub fn info(&self, deadline: impl Into<Deadline>) -> Result<Info, Error> {
        self.perform(&Operation::get_info(), deadline)
    }

    /// CONFIGURE_VM: fixes the VM's vCPUs (1 to [`Info::max_vcpus`]), ABI and counter frequency
    /// in Hz (`None`: the backend's). NEW → PAUSED; the same values again are accepted in every
    /// phase, others refused with EBUSY.
    pub fn configure(
        &self,
        vcpus: u32,
        abi: Abi,
        frequency: Option<NonZeroU64>,
        deadline: impl Into<Deadline>,
    ) -> Result<(), Error> {
        self.configure_with(vcpus, abi, frequency, VmOptions::default(), deadline)
    }

    /// As [`configure`](Self::configure), with the VM's options, which are among the values.
    pub fn configure_with(
        &self,
        vcpus: u32,
        abi: Abi,
        frequency: Option<NonZeroU64>,
        options: VmOptions,
        deadline: impl Into<Deadline>,
    ) -> Result<(), Error> {
        let configure = Operation::configure_with(vcpus, abi, frequency, options);
        self.perform(&configure, deadline)?;
        self.shared.session().history.learn_vcpus(vcpus);
        Ok(())
    }

    /// GET_REG_LIST: the KVM ids of the vCPU's timer registers. Not in NEW.
    pub fn reg_list(&self, vcpu: u32, deadline: impl Into<Deadline>) -> Result<RegIds, Error> {
        self.perform(&Operation::reg_list(vcpu), deadline)
    }

    /// GET_REGS: reads up to [`MAX_REGS`](crate::MAX_REGS) registers by their KVM ids, all at
    /// one instant. The answer has exactly these ids, in this order. Not in NEW.
    pub fn get_regs(
        &self,
        vcpu: u32,
        ids: &[u64],
        deadline: impl Into<Deadline>,
    ) -> Result<RegValues, Error> {
        self.perform(&Operation::get_regs(vcpu, ids), deadline)
    }

    /// SET_REGS: writes up to [`MAX_REGS`](crate::MAX_REGS) registers, all together: their order
    /// does not matter. Not in NEW; counts in PAUSED and RESTORING only (EBUSY).
    pub fn set_regs(
        &self,
        vcpu: u32,
        values: &[RegValue],
        deadline: impl Into<Deadline>,
    ) -> Result<SetRegs, Error> {
        self.perform(&Operation::set_regs(vcpu, values), deadline)
    }

    /// SET_REGS with DONE: writes registers and says RESTORE_DONE, both or neither. In RESTORING
    /// and a restore's ARMED; refused as SET_REGS and RESTORE_DONE are.
    ///
    /// The answer's [`set`](SetRegsDone::set) is there, also where the first answer was lost with
    /// its connection. The count of ignored writes is 0 then.
    pub fn set_regs_done(
        &self,
        vcpu: u32,
        values: &[RegValue],
        deadline: impl Into<Deadline>,
    ) -> Result<SetRegsDone, Error> {
        let deadline = deadline.into();
        let mut done = self.perform(&Operation::set_regs_done(vcpu, values), deadline)?;
        if done.set.is_none() {
            done.set = Some(self.set_regs(vcpu, &[], deadline)?);
        }
        Ok(done)
    }

    /// GET_VM: `count` vCPUs from `first` on, all at one instant. Not in NEW.
    pub fn get_vm(
        &self,
        first: u32,
        count: u32,
        deadline: impl Into<Deadline>,
    ) -> Result<Vm, Error> {
        self.perform(&Operation::get_vm(first, count), deadline)
    }

    /// SET_VM: stages the registers of many vCPUs. In RESTORING.
    pub fn set_vm(&self, vcpus: &[SavedVcpu], deadline: impl Into<Deadline>) -> Result<(), Error> {
        self.perform(&Operation::set_vm(vcpus), deadline)
    }

    /// SET_VM with DONE: stages the registers of many vCPUs and says RESTORE_DONE for each, all or
    /// nothing. Returns how many vCPUs are still missing. In RESTORING and a restore's ARMED;
    /// refused as SET_VM and RESTORE_DONE are.
    pub fn set_vm_done(
        &self,
        vcpus: &[SavedVcpu],
        deadline: impl Into<Deadline>,
    ) -> Result<u32, Error> {
        let remaining = self.perform(&Operation::set_vm_done(vcpus), deadline)?;
        Ok(remaining.0)
    }

    /// SET_COUNTER_OFFSET: sets and pins cntvoff = cntpoff = `offset`. In PAUSED and RESTORING.
    pub fn set_counter_offset(
        &self,
        offset: u64,
        deadline: impl Into<Deadline>,
    ) -> Result<(), Error> {
        self.perform(&Operation::set_counter_offset(offset), deadline)
    }

    /// SET_COUNTER_ANCHOR: the VMM's host counter read `count` when CLOCK_MONOTONIC read
    /// `monotonic_ns`. In PAUSED.
    pub fn set_counter_anchor(
        &self,
        monotonic_ns: u64,
        count: u64,
        deadline: impl Into<Deadline>,
    ) -> Result<(), Error> {
        self.perform(
            &Operation::set_counter_anchor(monotonic_ns, count),
            deadline,
        )
    }

    /// PAUSE: stops the VM's time. RUNNING or ARMED → PAUSED; in PAUSED it changes nothing.
    pub fn pause(&self, deadline: impl Into<Deadline>) -> Result<Run, Error> {
        self.perform(&Operation::pause(), deadline)
    }

    /// PAUSE with KEEP_COUNTING: stops the VM and lets its time go on. RUNNING or ARMED → PAUSED;
    /// in PAUSED it changes nothing.
    pub fn pause_vm_only(&self, deadline: impl Into<Deadline>) -> Result<Run, Error> {
        self.perform(&Operation::pause_vm_only(), deadline)
    }

    /// RESUME: lets the VM's time go on. PAUSED → RUNNING, or ARMED in a VM with
    /// [`confirm`](VmOptions::confirm); in RUNNING and ARMED it changes nothing.
    /// [`Frontend::resume_with`](crate::Frontend::resume_with) applies and confirms the offsets,
    /// too.
    pub fn resume(&self, deadline: impl Into<Deadline>) -> Result<Run, Error> {
        self.perform(&Operation::resume(), deadline)
    }

    /// RESTORE_BEGIN: opens a restore of all the VM's vCPUs, and with it a new epoch, which it
    /// returns. In PAUSED, RESTORING and ARMED.
    ///
    /// [`Frontend::restore`](crate::Frontend::restore) does this and the rest of a restore.
    pub fn restore_begin(
        &self,
        options: RestoreOptions,
        deadline: impl Into<Deadline>,
    ) -> Result<u64, Error> {
        let deadline = deadline.into();
        let vcpus = match self.shared.session().history.vcpus() {
            Some(vcpus) => vcpus,
            None => self.info(deadline)?.vcpus,
        };
        let begin = Operation::restore_begin(vcpus, options);
        let NewEpoch(epoch) = self.perform(&begin, deadline)?;
        Ok(epoch)
    }

    /// RESTORE_DONE: the vCPU has all its timer registers. Returns how many vCPUs are still
    /// missing. In RESTORING; refused with ENODATA if registers are missing, and with EINVAL at the
    /// end of a strict restore whose counts differ.
    pub fn restore_done(&self, vcpu: u32, deadline: impl Into<Deadline>) -> Result<u32, Error> {
        let remaining = self.perform(&Operation::restore_done(vcpu), deadline)?;
        Ok(remaining.0)
    }

    /// The vCPUs that are missing in the open restore, in order; none if no restore is open.
    /// [`IndexRanges`](vhost_user_timer_protocol::IndexRanges) shows them as "7, 12-13".
    ///
    /// It changes nothing: it writes no registers, which is refused with EBUSY for a vCPU that is
    /// done. It takes one request per vCPU, so it is for a WAIT_RUN that ended with ETIMEDOUT, not
    /// for polling.
    pub fn missing_vcpus(&self, deadline: impl Into<Deadline>) -> Result<Vec<u32>, Error> {
        let deadline = deadline.into();
        let info = self.info(deadline)?;
        let mut missing = Vec::new();
        if info.phase == Phase::Restoring {
            for vcpu in 0..info.vcpus {
                let none = Operation::set_regs(vcpu, &[]).in_epoch(info.epoch);
                match self.perform(&none, deadline) {
                    Ok(_) => missing.push(vcpu),
                    Err(error) if error.status() == Some(Status::Busy) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        // If the restore was completed meanwhile, nobody is missing.
        match self.info(deadline)? {
            now if now.phase == Phase::Restoring && now.epoch == info.epoch => Ok(missing),
            _ => Ok(Vec::new()),
        }
    }

    /// CONFIRM_RUN: these offsets, which are the VM's, are where the guest's counter is made. ARMED
    /// → RUNNING; in RUNNING it changes nothing. Refused with EINVAL for other offsets.
    ///
    /// [`Restore::apply`](crate::Restore::apply) and
    /// [`Frontend::resume_with`](crate::Frontend::resume_with) do this once the offsets are
    /// applied.
    pub fn confirm_run(
        &self,
        cntvoff: u64,
        cntpoff: u64,
        deadline: impl Into<Deadline>,
    ) -> Result<Run, Error> {
        self.perform(&Operation::confirm_run(cntvoff, cntpoff), deadline)
    }

    /// RESTORE_ABORT: drops the open restore; the VM is PAUSED, as it was before.
    pub fn restore_abort(&self, deadline: impl Into<Deadline>) -> Result<(), Error> {
        self.perform(&Operation::restore_abort(), deadline)
    }

    /// WAIT_RUN: returns when the vCPU may run, and not before. Not in NEW.
    ///
    /// With a time page, [`wait_run_by_page`](Self::wait_run_by_page) is faster.
    ///
    /// Any number of vCPU threads can wait on one queue; other requests overtake them. After
    /// [`Error::TimedOut`] a thread may wait again, which takes up the same request. A new restore
    /// ends the wait with [`Status::Stale`], an abort with [`Status::Canceled`], and the restore's
    /// time-out with [`Status::TimedOut`].
    pub fn wait_run(&self, vcpu: u32, deadline: impl Into<Deadline>) -> Result<Run, Error> {
        self.perform(&Operation::wait_run(vcpu), deadline)
    }

    /// SET_TIME_PAGE: makes the backend write the page at this address in the memory shared on this
    /// connection; length 0 makes it stop. [`TimePage`](crate::TimePage) does this for the
    /// frontend's own page.
    pub fn set_time_page(
        &self,
        address: u64,
        length: u64,
        deadline: impl Into<Deadline>,
    ) -> Result<(), Error> {
        self.perform(&Operation::set_time_page(address, length), deadline)
    }

    /// Reads the whole VM for a save, by one GET_INFO and one GET_VM.
    ///
    /// Pause the VM first: a running VM is read at one instant, but goes on.
    pub fn save(&self, deadline: impl Into<Deadline>) -> Result<SavedVm, Error> {
        let deadline = deadline.into();
        let info = self.info(deadline)?;
        let vm = self.get_vm(0, info.vcpus, deadline)?;
        Ok(SavedVm::read(info.abi, realtime_ns(), vm)?)
    }

    /// Restores one vCPU in an open restore: stages its registers and says RESTORE_DONE, by
    /// one request. Returns how many vCPUs are still missing.
    ///
    /// A vCPU thread calls this and then [`wait_run`](Self::wait_run); the order of the threads
    /// does not matter.
    pub fn restore_vcpu(
        &self,
        vcpu: &SavedVcpu,
        deadline: impl Into<Deadline>,
    ) -> Result<u32, Error> {
        self.set_vm_done(std::slice::from_ref(vcpu), deadline)
    }
}
