//! A restore as vCPU threads run it: all at once, in any order, through one gate.
//!
//! Each thread stages its vCPU's registers in an order of its own, says RESTORE_DONE, and asks
//! with WAIT_RUN when it may run, before or after its RESTORE_DONE. [`Release`] records how the
//! thread was released, and so whether the backend kept its promise: no vCPU runs before the last
//! RESTORE_DONE was sent, and all run with the same offsets.
//!
//! All threads that were at the gate when it opened get the same instant. A thread that asks later,
//! when the VM runs already, gets a later one. A thread that asks before its RESTORE_DONE is
//! certain to be at the gate, since requests of one queue are done in order.
//!
//! After a device state was loaded ([`Race::loaded`]) the registers are staged already: each
//! thread reads its vCPU's registers and checks them instead, and RESUME releases all.
//!
//! In a VM with CONFIRM ([`Race::confirmed`]) it is CONFIRM_RUN that releases all.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost_user_timer_frontend::{
    self as frontend, Operation, RegValue, RequestQueue, Run, SavedVcpu, Ticket,
};
use vhost_user_timer_protocol::{Abi, Register};

use crate::watch::host_count;

/// One restore of one VM.
#[derive(Debug)]
pub struct Race {
    vcpus: u32,
    deadline: Instant,
    asking: Asking,
    /// The registers came with a device state.
    loaded: bool,
    /// The last RESTORE_DONE does not open the gate. The VMM does, later.
    held: bool,
    /// The number of vCPUs that have sent RESTORE_DONE or are about to.
    done_sent: AtomicU32,
    /// The host counter when the last RESTORE_DONE was about to be sent.
    last_done: AtomicU64,
    /// The VMM's request that opens the gate was sent, or is about to be.
    opened: AtomicBool,
    field: Mutex<Field>,
    changed: Condvar,
}

/// When vCPUs send WAIT_RUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// At any point before their RESTORE_DONE.
    First,
    /// At any point, also after it.
    Anytime,
}

#[derive(Debug, Default)]
struct Field {
    /// The number of vCPUs that only have to wait.
    waiting: u32,
    released: u32,
    abandoned: bool,
}

/// How a vCPU was released.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    /// The answer of WAIT_RUN.
    pub run: Run,
    /// Whether it was released before some vCPU had sent RESTORE_DONE or, where the VMM opens the
    /// gate, before the VMM had.
    pub early: bool,
    /// Whether it was certainly at the gate when the gate opened.
    pub at_the_gate: bool,
    /// From the sending of WAIT_RUN to its answer.
    pub waited: Duration,
}

/// Why a vCPU did not get through the restore.
#[derive(Debug, thiserror::Error)]
pub enum RaceError {
    /// A request failed.
    #[error(transparent)]
    Frontend(#[from] frontend::Error),
    /// Another vCPU failed, so [`Race::abandon`] was called.
    #[error("the restore was given up")]
    Abandoned,
    /// The other vCPUs did not reach WAIT_RUN in time.
    #[error("the other vCPUs did not get to WAIT_RUN in time")]
    TimedOut,
    /// A register was loaded with another value than it was saved with.
    #[error("{} was saved as {saved:#x} and loaded as {loaded:#x}", register.name())]
    Register {
        /// Which register.
        register: Register,
        /// Its value at the save.
        saved: u64,
        /// Its value after the load.
        loaded: u64,
    },
}

impl Race {
    /// A restore of this many vCPUs, which must be over within `limit`.
    pub fn new(vcpus: u32, asking: Asking, limit: Duration) -> Self {
        Race {
            vcpus,
            asking,
            loaded: false,
            held: false,
            deadline: Instant::now() + limit,
            done_sent: AtomicU32::new(0),
            last_done: AtomicU64::new(0),
            opened: AtomicBool::new(false),
            field: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The restore of a device state that was loaded. It ends in PAUSED.
    #[must_use]
    pub fn loaded(mut self) -> Self {
        self.loaded = true;
        self.held = true;
        self
    }

    /// A restore of a VM with CONFIRM.
    #[must_use]
    pub fn confirmed(mut self) -> Self {
        self.held = true;
        self
    }

    /// The VMM's request that opens the gate is about to be sent: CONFIRM_RUN, or after a load
    /// RESUME. No vCPU may be released before.
    pub fn opening(&self) {
        self.opened.store(true, Ordering::SeqCst);
    }

    /// Takes one vCPU through the restore, on the thread that is that vCPU.
    ///
    /// With `hold` the vCPU is the one straggler: once all others have said RESTORE_DONE and wait,
    /// `hold` is called, and the last RESTORE_DONE goes out when it returns.
    ///
    /// # Errors
    ///
    /// [`RaceError`], on which [`abandon`](Self::abandon) should be called.
    pub fn enter(
        &self,
        queue: &RequestQueue,
        registers: &SavedVcpu,
        rng: &mut Rng,
        hold: Option<&dyn Fn()>,
    ) -> Result<Release, RaceError> {
        let vcpu = registers.index();
        let parts = shuffled_parts(registers, rng, !self.loaded);
        let steps = match self.asking {
            Asking::First => parts.len() + 1,
            Asking::Anytime => parts.len() + 2,
        };
        let wait_before = rng.usize(..steps);
        let mut wait = None;

        for (step, part) in parts.iter().enumerate() {
            if step == wait_before {
                wait = Some(Wait::start(queue, vcpu));
            }
            match part {
                Part::Registers(values) if self.loaded => {
                    check_registers(queue, vcpu, values, self.deadline)?;
                }
                Part::Registers(values) => {
                    queue.set_regs(vcpu, values, self.deadline)?;
                }
                Part::Whole => queue.set_vm(std::slice::from_ref(registers), self.deadline)?,
            }
            if rng.bool() {
                std::thread::yield_now();
            }
        }
        if wait_before == parts.len() {
            wait = Some(Wait::start(queue, vcpu));
        }
        if let Some(hold) = hold {
            self.until_the_others_wait()?;
            hold();
        }
        // Counted before it is sent: a vCPU that is released from now on must see the count.
        self.last_done.fetch_max(host_count(), Ordering::SeqCst);
        self.done_sent.fetch_add(1, Ordering::SeqCst);
        queue.restore_done(vcpu, self.deadline)?;
        let at_the_gate = wait.as_ref().is_some_and(|wait| wait.ticket.is_some());
        let mut wait = wait.unwrap_or_else(|| Wait::start(queue, vcpu));

        self.change(|field| field.waiting += 1);
        let run = wait.finish(queue, vcpu, self.deadline)?;
        let early = self.done_sent.load(Ordering::SeqCst) < self.vcpus
            || (self.held && !self.opened.load(Ordering::SeqCst));
        self.change(|field| field.released += 1);
        Ok(Release {
            run,
            early,
            at_the_gate,
            waited: wait.since.elapsed(),
        })
    }

    /// The host counter when the last RESTORE_DONE so far was about to be sent.
    pub fn last_done(&self) -> u64 {
        self.last_done.load(Ordering::SeqCst)
    }

    /// The number of vCPUs released so far.
    pub fn released(&self) -> u32 {
        self.field().released
    }

    /// Ends the straggler's wait for the others. Waits for the backend are ended by the frontend's
    /// shutdown handle.
    pub fn abandon(&self) {
        self.change(|field| field.abandoned = true);
    }

    fn until_the_others_wait(&self) -> Result<(), RaceError> {
        let mut field = self.field();
        while field.waiting + 1 < self.vcpus {
            if field.abandoned {
                return Err(RaceError::Abandoned);
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RaceError::TimedOut);
            }
            let waited = self.changed.wait_timeout(field, left);
            field = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn change(&self, change: impl FnOnce(&mut Field)) {
        change(&mut self.field());
        self.changed.notify_all();
    }

    fn field(&self) -> MutexGuard<'_, Field> {
        self.field.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A WAIT_RUN, in flight unless the queue had no room for it.
struct Wait {
    ticket: Option<Ticket<Run>>,
    since: Instant,
}

impl Wait {
    fn start(queue: &RequestQueue, vcpu: u32) -> Self {
        let since = Instant::now();
        let ticket = queue.submit(&Operation::wait_run(vcpu)).ok();
        queue.kick();
        Wait { ticket, since }
    }

    fn finish(
        &mut self,
        queue: &RequestQueue,
        vcpu: u32,
        deadline: Instant,
    ) -> Result<Run, frontend::Error> {
        match self.ticket.take() {
            Some(ticket) => ticket.wait(deadline),
            None => queue.wait_run(vcpu, deadline),
        }
    }
}

/// What one request stages.
enum Part {
    Registers(Vec<RegValue>),
    Whole,
}

/// Reads these registers, which must have these values.
fn check_registers(
    queue: &RequestQueue,
    vcpu: u32,
    values: &[RegValue],
    deadline: Instant,
) -> Result<(), RaceError> {
    let ids: Vec<_> = values.iter().map(|saved| saved.id).collect();
    let loaded = queue.get_regs(vcpu, &ids, deadline)?;
    for (saved, loaded) in values.iter().zip(loaded.iter()) {
        if saved.value != loaded.value
            && let Ok(register) = Register::from_id(saved.id, Abi::Arm64)
        {
            return Err(RaceError::Register {
                register,
                saved: saved.value,
                loaded: loaded.value,
            });
        }
    }
    Ok(())
}

/// A vCPU's registers in random order, in one request or several; or all by SET_VM, where that
/// is possible.
fn shuffled_parts(registers: &SavedVcpu, rng: &mut Rng, set_vm: bool) -> Vec<Part> {
    if set_vm && rng.u8(..4) == 0 {
        return vec![Part::Whole];
    }
    let mut values: Vec<_> = registers.regs(Abi::Arm64).collect();
    rng.shuffle(&mut values);
    let at_most = rng.usize(1..=values.len().max(1));
    values
        .chunks(at_most)
        .map(|values| Part::Registers(values.to_vec()))
        .collect()
}
