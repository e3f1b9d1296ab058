//! The commands of the command line.

use std::mem::offset_of;
use std::path::Path;

use vhost_user_timer_frontend::VmOptions;

use super::error::{Context, Error};
use super::life::Machine;
use super::round::Plan;
use super::snapshot::Snapshot;
use super::time::Source;
use crate::args::{Gate, Options};
use crate::guest::{Board, Record};
use crate::report::{Event, Round, Verdict};

fn source(options: &Options) -> Source {
    match &options.timer_socket {
        Some(path) => Source::Socket(path.clone()),
        None => Source::Program {
            path: options.backend.clone(),
            survives: options.kill_backend.is_some(),
        },
    }
}

/// `boot`
pub(crate) fn boot(options: &Options, save: &Path) -> Result<(), Error> {
    let (machine, round) = booted(options, Some(false))?;
    print(Event::Round(round))?;
    machine.save()?.write(save)
}

/// A machine that has been booted, and has run for a round.
pub(super) fn booted(options: &Options, pause: Option<bool>) -> Result<(Machine, Round), Error> {
    // Faults are for restores and pauses, and so is time that is wrong.
    let (gate, vm) = match options.gate {
        Gate::BestEffort => (Gate::BestEffort, VmOptions::default()),
        _ => (Gate::Confirm, VmOptions::KVM),
    };
    let sound = Options {
        gate,
        kill_backend: None,
        die: None,
        ..options.clone()
    };
    let mut machine = Machine::boot(options.vcpus, &source(options), vm)?;
    let plan = Plan::new(&sound, options.vcpus, 0, "boot").then_pause(pause);
    let round = machine.run(&plan, Machine::start_resumed, |machine, before| {
        machine.all_are_on() && machine.has_run_enough(&plan, before)
    })?;
    Ok((machine, round))
}

/// `restore`
pub(crate) fn restore(
    options: &Options,
    from: &Path,
    save: Option<&Path>,
    round: u32,
) -> Result<(), Error> {
    let snapshot = Snapshot::read(from)?;
    let (machine, round) = restored(options, &snapshot, round, "restore")?;
    print(Event::Round(round))?;
    match save {
        Some(path) => machine.save()?.write(path),
        None => Ok(()),
    }
}

/// A machine that has been restored, and has run for a round.
fn restored(
    options: &Options,
    snapshot: &Snapshot,
    round: u32,
    how: &'static str,
) -> Result<(Machine, Round), Error> {
    let source = (options.gate != Gate::None).then(|| source(options));
    let mut machine = Machine::restore(snapshot, source.as_ref())?;
    let plan = Plan::new(options, snapshot.vcpus.len() as u32, round, how);
    let start = |machine: &mut Machine, plan: &Plan, facts: &_| {
        machine.start_restored(snapshot, plan, facts)
    };
    let round = machine.run(&plan, start, |machine, before| {
        machine.has_run_enough(&plan, before)
    })?;
    Ok((machine, round))
}

/// `pauses`
pub(crate) fn pauses(options: &Options, rounds: u32, keep_counting: bool) -> Result<(), Error> {
    let mut story = Story::begin(options, Some(keep_counting))?;
    for _ in 0..rounds {
        story.resume("resume", |_| true)?;
    }
    story.end()
}

/// `lifecycle`
pub(crate) fn lifecycle(options: &Options) -> Result<(), Error> {
    if options.vcpus < 2 {
        return Err(Error::new(
            "lifecycle: vCPU 0 stays on, so --vcpus must be 2 or more",
        ));
    }
    let mut story = Story::begin(options, Some(false))?;
    story
        .machine
        .vm
        .has_no_place_for_a_late_vcpu(options.vcpus)?;
    // A vCPU that is off is a vCPU as any other: it is restored and released with the others. Its
    // thread then waits in KVM_RUN until the guest turns the vCPU on.
    let off = options.vcpus - 1;
    let is_off = |machine: &Machine| machine.vm.ram.record(off, offset_of!(Record, is_off)) != 0;
    story.tell(offset_of!(Board, turn_off), 1 << off);
    story.resume("off", is_off)?;
    story.tell(offset_of!(Board, turn_off), 0);
    story.resume("resume", is_off)?;
    story.move_on()?;
    story.tell(offset_of!(Board, turn_on), 1 << off);
    story.resume("on", |machine| !is_off(machine))?;
    story.reset()?;
    story.move_on()?;
    story.end()
}

/// A machine through rounds that are noted. It is paused between them.
struct Story<'a> {
    options: &'a Options,
    pause: Option<bool>,
    machine: Machine,
    rounds: u32,
    verdict: Verdict,
}

impl<'a> Story<'a> {
    fn begin(options: &'a Options, pause: Option<bool>) -> Result<Self, Error> {
        let (machine, round) = booted(options, pause)?;
        let mut verdict = Verdict::default();
        note(&mut verdict, round)?;
        Ok(Story {
            options,
            pause,
            machine,
            rounds: 0,
            verdict,
        })
    }

    fn plan(&mut self, how: &'static str) -> Plan {
        self.rounds += 1;
        Plan::new(self.options, self.options.vcpus, self.rounds, how).then_pause(self.pause)
    }

    fn tell(&self, field: usize, value: u64) {
        self.machine.vm.ram.set_field(field, value);
    }

    /// Resumes the machine for a round, which does not end before `is_over` is true.
    fn resume(
        &mut self,
        how: &'static str,
        is_over: impl Fn(&Machine) -> bool,
    ) -> Result<(), Error> {
        let plan = self.plan(how);
        let round = self
            .machine
            .run(&plan, Machine::start_resumed, |machine, before| {
                is_over(machine) && machine.has_run_enough(&plan, before)
            })?;
        note(&mut self.verdict, round)
    }

    /// Saves the machine, and goes on with another one that is restored, with another backend.
    fn move_on(&mut self) -> Result<(), Error> {
        let snapshot = self.machine.save()?;
        self.rounds += 1;
        let (machine, round) = restored(self.options, &snapshot, self.rounds, "restore")?;
        self.machine = machine;
        note(&mut self.verdict, round)
    }

    /// Resumes the machine until its guest resets itself, and then runs it from its entry. The VM's
    /// time goes on meanwhile.
    fn reset(&mut self) -> Result<(), Error> {
        self.tell(offset_of!(Board, reset), 1);
        let plan = self.plan("resetting").then_pause(None);
        // The round ends with the vCPU that leaves the guest.
        let round = self
            .machine
            .run(&plan, Machine::start_resumed, |_, _| false)?;
        note(&mut self.verdict, round)?;
        self.machine.reset()?;
        let plan = self.plan("reset");
        let round = self
            .machine
            .run(&plan, Machine::start_reset, |machine, before| {
                machine.all_are_on() && machine.has_run_enough(&plan, before)
            })?;
        note(&mut self.verdict, round)
    }

    fn end(self) -> Result<(), Error> {
        print(Event::Verdict(self.verdict))
    }
}

pub(super) fn note(verdict: &mut Verdict, round: Round) -> Result<(), Error> {
    verdict.add(&round);
    print(Event::Round(round))
}

pub(super) fn print(event: Event) -> Result<(), Error> {
    event.print().context("print a line")
}
