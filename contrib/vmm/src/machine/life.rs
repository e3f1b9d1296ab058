//! A machine through its life: it is booted or restored, runs for a round, and stops.

use std::mem::offset_of;

use vhost_user_timer_counter::{HostCounter, Source as CounterSource};
use vhost_user_timer_frontend::{Run, VmOptions};

use super::error::{Context, Error};
use super::round::{Facts, Plan};
use super::snapshot::Snapshot;
use super::time::{Source, Time};
use super::vcpu::{Running, Vcpu};
use super::vm::Vm;
use super::{gic, registers};
use crate::guest::{Board, Record};
use crate::report::{Round, VcpuRound};

/// How often a vCPU's timer interrupts it.
const PERIODS_PER_SECOND: u64 = 50;

/// A VM whose vCPUs do not run, with its time.
pub(crate) struct Machine {
    pub(crate) vm: Vm,
    /// By index.
    pub(crate) vcpus: Vec<Vcpu>,
    /// None where KVM alone has the VM's time.
    pub(crate) time: Option<Time>,
    /// The instant at which the VM's time was stopped.
    paused: Option<Run>,
    /// The GIC as it was made, for a reset.
    initial_gic: gic::State,
}

impl Machine {
    /// A machine whose guest has not begun.
    pub(crate) fn boot(vcpus: u32, source: &Source, options: VmOptions) -> Result<Self, Error> {
        let counter = HostCounter::open(CounterSource::Cntvct).context("read CNTFRQ_EL0")?;
        let time = Time::start(source)?;
        // A day: so an offset that is not in KVM makes a count that the guest finds too small.
        time.configure(vcpus, options, 86_400 * counter.native_frequency())?;
        let machine = Self::make(vcpus, Some(time))?;
        machine.vm.load_program(&machine.vcpus)?;
        let ram = &machine.vm.ram;
        ram.set_field(
            offset_of!(Board, period),
            counter.native_frequency() / PERIODS_PER_SECOND,
        );
        ram.set_field(offset_of!(Board, turn_on), (1 << vcpus) - 2);
        Ok(machine)
    }

    /// A machine as it was saved, but for its vCPUs' registers: each vCPU's thread loads its own.
    pub(crate) fn restore(snapshot: &Snapshot, source: Option<&Source>) -> Result<Self, Error> {
        let time = source.map(Time::start).transpose()?;
        let machine = Self::make(snapshot.vcpus.len() as u32, time)?;
        machine.vm.ram.write(crate::guest::RAM, &snapshot.ram)?;
        machine.vm.gic.load(&snapshot.gic)?;
        Ok(machine)
    }

    fn make(vcpus: u32, time: Option<Time>) -> Result<Self, Error> {
        let (vm, vcpus) = Vm::new(vcpus)?;
        let initial_gic = vm.gic.save()?;
        Ok(Machine {
            vm,
            vcpus,
            time,
            paused: None,
            initial_gic,
        })
    }

    /// Saves the VM, which is paused.
    pub(crate) fn save(&self) -> Result<Snapshot, Error> {
        let time = self.time()?;
        let running = || Error::new("save the VM: it is not paused");
        let paused = self.paused.as_ref().ok_or_else(running)?;
        let vcpus = self.vcpus.iter().map(registers::save);
        Ok(Snapshot {
            timers: time.save(&self.vcpus, paused)?.to_bytes(),
            vcpus: vcpus.collect::<Result<_, _>>()?,
            gic: self.vm.gic.save()?,
            ram: self.vm.ram.bytes()?,
        })
    }

    /// Resets the guest. Its time goes on, and is the VM's as before: there is nothing to restore,
    /// to apply or to confirm.
    pub(crate) fn reset(&self) -> Result<(), Error> {
        self.vm.ram.set_field(offset_of!(Board, reset), 0);
        let others = (1 << self.vcpus.len()) - 2;
        self.vm.ram.set_field(offset_of!(Board, turn_on), others);
        self.vm.reset(&self.vcpus, &self.initial_gic)
    }

    pub(crate) fn time(&self) -> Result<&Time, Error> {
        let none = || Error::new("--gate none: there is no backend");
        self.time.as_ref().ok_or_else(none)
    }

    /// Runs the guest for a round. `start` starts the vCPUs' threads. The round ends when `is_over`
    /// is true, or by its time limit. Then no vCPU is in the guest, and the VM is paused.
    pub(crate) fn run(
        &mut self,
        plan: &Plan,
        start: impl FnOnce(&mut Self, &Plan, &Facts) -> Result<Running, Error>,
        is_over: impl Fn(&Self, &Before) -> bool,
    ) -> Result<Round, Error> {
        let count = self.vcpus.len() as u32;
        let number = self.vm.ram.field(offset_of!(Board, round));
        self.vm.ram.set_field(offset_of!(Board, round), number + 1);
        let before = Before::of(&self.vm, count);
        let facts = Facts::new(count)?;
        let running = start(self, plan, &facts)?;
        let in_time = running.wait_until(|| is_over(self, &before));
        plan.fault_when_running()?;
        let (vcpus, _) = running.stop()?;
        self.vcpus = vcpus;
        facts.compare(&self.vcpus[0])?;
        self.paused = match (&self.time, plan.pause) {
            (Some(time), Some(keep_counting)) => Some(time.pause(keep_counting)?),
            _ => None,
        };
        self.check_for_exceptions()?;
        let mut round = facts.round(plan);
        round.vcpus = (0..count)
            .map(|vcpu| before.until_now(&self.vm, vcpu, &facts, !in_time))
            .collect();
        Ok(round)
    }

    fn check_for_exceptions(&self) -> Result<(), Error> {
        for vcpu in &self.vcpus {
            let record = |offset| self.vm.ram.record(vcpu.index, offset);
            let (esr, elr) = (
                record(offset_of!(Record, fault)),
                record(offset_of!(Record, fault_at)),
            );
            if esr != 0 {
                let vcpu = vcpu.index;
                return Err(Error::new(format!(
                    "run the guest: vCPU {vcpu} took an exception: ESR {esr:#x}, ELR {elr:#x}"
                )));
            }
        }
        Ok(())
    }

    /// Whether vCPU 0 has turned the others on.
    pub(crate) fn all_are_on(&self) -> bool {
        self.vm.ram.field(offset_of!(Board, turn_on)) == 0
    }

    /// Whether each vCPU that is on has read its counter in this round and has taken as many timer
    /// interrupts as the plan says.
    pub(crate) fn has_run_enough(&self, plan: &Plan, before: &Before) -> bool {
        (0..).zip(&before.0).all(|(vcpu, before)| {
            let record = |offset| self.vm.ram.record(vcpu, offset);
            // Where the guest's time is wrong, its timers may be hours away.
            let wanted = if plan.gate.is_sound() {
                plan.interrupts
            } else {
                0
            };
            let interrupts = record(offset_of!(Record, interrupts)) - before.interrupts;
            let is_off = record(offset_of!(Record, is_off)) != 0;
            is_off || has_read(&self.vm, vcpu) && interrupts >= wanted
        })
    }
}

/// Whether a vCPU has read its counter in this round.
pub(crate) fn has_read(vm: &Vm, vcpu: u32) -> bool {
    let round = vm.ram.field(offset_of!(Board, round));
    vm.ram.record(vcpu, offset_of!(Record, round)) == round
}

/// Whether a vCPU has read its counter for half a second in this round.
pub(crate) fn has_read_for_long(vm: &Vm, vcpu: u32) -> bool {
    let get = |offset| vm.ram.record(vcpu, offset);
    let second = PERIODS_PER_SECOND * vm.ram.field(offset_of!(Board, period));
    let read_for = get(offset_of!(Record, last)).checked_sub(get(offset_of!(Record, first)));
    has_read(vm, vcpu) && read_for.is_some_and(|ticks| ticks >= second / 2)
}

/// What the vCPUs had observed before a round.
pub(crate) struct Before(Vec<Observed>);

struct Observed {
    readings: u64,
    below_published: u64,
    below_own: u64,
    interrupts: u64,
    early: u64,
    spurious: u64,
}

impl Before {
    fn of(vm: &Vm, vcpus: u32) -> Self {
        Before((0..vcpus).map(|vcpu| Observed::by(vm, vcpu)).collect())
    }

    /// What a vCPU has observed since. With `late` the round has ended by its time limit.
    fn until_now(&self, vm: &Vm, vcpu: u32, facts: &Facts, late: bool) -> VcpuRound {
        let before = &self.0[vcpu as usize];
        let now = Observed::by(vm, vcpu);
        let get = |offset| vm.ram.record(vcpu, offset);
        let on = get(offset_of!(Record, is_off)) == 0;
        let overdue = get(offset_of!(Record, last)).checked_sub(get(offset_of!(Record, armed)));
        let second = PERIODS_PER_SECOND * vm.ram.field(offset_of!(Board, period));
        VcpuRound {
            vcpu,
            on,
            entered_at: facts.entered_at(vcpu),
            first: has_read(vm, vcpu).then(|| get(offset_of!(Record, first))),
            readings: now.readings - before.readings,
            below_published: now.below_published - before.below_published,
            below_own: now.below_own - before.below_own,
            worst: get(offset_of!(Record, worst)),
            interrupts: now.interrupts - before.interrupts,
            early: now.early - before.early,
            spurious: now.spurious - before.spurious,
            latest: get(offset_of!(Record, latest)),
            lost: u64::from(late && on && overdue.is_some_and(|ticks| ticks > second)),
            starts: get(offset_of!(Record, starts)),
        }
    }
}

impl Observed {
    fn by(vm: &Vm, vcpu: u32) -> Self {
        let get = |offset| vm.ram.record(vcpu, offset);
        Observed {
            readings: get(offset_of!(Record, readings)),
            below_published: get(offset_of!(Record, below_published)),
            below_own: get(offset_of!(Record, below_own)),
            interrupts: get(offset_of!(Record, interrupts)),
            early: get(offset_of!(Record, early)),
            spurious: get(offset_of!(Record, spurious)),
        }
    }
}
