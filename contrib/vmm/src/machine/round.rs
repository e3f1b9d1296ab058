//! A round: who starts in which order, what goes wrong on purpose, and what came of it.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Signal, getpid, kill_process};
use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_frontend::kvm::{Bracket, OneReg};
use vhost_user_timer_frontend::{Abi, Register, Run};

use super::error::{Context, Error};
use super::time::Time;
use super::vcpu::Vcpu;
use crate::args::{Die, Gate, KillBackend, Options, name};
use crate::report::Round;

/// What happens in a round.
pub(crate) struct Plan {
    pub(crate) round: u32,
    pub(crate) how: &'static str,
    pub(crate) gate: Gate,
    /// The order in which the vCPUs' threads start. The last one is held back until the others have
    /// come as far as they can without it.
    pub(crate) order: Vec<u32>,
    /// How many timer interrupts each vCPU takes.
    pub(crate) interrupts: u64,
    /// How the VM is paused at the end, KEEP_COUNTING or not; `None`: it stays RUNNING.
    pub(crate) pause: Option<bool>,
    kill_backend: Option<KillBackend>,
    /// The backend was killed as planned.
    killed: Cell<bool>,
    die: Option<Die>,
}

impl Plan {
    pub(crate) fn new(options: &Options, vcpus: u32, round: u32, how: &'static str) -> Self {
        let mut order: Vec<u32> = (0..vcpus).collect();
        fastrand::Rng::with_seed(options.seed << 32 | u64::from(round)).shuffle(&mut order);
        Plan {
            round,
            how,
            gate: options.gate,
            order,
            interrupts: options.interrupts,
            pause: Some(false),
            kill_backend: options.kill_backend,
            killed: Cell::new(false),
            die: options.die,
        }
    }

    /// The same, with another end.
    pub(crate) fn then_pause(mut self, pause: Option<bool>) -> Self {
        self.pause = pause;
        self
    }

    /// The vCPU that is held back.
    pub(crate) fn straggler(&self) -> u32 {
        self.order[self.order.len() - 1]
    }

    /// The others.
    pub(crate) fn others(&self) -> &[u32] {
        &self.order[..self.order.len() - 1]
    }

    /// How many vCPUs are restored before the fault of this round, if it is one of RESTORING.
    pub(crate) fn restored_before_the_fault(&self) -> Option<u32> {
        let kills = self.kill_backend == Some(KillBackend::Restoring);
        let dies = self.die == Some(Die::Restoring);
        (kills || dies).then_some(self.order.len() as u32 / 2)
    }

    /// The fault of RESTORING.
    pub(crate) fn fault_when_restoring(&self, time: &Time) -> Result<(), Error> {
        self.fault(KillBackend::Restoring, Die::Restoring, time)
    }

    /// The fault of ARMED.
    pub(crate) fn fault_when_armed(&self, time: &Time) -> Result<(), Error> {
        self.fault(KillBackend::Armed, Die::Armed, time)
    }

    fn fault(&self, kill: KillBackend, death: Die, time: &Time) -> Result<(), Error> {
        if self.die == Some(death) {
            die()?;
        }
        if self.kill_backend == Some(kill) {
            time.kill_backend()?;
            self.killed.set(true);
        }
        Ok(())
    }

    /// The fault of RUNNING.
    pub(crate) fn fault_when_running(&self) -> Result<(), Error> {
        match self.die == Some(Die::Running) {
            true => die(),
            false => Ok(()),
        }
    }
}

/// Ends this process as a crash does.
fn die() -> Result<(), Error> {
    kill_process(getpid(), Signal::KILL).context("kill this process")
}

/// What came of a round. Clones are the same facts: threads note them.
#[derive(Clone)]
pub(crate) struct Facts(Arc<Notes>);

struct Notes {
    clock: HostCounter,
    /// By vCPU: the host's CNTVCT just before its first KVM_RUN.
    entered_at: Vec<AtomicU64>,
    applies: AtomicU32,
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    epoch: Option<u64>,
    run: Option<Run>,
    refused: Vec<String>,
    ahead: Option<(i64, i64)>,
    ahead_at_end: Option<(i64, i64)>,
}

impl Facts {
    pub(crate) fn new(vcpus: u32) -> Result<Self, Error> {
        Ok(Facts(Arc::new(Notes {
            clock: HostCounter::open(Source::Cntvct).context("open CNTVCT_EL0")?,
            entered_at: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            applies: AtomicU32::new(0),
            shared: Mutex::default(),
        })))
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.0.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU's next step is KVM_RUN.
    pub(crate) fn enters(&self, vcpu: u32) {
        let now = self.0.clock.read(self.0.clock.native_frequency());
        self.0.entered_at[vcpu as usize].store(now, Ordering::Release);
    }

    pub(crate) fn entered_at(&self, vcpu: u32) -> u64 {
        self.0.entered_at[vcpu as usize].load(Ordering::Acquire)
    }

    /// The VM runs, from this instant and with these offsets.
    pub(crate) fn runs(&self, run: Run) {
        self.shared().run.get_or_insert(run);
    }

    pub(crate) fn is_of_epoch(&self, epoch: u64) {
        self.shared().epoch = Some(epoch);
    }

    /// The offset is in KVM, or the counts are: KVM's count is that far ahead.
    pub(crate) fn applied(&self, ahead: Bracket) {
        self.0.applies.fetch_add(1, Ordering::Relaxed);
        self.shared().ahead = Some((ahead.least, ahead.most));
    }

    /// KVM has refused the offset.
    pub(crate) fn refused(&self, error: &dyn std::error::Error) {
        self.shared().refused.push(error.to_string());
    }

    /// Reads KVM's count between two readings of the host's: how far it is ahead of the count that
    /// the VM runs with.
    pub(crate) fn compare(&self, vcpu: &Vcpu) -> Result<(), Error> {
        let now = || self.0.clock.read(self.0.clock.native_frequency());
        let id = Register::TimerCnt.id(Abi::Arm64);
        let before = now();
        let count = OneReg::get_one_reg(&vcpu.fd, id).context("read TIMER_CNT")?;
        let after = now();
        let mut shared = self.shared();
        shared.ahead_at_end = shared.run.map(|run| {
            let ahead_of = |host: u64| count.wrapping_add(run.cntvoff).wrapping_sub(host) as i64;
            (ahead_of(after), ahead_of(before))
        });
        Ok(())
    }

    /// All but what the vCPUs observed.
    pub(crate) fn round(&self, plan: &Plan) -> Round {
        let shared = self.shared();
        let killed = plan.kill_backend.filter(|_| plan.killed.get());
        let kill_backend = killed.map(|when| format!("backend-{}", name(when)));
        let die = plan.die.map(|when| format!("vmm-{}", name(when)));
        Round {
            round: plan.round,
            how: plan.how.to_owned(),
            gate: name(plan.gate),
            order: plan.order.clone(),
            killed: kill_backend.or(die),
            epoch: shared.epoch,
            cntvoff: shared.run.map(|run| run.cntvoff),
            cntpoff: shared.run.map(|run| run.cntpoff),
            confirmed_at: shared.run.map(|run| run.host_count),
            applies: self.0.applies.load(Ordering::Relaxed),
            refused: shared.refused.clone(),
            ahead: shared.ahead,
            ahead_at_end: shared.ahead_at_end,
            vcpus: Vec::new(),
        }
    }
}
