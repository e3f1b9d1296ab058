//! How the vCPUs come to run: by the gate and its confirmation, and in two ways that are wrong.

use std::sync::mpsc::{self, Receiver, SyncSender};

use vhost_user_timer_frontend::kvm::CounterOffset;
use vhost_user_timer_frontend::{Phase, RestoreOptions, SavedVm, VmOptions};

use super::error::{Context, Error};
use super::life::{Machine, has_read};
use super::registers;
use super::round::{Facts, Plan};
use super::snapshot::Snapshot;
use super::time::{LIMIT, ReadBack, Time, enter_restored, enter_resumed};
use super::vcpu::{Running, Vcpu};
use crate::args::Gate;

/// Holds the straggler's thread back.
struct Straggler {
    holder: SyncSender<()>,
    held: Option<Receiver<()>>,
}

/// What a thread waits for if it is the straggler's.
struct Hold(Option<Receiver<()>>);

impl Straggler {
    fn new() -> Self {
        let (holder, held) = mpsc::sync_channel(1);
        Straggler {
            holder,
            held: Some(held),
        }
    }

    /// What this vCPU's thread waits for.
    fn hold(&mut self, plan: &Plan, vcpu: &Vcpu) -> Hold {
        Hold(self.held.take_if(|_| vcpu.index == plan.straggler()))
    }

    fn release(&self) {
        // Without a receiver the thread has ended, which is found when it is joined.
        let _ = self.holder.send(());
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
        }
    }

    /// The vCPUs, in the order of the plan.
    fn in_order(&mut self, plan: &Plan) -> impl Iterator<Item = Vcpu> + use<> {
        let mut vcpus: Vec<_> = std::mem::take(&mut self.vcpus);
        let place = |vcpu: &Vcpu| plan.order.iter().position(|index| *index == vcpu.index);
        vcpus.sort_by_key(place);
        vcpus.into_iter()
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
        let saved = SavedVm::from_bytes(&snapshot.timers).context("parse the timers")?;
        let restore = time
            .frontend()
            .restore(&saved, RestoreOptions::default().vm(VmOptions::KVM))
            .context("begin the restore")?;
        facts.is_of_epoch(restore.epoch());

        let mut running = Running::new()?;
        let mut straggler = Straggler::new();
        for (restored, vcpu) in (0..).zip(vcpus) {
            if plan.restored_before_the_fault() == Some(restored) {
                wait_until_restored(time, restored, &running)?;
                plan.fault_when_restoring(time)?;
            }
            let state = snapshot.vcpus[vcpu.index as usize].clone();
            let mut part = restore.vcpu(vcpu.index).expect("each part is taken once");
            let hold = straggler.hold(plan, &vcpu);
            let facts = facts.clone();
            running.start(vcpu, move |vcpu| {
                hold.wait()?;
                enter_restored(vcpu, &state, &mut part)?;
                facts.enters(vcpu.index);
                Ok(())
            });
        }
        wait_until_restored(time, plan.order.len() as u32 - 1, &running)?;
        straggler.release();
        let run = restore
            .finish_with(LIMIT, |info| {
                facts.applied(&read_back.apply(&self.vm.fd, info)?);
                Ok(plan.fault_when_armed(time)?)
            })
            .context("restore the VM")?;
        facts.runs(run);
        Ok(running)
    }

    /// Wrong: the gate opens when the offset is decided, and everybody runs. The thread that was to
    /// put the offset into KVM "once for the VM" comes when the others are in the guest already.
    fn start_by_the_gate_only(
        &mut self,
        snapshot: &Snapshot,
        plan: &Plan,
        facts: &Facts,
    ) -> Result<Running, Error> {
        let vcpus = self.in_order(plan);
        let time = self.time()?;
        let saved = SavedVm::from_bytes(&snapshot.timers).context("parse the timers")?;
        let restore = time
            .frontend()
            .restore(&saved, RestoreOptions::default().autorun(true))
            .context("begin the restore")?;
        facts.is_of_epoch(restore.epoch());

        let mut running = Running::new()?;
        let mut straggler = Straggler::new();
        for vcpu in vcpus {
            let state = snapshot.vcpus[vcpu.index as usize].clone();
            let mut part = restore.vcpu(vcpu.index).expect("each part is taken once");
            let hold = straggler.hold(plan, &vcpu);
            let facts = facts.clone();
            running.start(vcpu, move |vcpu| {
                facts.runs(enter_restored(vcpu, &state, &mut part)?);
                hold.wait()?;
                facts.enters(vcpu.index);
                Ok(())
            });
        }
        restore.finish(LIMIT).context("restore the VM")?;
        self.wait_until_the_others_have_read(plan, &running)?;
        let info = time.frontend().queue().info(LIMIT).context("GET_INFO")?;
        match self.vm.fd.set_counter_offset(info.cntvoff) {
            Ok(()) => {}
            Err(error) => facts.refused(&error),
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
        let mut running = Running::new()?;
        let mut straggler = Straggler::new();
        for vcpu in vcpus {
            let state = snapshot.vcpus[vcpu.index as usize].clone();
            let hold = straggler.hold(plan, &vcpu);
            let facts = facts.clone();
            running.start(vcpu, move |vcpu| {
                hold.wait()?;
                registers::load_with_timer(vcpu, &state)?;
                facts.enters(vcpu.index);
                Ok(())
            });
        }
        self.wait_until_the_others_have_read(plan, &running)?;
        straggler.release();
        Ok(running)
    }

    /// Starts the vCPUs of a machine that was booted or paused.
    pub(crate) fn start_resumed(&mut self, plan: &Plan, facts: &Facts) -> Result<Running, Error> {
        let read_back = ReadBack::by(&self.vcpus[0]);
        let vcpus = self.in_order(plan);
        let time = self.time()?;
        let mut running = Running::new()?;
        let mut straggler = Straggler::new();
        for vcpu in vcpus {
            let queue = time.frontend().queue_of(vcpu.index).clone();
            let hold = straggler.hold(plan, &vcpu);
            let facts = facts.clone();
            running.start(vcpu, move |vcpu| {
                hold.wait()?;
                enter_resumed(vcpu.index, &queue)?;
                facts.enters(vcpu.index);
                Ok(())
            });
        }
        let run = time
            .frontend()
            .resume_with(LIMIT, |info| {
                facts.is_of_epoch(info.epoch);
                facts.applied(&read_back.apply(&self.vm.fd, info)?);
                Ok(plan.fault_when_armed(time)?)
            })
            .context("resume the VM")?;
        facts.runs(run);
        straggler.release();
        Ok(running)
    }

    /// Starts the vCPUs of a guest that was reset. The VM is RUNNING, and its offset is in KVM.
    pub(crate) fn start_reset(&mut self, plan: &Plan, facts: &Facts) -> Result<Running, Error> {
        let mut running = Running::new()?;
        for vcpu in self.in_order(plan) {
            let facts = facts.clone();
            running.start(vcpu, move |vcpu| {
                facts.enters(vcpu.index);
                Ok(())
            });
        }
        Ok(running)
    }

    fn wait_until_the_others_have_read(&self, plan: &Plan, running: &Running) -> Result<(), Error> {
        let (_, others) = plan.order.split_last().expect("a VM has a vCPU");
        let all_have = || others.iter().all(|vcpu| has_read(&self.vm, *vcpu));
        match running.wait_until(all_have) {
            true => Ok(()),
            false => Err(Error::new("the other vCPUs do not read their counters")),
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
