//! The demo: a VM with real threads as vCPUs, moved from one backend to another.
//!
//! 1. The experiment that KVM fails: the vCPUs bring counts that are seconds apart.
//! 2. The registers of a real VM are loaded. The VM runs, and its timers fire.
//! 3. The VM is paused, saved, and restored by a second backend. The vCPUs race, and one
//!    straggles. Timers that were due at the save fire there at once, the rest when due. The VM
//!    moves by requests or as the backend's device state, and the second backend may be killed
//!    before the restore is complete, or before the offsets are confirmed.
//!
//! In each of them the VMM puts the VM's offsets into its [hypervisor](super::hypervisor), where
//! the guests' counts are made of them, and confirms them: before that, no vCPU runs.
//!
//! The vCPU threads themselves measure whether the backends keep their promises.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use fastrand::Rng;
use serde::Serialize;
use vhost_user_timer_frontend::{self as frontend, Run, SavedVcpu, Timer};
use vhost_user_timer_protocol::{Phase, Register};

use super::act::{Act, Entry, Life, Moment, Played};
use super::error::{Error, Side};
use super::guest::{Guest, Taken};
use super::report::{Console, Report, Restore, Row, counted, grouped};
use super::vmm::{PATIENCE, Vmm, Wake};
use vhost_user_timer_kit::kvm_data::KvmData;
use vhost_user_timer_kit::watch::{HOST_FREQUENCY, Watch};

/// With at most this many vCPUs, each recorded timer's expiry gets a line.
const FEW: u32 = 16;

/// Ticks that each vCPU must see on the destination.
const TICKS_AFTER: u32 = 2;

const TICKS_PER_MS: u64 = HOST_FREQUENCY / 1_000;

/// What the demo is to do.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) vcpus: u32,
    pub(super) seed: u64,
    pub(super) program: PathBuf,
    pub(super) via: Via,
    /// When the destination's backend is killed.
    pub(super) kill: Option<Moment>,
}

/// How the VM gets from one backend to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Via {
    /// The VMM reads the vCPUs' registers, and each vCPU's thread writes its own
    Requests,
    /// The VMM passes on the backend's own stream, as a vhost-user migration does, and each
    /// vCPU's thread checks its registers
    DeviceState,
}

/// The VM as it was paused and saved.
struct Saved {
    paused: Run,
    vcpus: Vec<SavedVcpu>,
    device_state: Option<Vec<u8>>,
}

/// Runs the demo.
pub(super) fn run(plan: &Plan, console: &Console) -> Result<Report, Error> {
    let data = KvmData::recorded();
    let mut demo = Demo {
        plan,
        vcpus: plan.vcpus,
        frequency: data.frequency,
        rng: Rng::with_seed(plan.seed),
        console,
        restores: Vec::new(),
    };
    let program = plan.program.display();
    console.say(format_args!("the backend program is {program}"));
    let source = demo.start(Side::Source)?;
    demo.configure(&source)?;
    let skewed_backwards = demo.skewed(&source, &data)?;
    source.reset()?;
    demo.configure(&source)?;

    let watch = Watch::default();
    let (mut guests, saved) = demo.run_on_source(&source, &data, &watch)?;
    let destination = demo.start(Side::Destination)?;
    // A VMM that needs CONFIRM configures, whatever the device state says.
    demo.configure(&destination)?;
    source.finish()?;
    let straggler = demo.rng.u32(..plan.vcpus);
    let restored = demo.move_to(&destination, &saved, &watch, &mut guests, straggler)?;
    // Both backends have the same host counter, in nanoseconds.
    let offset = restored.entries.first();
    let offset = offset.map_or(0, |entry| entry.release.run.cntvoff);
    let away = Duration::from_nanos(offset.wrapping_sub(saved.paused.cntvoff));
    console.say(format_args!(
        "the move took {:.1} ms: the offset grew by exactly that, and the guests saw none of it",
        away.as_secs_f64() * 1e3
    ));
    demo.await_the_end(&destination, &mut guests, &restored.inboxes)?;
    destination.finish()?;
    console.say(format_args!(
        "both backends exited with status 0 on SIGTERM"
    ));

    let rows = (guests.iter().zip(&saved.vcpus).zip(&restored.entries))
        .map(|((guest, saved), entry)| row(guest, saved, entry, straggler))
        .collect();
    Ok(Report {
        restores: demo.restores,
        rows,
        away_ms: away,
        backwards: skewed_backwards + guests.iter().map(|g| g.backwards).sum::<u64>(),
        premature: guests.iter().map(|guest| guest.premature).sum(),
    })
}

fn row(guest: &Guest, saved: &SavedVcpu, entry: &Entry, straggler: u32) -> Row {
    let release = &entry.release;
    let vcpu = saved.index();
    Row {
        vcpu,
        straggler: vcpu == straggler,
        saved_count: saved.get(Register::TimerCnt).unwrap_or(0),
        released_count: release.run.virt_count,
        cntvoff: release.run.cntvoff,
        cntpoff: release.run.cntpoff,
        waited_ms: release.waited,
        fired_on_source: guest.fired(Side::Source),
        fired_on_destination: guest.fired(Side::Destination),
        programmed: guest.programmed(),
        lost: guest.outstanding().count() as u64,
        doubled: guest.doubled(),
        early: release.early,
        unconfirmed: entry.unconfirmed(),
        backwards: guest.backwards,
    }
}

struct Demo<'a> {
    plan: &'a Plan,
    vcpus: u32,
    frequency: u64,
    rng: Rng,
    console: &'a Console,
    restores: Vec<Restore>,
}

impl Demo<'_> {
    fn start(&self, side: Side) -> Result<Vmm, Error> {
        let mortal = self.plan.kill.is_some() && side == Side::Destination;
        let vmm = Vmm::start(side, &self.plan.program, self.vcpus, mortal)?;
        self.console.say(format_args!(
            "the {side} is backend process {}, with {}",
            vmm.pid(),
            counted(vmm.queues() as u64, "request queue")
        ));
        Ok(vmm)
    }

    fn configure(&self, vmm: &Vmm) -> Result<(), Error> {
        vmm.configure(self.vcpus, self.frequency)
    }

    /// Act 1. Returns how often the count decreased.
    fn skewed(&mut self, vmm: &Vmm, data: &KvmData) -> Result<u64, Error> {
        let brought = KvmData::for_vcpus(&data.skewed, self.vcpus);
        self.headline("1. The vCPUs bring counts that are seconds apart, in random order");
        let counts = data.skewed.iter().filter_map(|v| v.get(Register::TimerCnt));
        let recorded = counts.map(seconds);
        self.console.say(format_args!(
            "given counts of {} s, KVM made the one written last the count of every vCPU",
            recorded.collect::<Vec<_>>().join(", "),
        ));
        let mut guests = self.guests();
        let watch = Watch::default();
        let act = Act {
            name: "skewed",
            vmm,
            brought: &brought,
            watch: &watch,
            life: Life::Look,
            straggler: None,
            device_state: None,
            kill: None,
        };
        self.play(act, &mut guests, |_| ())?;
        Ok(guests.iter().map(|guest| guest.backwards).sum())
    }

    /// Act 2. Returns the guests, and the VM as it was paused and saved.
    fn run_on_source(
        &mut self,
        vmm: &Vmm,
        data: &KvmData,
        watch: &Watch,
    ) -> Result<(Vec<Guest>, Saved), Error> {
        let console = self.console;
        let brought = KvmData::for_vcpus(&data.armed, self.vcpus);
        let mut guests = self.guests();
        for (guest, registers) in guests.iter_mut().zip(&brought) {
            guest.adopt(registers);
        }
        // The timers that fire before the move; the rest are due about a second later.
        let cval = |vcpu: &SavedVcpu| vcpu.get(Register::TimerCval);
        let first = brought.iter().filter_map(cval).min();
        let due_first = brought.iter().filter(|vcpu| cval(vcpu) == first).count();

        self.headline("2. The registers of a real VM, with its timers armed; it runs");
        let few = self.vcpus <= FEW;
        let act = Act {
            name: "armed",
            vmm,
            brought: &brought,
            watch,
            life: Life::Boot,
            straggler: None,
            device_state: None,
            kill: None,
        };
        self.play(act, &mut guests, |interrupts| {
            console.say(format_args!(
                "each guest starts a tick on its physical timer; the virtual timers are set as \
                 KVM had them"
            ));
            let virtual_timers = interrupts
                .filter(|taken| taken.timer == Timer::Virtual)
                .inspect(|taken| print_taken(console, few, taken));
            let taken = virtual_timers.take(due_first).count();
            console.say(format_args!(
                "{taken} of the {} virtual timers fired here",
                brought.len()
            ));
            vmm.lines.wake_all(Wake::Stop);
        })?;

        self.headline("3. Paused, saved, and restored by another backend");
        let ticks: Vec<_> = guests
            .iter()
            .flat_map(Guest::outstanding)
            .filter(|&(_, timer, _)| timer == Timer::Physical)
            .collect();
        let unasserted = vmm.lines.until_asserted(&ticks);
        console.say(format_args!(
            "the vCPUs are stopped; {} came due afterwards, with no vCPU to take the interrupt",
            counted((ticks.len() - unasserted) as u64, "tick")
        ));
        let paused = vmm.ask("pause the VM", |queue| queue.pause(PATIENCE))?;
        // With a device state, the vCPUs check it against these.
        let vcpus = vmm
            .ask("save the VM", |queue| queue.save(PATIENCE))?
            .vcpus()
            .to_vec();
        let device_state = match self.plan.via {
            Via::Requests => None,
            Via::DeviceState => Some(vmm.save_device_state()?),
        };
        let count = grouped(paused.virt_count);
        match &device_state {
            None => console.say(format_args!("paused and saved at count {count}")),
            Some(state) => console.say(format_args!(
                "paused at count {count}; the device state has {} bytes",
                grouped(state.len() as u64)
            )),
        }
        let saved = Saved {
            paused,
            vcpus,
            device_state,
        };
        Ok((guests, saved))
    }

    /// Act 3, until the guests have shut down.
    fn move_to(
        &mut self,
        vmm: &Vmm,
        saved: &Saved,
        watch: &Watch,
        guests: &mut [Guest],
        straggler: u32,
    ) -> Result<Played, Error> {
        let console = self.console;
        let hold = Duration::from_millis(self.rng.u64(150..250));
        let outstanding = guests.iter().flat_map(Guest::outstanding);
        let (due_at_save, to_come): (Vec<_>, Vec<_>) =
            outstanding.partition(|&(_, timer, _)| timer == Timer::Physical);
        let (mut due_at_save, mut virtual_to_come) = (due_at_save.len(), to_come.len());
        let few = self.vcpus <= FEW;
        let ticks_due = counted(due_at_save as u64, "tick");
        let mut ticks_to_come = TICKS_AFTER as usize * guests.len();
        let mut ticks = vec![0; guests.len()];
        let act = Act {
            name: "moved",
            vmm,
            brought: &saved.vcpus,
            watch,
            life: Life::GoOn,
            straggler: Some((straggler, hold)),
            device_state: saved.device_state.as_deref(),
            kill: self.plan.kill,
        };
        self.play(act, guests, |interrupts| {
            for taken in interrupts {
                match taken.timer {
                    Timer::Virtual => {
                        print_taken(console, few, &taken);
                        virtual_to_come = virtual_to_come.saturating_sub(1);
                    }
                    Timer::Physical => {
                        let ticks = &mut ticks[taken.vcpu as usize];
                        *ticks += 1;
                        ticks_to_come -= usize::from(*ticks <= TICKS_AFTER);
                        due_at_save = due_at_save.saturating_sub(usize::from(*ticks == 1));
                        if *ticks == 1 && due_at_save == 0 {
                            console.say(format_args!(
                                "all {ticks_due} that were due at the save have now been taken"
                            ));
                        }
                    }
                }
                if virtual_to_come == 0 && ticks_to_come == 0 {
                    break;
                }
            }
            console.say(format_args!(
                "the guests shut down: each takes what is due, and programs nothing more"
            ));
            vmm.lines.wake_all(Wake::ShutDown);
        })
    }

    /// Checks that no interrupt arrives after the last deadline was taken.
    fn await_the_end(
        &self,
        vmm: &Vmm,
        guests: &mut [Guest],
        inboxes: &[Receiver<Wake>],
    ) -> Result<(), Error> {
        vmm.ask("pause the VM", |queue| queue.pause(PATIENCE))?;
        let info = vmm.ask("ask for the phase", |queue| queue.info(PATIENCE))?;
        // Events arrive in order, so everything asserted before is in the inboxes by then.
        if !vmm.lines.until_phase(Phase::Paused, info.epoch) {
            return Err(Error::Vmm {
                what: "see the VM paused",
                side: vmm.side,
                source: frontend::Error::TimedOut { what: "an event" },
            });
        }
        for (guest, inbox) in guests.iter_mut().zip(inboxes) {
            let interrupts = inbox
                .try_iter()
                .filter(|w| matches!(w, Wake::Interrupt(..)));
            guest.stray += interrupts.count() as u64;
        }
        Ok(())
    }

    /// New guests. The more there are, the slower they tick, so as not to flood the machine.
    fn guests(&mut self) -> Vec<Guest> {
        let least = (u64::from(self.vcpus) * 2 / 5).clamp(20, 400);
        (0..self.vcpus)
            .map(|vcpu| {
                let ms = self.rng.u64(least..least * 2);
                Guest::new(vcpu, ms * TICKS_PER_MS)
            })
            .collect()
    }

    fn headline(&self, text: &str) {
        self.console.print(format_args!("\n{text}"));
    }

    fn play(
        &mut self,
        act: Act<'_>,
        guests: &mut [Guest],
        conduct: impl FnOnce(&mut dyn Iterator<Item = Taken>),
    ) -> Result<Played, Error> {
        let played = act.play(guests, &mut self.rng, self.console, conduct)?;
        self.restores.push(played.record.clone());
        Ok(played)
    }
}

fn print_taken(console: &Console, few: bool, taken: &Taken) {
    if few {
        console.say(format_args!(
            "vCPU {} takes its virtual timer's interrupt, due at {}, {:.2} ms later",
            taken.vcpu,
            grouped(taken.cval),
            taken.count.wrapping_sub(taken.cval) as f64 / TICKS_PER_MS as f64,
        ));
    }
}

fn seconds(count: u64) -> String {
    format!("{}", count as f64 / HOST_FREQUENCY as f64)
}
