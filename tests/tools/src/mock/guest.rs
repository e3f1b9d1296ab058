//! The guest on a vCPU. It reads the count, and handles its timers' interrupts as a kernel does.
//!
//! A [`Guest`] stands for the guest's memory, so it moves with the VM. It keeps a ledger of every
//! deadline it programmed, and of how often the interrupt came, which must be exactly once.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use serde::Serialize;
use vhost_user_timer_frontend::{self as frontend, RegValue, RequestQueue, SavedVcpu, Timer};
use vhost_user_timer_protocol::wire::ctl;
use vhost_user_timer_protocol::{Abi, Register};

use super::error::Side;
use super::hypervisor::Hypervisor;
use super::vmm::{PATIENCE, Programmed, Wake};
use vhost_user_timer_kit::watch::Watch;

/// A deadline that the guest programmed.
#[derive(Clone, Copy, Debug)]
struct Entry {
    timer: Timer,
    cval: u64,
    taken: u32,
}

/// How often each timer's interrupt was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Fired {
    #[serde(rename = "virtual")]
    pub(super) virt: u32,
    #[serde(rename = "physical")]
    pub(super) phys: u32,
}

/// One vCPU's guest.
#[derive(Debug)]
pub(super) struct Guest {
    vcpu: u32,
    /// The physical timer's period: the guest's tick.
    period: u64,
    ledger: Vec<Entry>,
    fired: [Fired; 2],
    /// How often the count decreased.
    pub(super) backwards: u64,
    /// Interrupts that came before their deadline.
    pub(super) premature: u64,
    /// Interrupts without an outstanding deadline.
    pub(super) stray: u64,
}

/// What a running guest needs from the VMM.
pub(super) struct Machine<'a> {
    pub(super) side: Side,
    pub(super) queue: &'a RequestQueue,
    pub(super) hypervisor: &'a Hypervisor,
    pub(super) inbox: Receiver<Wake>,
    pub(super) watch: &'a Watch,
    pub(super) taken: Sender<Taken>,
}

/// An interrupt that a vCPU took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) vcpu: u32,
    pub(super) timer: Timer,
    pub(super) cval: u64,
    /// The count when it was taken.
    pub(super) count: u64,
}

impl Guest {
    pub(super) fn new(vcpu: u32, period: u64) -> Self {
        Guest {
            vcpu,
            period,
            ledger: Vec::new(),
            fired: Default::default(),
            backwards: 0,
            premature: 0,
            stray: 0,
        }
    }

    /// Enters the deadlines of these registers: of timers that are enabled and not masked.
    pub(super) fn adopt(&mut self, registers: &SavedVcpu) {
        use Register::{PtimerCtl, PtimerCval, TimerCtl, TimerCval};
        for (timer, control, compare) in [
            (Timer::Virtual, TimerCtl, TimerCval),
            (Timer::Physical, PtimerCtl, PtimerCval),
        ] {
            let on = |control| control & (ctl::ENABLE | ctl::IMASK) == ctl::ENABLE;
            if registers.get(control).is_some_and(on)
                && let Some(cval) = registers.get(compare)
            {
                self.program(timer, cval);
            }
        }
    }

    /// Reads the count this often. Returns the first reading.
    pub(super) fn watch_count(
        &mut self,
        watch: &Watch,
        hypervisor: &Hypervisor,
        times: u32,
    ) -> u64 {
        let mut read = || {
            let reading = watch.read(hypervisor.offset(Timer::Virtual));
            self.backwards += u64::from(reading.went_back);
            reading.count
        };
        let first = read();
        for _ in 1..times {
            read();
        }
        first
    }

    /// Starts the tick, on the physical timer.
    pub(super) fn start_tick(&mut self, machine: &Machine<'_>) -> Result<(), frontend::Error> {
        let due = self.next_tick(machine);
        self.arm_tick(machine, due)
    }

    /// Runs and waits for interrupts until the VMM stops it, or until it shall shut down and has
    /// nothing left to wait for.
    pub(super) fn serve(&mut self, machine: &Machine<'_>) -> Result<(), frontend::Error> {
        let mut last_moment = None;
        loop {
            if last_moment.is_some() && self.outstanding().next().is_none() {
                return Ok(());
            }
            let left = last_moment.map_or(PATIENCE, |at: Instant| {
                at.saturating_duration_since(Instant::now())
            });
            match machine.inbox.recv_timeout(left) {
                Ok(Wake::Interrupt(timer, cval)) => {
                    self.handle(machine, timer, cval, last_moment.is_some())?;
                }
                Ok(Wake::ShutDown) => last_moment = Some(Instant::now() + PATIENCE),
                // Whatever has not arrived by now is lost, and the ledger shows it.
                Ok(Wake::Stop)
                | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Ok(());
                }
            }
        }
    }

    /// The deadlines whose interrupt has not come yet.
    pub(super) fn outstanding(&self) -> impl Iterator<Item = Programmed> {
        // Whatever is outstanding is near the end, but for a virtual timer's deadline.
        let entries = self.ledger.iter().filter(|entry| entry.taken == 0);
        entries.map(|entry| (self.vcpu, entry.timer, entry.cval))
    }

    pub(super) fn fired(&self, side: Side) -> Fired {
        self.fired[side as usize]
    }

    /// Deadlines that were programmed.
    pub(super) fn programmed(&self) -> usize {
        self.ledger.len()
    }

    /// Interrupts too many.
    pub(super) fn doubled(&self) -> u64 {
        let again = |entry: &Entry| u64::from(entry.taken.saturating_sub(1));
        self.stray + self.ledger.iter().map(again).sum::<u64>()
    }

    /// The interrupt handler. It leaves the line low; otherwise the interrupt would come again.
    fn handle(
        &mut self,
        machine: &Machine<'_>,
        timer: Timer,
        cval: u64,
        shutting_down: bool,
    ) -> Result<(), frontend::Error> {
        self.note(machine, timer, cval);
        match timer {
            Timer::Virtual => machine.set(self.vcpu, &[(Register::TimerCtl, 0)]).map(drop),
            Timer::Physical if shutting_down => machine
                .set(self.vcpu, &[(Register::PtimerCtl, 0)])
                .map(drop),
            Timer::Physical => {
                let due = self.next_tick(machine);
                self.arm_tick(machine, due)
            }
        }
    }

    fn arm_tick(&mut self, machine: &Machine<'_>, mut due: u64) -> Result<(), frontend::Error> {
        loop {
            self.program(Timer::Physical, due);
            let tick = [
                (Register::PtimerCval, due),
                (Register::PtimerCtl, ctl::ENABLE),
            ];
            if !machine.set(self.vcpu, &tick)?.physical_line {
                return Ok(());
            }
            // Already due when it was set: the line is high, and no event reports that.
            self.note(machine, Timer::Physical, due);
            due = self.next_tick(machine);
        }
    }

    fn next_tick(&self, machine: &Machine<'_>) -> u64 {
        let count = machine.hypervisor.count(Timer::Physical);
        count.wrapping_add(self.period)
    }

    fn program(&mut self, timer: Timer, cval: u64) {
        self.ledger.push(Entry {
            timer,
            cval,
            taken: 0,
        });
    }

    fn note(&mut self, machine: &Machine<'_>, timer: Timer, cval: u64) {
        let count = machine.hypervisor.count(timer);
        self.premature += u64::from(count < cval);
        self.watch_count(machine.watch, machine.hypervisor, 1);
        let mut newest_first = self.ledger.iter_mut().rev();
        match newest_first.find(|entry| (entry.timer, entry.cval) == (timer, cval)) {
            Some(entry) => entry.taken += 1,
            None => self.stray += 1,
        }
        let fired = &mut self.fired[machine.side as usize];
        match timer {
            Timer::Virtual => fired.virt += 1,
            Timer::Physical => fired.phys += 1,
        }
        // The VMM may have stopped listening.
        let _ = machine.taken.send(Taken {
            vcpu: self.vcpu,
            timer,
            cval,
            count,
        });
    }
}

impl Machine<'_> {
    fn set(
        &self,
        vcpu: u32,
        values: &[(Register, u64)],
    ) -> Result<frontend::SetRegs, frontend::Error> {
        let values: Vec<_> = values
            .iter()
            .map(|&(register, value)| RegValue::new(register.id(Abi::Arm64), value))
            .collect();
        self.queue.set_regs(vcpu, &values, PATIENCE)
    }
}
