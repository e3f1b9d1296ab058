//! How the vCPUs come to run: by the gate and its confirmation, and in two ways that are wrong.

use std::sync::mpsc::{self, Receiver, SyncSender};

use vhost_user_timer_frontend::kvm::CounterOffset;
use vhost_user_timer_frontend::{Phase, Restore, RestoreOptions, SavedVm, VmOptions};

use super::error::{Context, Error};
use super::life::{Machine, has_read, has_read_for_long};
use super::registers;
use super::round::{Facts, Plan};
use super::snapshot::Snapshot;
use super::time::{LIMIT, ReadBack, Time, enter_restored, enter_resumed};
use super::vcpu::{Running, Vcpu};
use crate::args::Gate;

impl Machine {
    /// Starts the vCPUs of a restored machine.
    pub(crate) fn start_restored(
        &mut self,
        snapshot: &Snapshot,
        plan: &Plan,
        facts: &Facts,
    ) -> Result<Running, Error> {
        match plan.gate {
            Gate::Confirm => self.start_confirmed(snapshot, plan, facts),
            Gate::Only => self.start_by_the_gate_only(snapshot, plan, facts),
            Gate::None => self.start_by_kvm_alone(snapshot, plan, facts),
            Gate::BestEffort => self.start_by_counts(snapshot, plan, facts),
        }
    }

    /// The right way: each thread restores its vCPU and waits; one thread puts the offset into KVM
    /// when all are back; then all run.
    fn start_confirmed(
        &mut self,
        snapshot: &Snapshot,
        plan: &Plan,
        facts: &Facts,
    ) -> Result<Running, Error> {
        let read_back = ReadBack::by(&self.vcpus[0]);
        let vcpus = self.in_order(plan);
        let time = self.time()?;
        let options = RestoreOptions::default().vm(VmOptions::KVM);
        let restore = begin(time, snapshot, options, facts)?;

        let mut started = 0;
        let (running, straggler) = start_each(vcpus, plan, facts, |vcpu, running| {
            if plan.restored_before_the_fault() == Some(started) {
                wait_until_restored(time, started, running)?;
                plan.fault_when_restoring(time)?;
            }
            started += 1;
            let state = snapshot.vcpus[vcpu.index as usize].clone();
            let mut part = restore.vcpu(vcpu.index).expect("each part is taken once");
            Ok(move |vcpu: &Vcpu, hold: Hold| {
                hold.wait()?;
                enter_restored(vcpu, &state, &mut part).map(drop)
            })
        })?;
        wait_until_restored(time, started - 1, &running)?;
        straggler.release();
        let run = restore
            .finish_with(LIMIT, |info| {
                facts.applied(read_back.apply(&self.vm.fd, info)?.virt);
                Ok(plan.fault_when_armed(time)?)
            })
            .context("restore the VM")?;
        facts.runs(run);
        Ok(running)
    }

    /// Starts the vCPUs of a machine that was booted or paused, the right way.
    pub(crate) fn start_resumed(&mut self, plan: &Plan, facts: &Facts) -> Result<Running, Error> {
        let read_back = ReadBack::by(&self.vcpus[0]);
        let vcpus = self.in_order(plan);
        let time = self.time()?;
        let (running, straggler) = start_each(vcpus, plan, facts, |vcpu, _| {
            let queue = time.frontend().queue_of(vcpu.index).clone();
            Ok(move |vcpu: &Vcpu, hold: Hold| {
                hold.wait()?;
                enter_resumed(vcpu.index, &queue).map(drop)
            })
        })?;
        if plan.gate == Gate::BestEffort {
            let (counts, run) = time.counts_into_kvm(read_back)?;
            facts.applied(counts.virt);
            facts.runs(run);
        } else {
            let run = time
                .frontend()
                .resume_with(LIMIT, |info| {
                    facts.is_of_epoch(info.epoch);
                    facts.applied(read_back.apply(&self.vm.fd, info)?.virt);
                    Ok(plan.fault_when_armed(time)?)
                })
                .context("resume the VM")?;
            facts.runs(run);
        }
        straggler.release();
        Ok(running)
    }

    /// Starts the vCPUs of a guest that was reset. The VM is RUNNING, and its offset is in KVM.
    pub(crate) fn start_reset(&mut self, plan: &Plan, facts: &Facts) -> Result<Running, Error> {
        let vcpus = self.in_order(plan);
        let (running, straggler) = start_each(vcpus, plan, facts, |_, _| {
            Ok(|_: &Vcpu, hold: Hold| hold.wait())
        })?;
        straggler.release();
        Ok(running)
    }

    /// The way for Linux before 6.4: as the right one, but the counts go into KVM one by one, and
    /// only this function sees to it that nobody runs before.
    fn start_by_counts(
        &mut self,
        snapshot: &Snapshot,
        plan: &Plan,
        facts: &Facts,
    ) -> Result<Running, Error> {
        let read_back = ReadBack::by(&self.vcpus[0]);
        let vcpus = self.in_order(plan);
        let time = self.time()?;
        let restore = begin(time, snapshot, RestoreOptions::default(), facts)?;
        let (running, straggler) = start_each(vcpus, plan, facts, |vcpu, _| {
            let state = snapshot.vcpus[vcpu.index as usize].clone();
            let mut part = restore.vcpu(vcpu.index).expect("each part is taken once");
            Ok(move |vcpu: &Vcpu, hold: Hold| {
                hold.wait()?;
                enter_restored(vcpu, &state, &mut part).map(drop)
            })
        })?;
        wait_until_restored(time, plan.order.len() as u32 - 1, &running)?;
        straggler.release();
        restore.finish(LIMIT).context("restore the VM")?;
        let (counts, run) = time.counts_into_kvm(read_back)?;
        facts.applied(counts.virt);
        facts.runs(run);
        Ok(running)
    }

    /// Wrong: the gate opens when the offset is decided, and all run. The thread that puts the
    /// offset into KVM "once for the VM" comes when the others are in the guest already.
    fn start_by_the_gate_only(
        &mut self,
        snapshot: &Snapshot,
        plan: &Plan,
        facts: &Facts,
    ) -> Result<Running, Error> {
        let vcpus = self.in_order(plan);
        let time = self.time()?;
        let options = RestoreOptions::default().autorun(true);
        let restore = begin(time, snapshot, options, facts)?;
        let (running, straggler) = start_each(vcpus, plan, facts, |vcpu, _| {
            let state = snapshot.vcpus[vcpu.index as usize].clone();
            let mut part = restore.vcpu(vcpu.index).expect("each part is taken once");
            let facts = facts.clone();
            Ok(move |vcpu: &Vcpu, hold: Hold| {
                facts.runs(enter_restored(vcpu, &state, &mut part)?);
                hold.wait()
            })
        })?;
        restore.finish(LIMIT).context("restore the VM")?;
        let others = plan.others();
        let have_read = || others.iter().all(|vcpu| has_read(&self.vm, *vcpu));
        self.wait_until_the_others(have_read, &running)?;
        let info = time.frontend().queue().info(LIMIT).context("GET_INFO")?;
        if let Err(error) = self.vm.fd.set_counter_offset(info.cntvoff) {
            facts.refused(&error);
        }
        straggler.release();
        Ok(running)
    }

    /// Wrong: each thread loads all registers of its vCPU, its count among them, and runs.
    fn start_by_kvm_alone(
        &mut self,
        snapshot: &Snapshot,
        plan: &Plan,
        facts: &Facts,
    ) -> Result<Running, Error> {
        let vcpus = self.in_order(plan);
        let (running, straggler) = start_each(vcpus, plan, facts, |vcpu, _| {
            let state = snapshot.vcpus[vcpu.index as usize].clone();
            Ok(move |vcpu: &Vcpu, hold: Hold| {
                hold.wait()?;
                registers::load_with_timer(vcpu, &state)
            })
        })?;
        // Longer than the straggler takes to enter, so that the guest sees that its count is less.
        let others = plan.others();
        let have_read = || others.iter().any(|vcpu| has_read_for_long(&self.vm, *vcpu));
        self.wait_until_the_others(have_read, &running)?;
        straggler.release();
        Ok(running)
    }

    /// The vCPUs, in the order of the plan.
    fn in_order(&mut self, plan: &Plan) -> Vec<Vcpu> {
        let mut vcpus = std::mem::take(&mut self.vcpus);
        vcpus.sort_by_key(|vcpu| plan.order.iter().position(|index| *index == vcpu.index));
        vcpus
    }

    fn wait_until_the_others(
        &self,
        have_read: impl Fn() -> bool,
        running: &Running,
    ) -> Result<(), Error> {
        match running.wait_until(have_read) {
            true => Ok(()),
            false => Err(Error::new("the other vCPUs do not read their counters")),
        }
    }
}

/// Opens the restore of a saved VM in the backend.
fn begin(
    time: &Time,
    snapshot: &Snapshot,
    options: RestoreOptions,
    facts: &Facts,
) -> Result<Restore, Error> {
    let saved = SavedVm::from_bytes(&snapshot.timers).context("parse the timers")?;
    let restore = time.frontend().restore(&saved, options);
    let restore = restore.context("begin the restore")?;
    facts.is_of_epoch(restore.epoch());
    Ok(restore)
}

/// Starts a thread for each vCPU. `enter` makes what the thread does before it enters the guest.
fn start_each<E>(
    vcpus: Vec<Vcpu>,
    plan: &Plan,
    facts: &Facts,
    mut enter: impl FnMut(&Vcpu, &Running) -> Result<E, Error>,
) -> Result<(Running, Straggler), Error>
where
    E: FnOnce(&Vcpu, Hold) -> Result<(), Error> + Send + 'static,
{
    let mut running = Running::new()?;
    let (release, held) = mpsc::sync_channel(1);
    let mut held = Some(held);
    for vcpu in vcpus {
        let enter = enter(&vcpu, &running)?;
        let hold = Hold(held.take_if(|_| vcpu.index == plan.straggler()));
        let facts = facts.clone();
        running.start(vcpu, move |vcpu| {
            enter(vcpu, hold)?;
            facts.enters(vcpu.index);
            Ok(())
        });
    }
    Ok((running, Straggler(release)))
}

/// The thread that is held back until the others have come as far as they can without it.
struct Straggler(SyncSender<()>);

/// What a thread waits for if it is the straggler.
struct Hold(Option<Receiver<()>>);

impl Straggler {
    fn release(&self) {
        // A thread that has ended receives nothing. Its error is found when it is joined.
        let _ = self.0.send(());
    }
}

impl Hold {
    fn wait(self) -> Result<(), Error> {
        match self.0 {
            Some(held) => held.recv().context("wait as the straggler"),
            None => Ok(()),
        }
    }
}

/// Waits until so many vCPUs are back in the backend.
fn wait_until_restored(time: &Time, vcpus: u32, running: &Running) -> Result<(), Error> {
    loop {
        let info = time.frontend().queue().info(LIMIT).context("GET_INFO")?;
        if info.phase != Phase::Restoring || info.restored >= vcpus || running.has_ended() {
            return Ok(());
        }
    }
}
