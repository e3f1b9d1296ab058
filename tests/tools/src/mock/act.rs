//! One restore on one backend, and what the vCPUs do after it: the threads, and how they are
//! started and stopped.

use std::collections::HashSet;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost_user_timer_frontend::{self as frontend, Info, RestoreOptions, Run, SavedVcpu};
use vhost_user_timer_protocol::{Phase, Register};

use super::error::Error;
use super::guest::{Guest, Machine, Taken};
use super::report::{Console, Metre, Restore, counted};
use super::vmm::{PATIENCE, Vmm, Wake};
use vhost_user_timer_kit::race::{Asking, Race, RaceError, Release};
use vhost_user_timer_kit::watch::{Watch, host_count};

/// A vCPU thread's stack. Nothing on it is large, and there may be thousands of them.
const STACK: usize = 256 * 1024;

/// Readings of the count by all vCPUs together, right after their release.
const READINGS: u32 = 64_000;

/// What a vCPU does once it is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// It reads the count and stops.
    Look,
    /// It boots: it starts its tick, and runs until it is stopped.
    Boot,
    /// It continues where it was.
    GoOn,
}

/// A restore of a whole VM.
#[derive(Clone, Copy)]
pub(super) struct Act<'a> {
    pub(super) name: &'static str,
    pub(super) vmm: &'a Vmm,
    /// The registers that each vCPU brings.
    pub(super) brought: &'a [SavedVcpu],
    pub(super) watch: &'a Watch,
    pub(super) life: Life,
    /// The vCPU that keeps the others waiting, and for how long.
    pub(super) straggler: Option<(u32, Duration)>,
    /// The device state that carries the registers, unless the vCPUs write them.
    pub(super) device_state: Option<&'a [u8]>,
    /// When the backend is killed.
    pub(super) kill: Option<Moment>,
}

/// When the destination's backend is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Moment {
    /// All vCPUs but the straggler are restored, and wait
    MidRestore,
    /// The offsets are decided and in the hypervisor, and not confirmed yet
    Armed,
}

/// A finished act.
pub(super) struct Played {
    /// By vCPU.
    pub(super) entries: Vec<Entry>,
    /// By vCPU, what arrived too late to wake it.
    pub(super) inboxes: Vec<Receiver<Wake>>,
    pub(super) record: Restore,
}

/// How a vCPU entered the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) release: Release,
    /// The host counter at the guest's first reading of its count, by the offset that the backend
    /// gave.
    pub(super) first_reading: u64,
}

impl Entry {
    /// Whether the guest read its count before the offsets were confirmed.
    pub(super) fn unconfirmed(&self) -> bool {
        self.first_reading < self.release.run.host_count
    }
}

/// What all vCPU threads of an act share.
struct Stage<'a> {
    act: Act<'a>,
    race: Race,
    console: &'a Console,
    /// The VMM's own error, if any.
    failed: Mutex<Option<Error>>,
}

/// What one vCPU thread is given.
struct Role<'a> {
    guest: &'a mut Guest,
    registers: SavedVcpu,
    rng: Rng,
    inbox: Receiver<Wake>,
    entered: Sender<(u32, Entry)>,
    taken: Sender<Taken>,
}

type VcpuThread<'scope> = ScopedJoinHandle<'scope, Result<(u32, Receiver<Wake>), Error>>;

impl Act<'_> {
    /// Plays the act, with one thread for each vCPU. Once all are released, `conduct` gets the
    /// interrupts as they are taken; `conduct` must make the vCPUs stop.
    pub(super) fn play(
        self,
        guests: &mut [Guest],
        rng: &mut Rng,
        console: &Console,
        conduct: impl FnOnce(&mut dyn Iterator<Item = Taken>),
    ) -> Result<Played, Error> {
        self.begin()?;
        let (entered, entries) = mpsc::channel();
        let (taken, interrupts) = mpsc::channel();
        let mut roles = self.cast(guests, rng, &entered, &taken);
        drop((entered, taken));
        rng.shuffle(&mut roles);

        let race = Race::new(self.vcpus(), Asking::First, PATIENCE).confirmed();
        let stage = Stage {
            act: self,
            race: match self.device_state {
                Some(_) => race.loaded(),
                None => race,
            },
            console,
            failed: Mutex::default(),
        };
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for role in roles {
                match stage.spawn(scope, role) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        stage.fail(error);
                        break;
                    }
                }
            }
            let opened = stage.open_gate().unwrap_or_else(|error| {
                stage.fail(error);
                Opened::default()
            });
            let mut entries: Vec<_> = entries.iter().take(self.brought.len()).collect();
            entries.sort_by_key(|&(vcpu, _)| vcpu);
            let entries: Vec<_> = entries.into_iter().map(|(_, entry)| entry).collect();
            let record = self.record(&entries, opened);
            if entries.len() == self.brought.len() {
                console.say(format_args!("{}", record.outcome()));
                console.say(format_args!("{}", record.metre));
                let deadline = Instant::now() + PATIENCE;
                conduct(&mut std::iter::from_fn(|| {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    interrupts.recv_timeout(left).ok()
                }));
            }
            Ok(Played {
                inboxes: join(threads, &stage.failed)?,
                entries,
                record,
            })
        })
    }

    fn vcpus(&self) -> u32 {
        self.brought.len() as u32
    }

    /// Opens the restore.
    fn begin(&self) -> Result<(), Error> {
        for registers in self.brought {
            self.watch.has_seen(count(registers));
        }
        if let Some(state) = self.device_state {
            return self.vmm.load_device_state(state);
        }
        let options = RestoreOptions::default()
            .autorun(true)
            .strict(self.life == Life::GoOn)
            .timeout(PATIENCE);
        self.vmm.ask("begin a restore", |queue| {
            queue.restore_begin(options, PATIENCE).map(drop)
        })
    }

    /// Gives each vCPU's thread what it needs, including its inbox for the VMM's interrupts.
    fn cast<'g>(
        &self,
        guests: &'g mut [Guest],
        rng: &mut Rng,
        entered: &Sender<(u32, Entry)>,
        taken: &Sender<Taken>,
    ) -> Vec<Role<'g>> {
        let (to_inboxes, inboxes): (Vec<_>, Vec<_>) =
            guests.iter().map(|_| mpsc::channel()).unzip();
        self.vmm.lines.lead_to(to_inboxes);
        (guests.iter_mut().zip(self.brought).zip(inboxes))
            .map(|((guest, &registers), inbox)| Role {
                guest,
                registers,
                rng: rng.fork(),
                inbox,
                entered: entered.clone(),
                taken: taken.clone(),
            })
            .collect()
    }

    fn record(&self, entries: &[Entry], opened: Opened) -> Restore {
        let runs = || entries.iter().map(|entry| entry.release.run);
        let offsets: HashSet<_> = runs().map(|run| (run.cntvoff, run.cntpoff)).collect();
        let parts = |run: Run| {
            let counts = (run.virt_count, run.phys_count, run.host_count);
            (run.cntvoff, run.cntpoff, counts)
        };
        let different: HashSet<_> = runs().map(parts).collect();
        let largest_brought = self.brought.iter().map(count).max().unwrap_or(0);
        let cntvoff = runs().map(|run| run.cntvoff).min().unwrap_or(0);
        let readings = entries.iter().map(|entry| entry.first_reading);
        Restore {
            name: self.name,
            vcpus: self.vcpus(),
            largest_brought,
            decided_between: opened.decided_between,
            offsets: offsets.len(),
            releases: different.len(),
            early: entries.iter().filter(|entry| entry.release.early).count(),
            put_in: opened.put_in,
            metre: Metre {
                // The count was the largest one when it began to count.
                decided: cntvoff.wrapping_add(largest_brought),
                put_in: opened.put_in_at,
                confirmed: runs().map(|run| run.host_count).max().unwrap_or(0),
                first_reading: readings.min().unwrap_or(0),
            },
        }
    }
}

/// How the VMM's thread has opened the gate.
#[derive(Clone, Copy, Debug, Default)]
struct Opened {
    /// The host counter before and after the offsets were decided.
    decided_between: [u64; 2],
    /// The host counter when they were in the hypervisor.
    put_in_at: u64,
    /// How often offsets were put in.
    put_in: u64,
}

/// A VM's state in words.
fn state(info: &Info) -> String {
    let restored = counted(info.restored, "vCPU");
    let cntvoff = info.cntvoff;
    match info.phase {
        Phase::Armed => format!("ARMED, with cntvoff {cntvoff:#x}"),
        phase => format!("{phase}, {restored} had restored"),
    }
}

/// The count that a vCPU brings.
fn count(registers: &SavedVcpu) -> u64 {
    registers.get(Register::TimerCnt).unwrap_or(0)
}

impl Stage<'_> {
    fn spawn<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        role: Role<'env>,
    ) -> Result<VcpuThread<'scope>, Error> {
        let vcpu = role.registers.index();
        thread::Builder::new()
            .name(format!("vcpu {vcpu}"))
            .stack_size(STACK)
            .spawn_scoped(scope, move || {
                let ended = self.live(role);
                if ended.is_err() {
                    self.give_up();
                }
                ended.map(|inbox| (vcpu, inbox))
            })
            .map_err(Error::Thread)
    }

    /// What a vCPU thread does.
    fn live(&self, role: Role<'_>) -> Result<Receiver<Wake>, Error> {
        let Role {
            guest,
            registers,
            mut rng,
            inbox,
            entered,
            taken,
        } = role;
        let Act {
            vmm, watch, life, ..
        } = self.act;
        let (vcpu, side) = (registers.index(), vmm.side);
        let queue = vmm.queue_of(vcpu);
        let hold = || self.hold();
        let straggles = self.act.straggler.is_some_and(|(index, _)| index == vcpu);
        let hold: Option<&dyn Fn()> = if straggles { Some(&hold) } else { None };

        let release = self
            .race
            .enter(queue, &registers, &mut rng, hold)
            .map_err(|source| Error::Restore { vcpu, side, source })?;
        let hypervisor = &vmm.hypervisor;
        let readings = (READINGS / self.act.vcpus()).clamp(20, 1_000);
        let first_reading = guest.watch_count(watch, hypervisor, readings);
        let entry = Entry {
            release,
            first_reading: first_reading.wrapping_add(release.run.cntvoff),
        };
        // The VMM waits for this.
        let _ = entered.send((vcpu, entry));

        let machine = Machine {
            side,
            queue,
            hypervisor,
            inbox,
            watch,
            taken,
        };
        let lived = match life {
            Life::Look => Ok(()),
            Life::Boot => guest
                .start_tick(&machine)
                .and_then(|()| guest.serve(&machine)),
            Life::GoOn => guest.serve(&machine),
        };
        lived.map_err(|source| Error::Guest { vcpu, side, source })?;
        Ok(machine.inbox)
    }

    /// What the straggler does while all the others wait for it.
    fn hold(&self) {
        let Some((vcpu, hold)) = self.act.straggler else {
            return;
        };
        let others = counted(self.act.vcpus() - 1, "vCPU");
        self.console.say(format_args!(
            "{others} restored and waiting; vCPU {vcpu}, the straggler, is {} ms late",
            hold.as_millis()
        ));
        // This waits for nothing: it is the delay that the demo shows.
        thread::sleep(hold);
        if self.act.kill == Some(Moment::MidRestore)
            && let Err(error) = self.kill_backend("in mid-restore")
        {
            return self.fail(error);
        }
        self.console.say(format_args!(
            "vCPU {vcpu} sends the last RESTORE_DONE; {}",
            self.ran()
        ));
    }

    /// Kills the backend, and starts another in its place.
    fn kill_backend(&self, when: &str) -> Result<(), Error> {
        let (vmm, console) = (self.act.vmm, self.console);
        let before = vmm.ask("ask who is missing", |queue| queue.info(PATIENCE))?;
        console.say(format_args!(
            "the {} is killed {when}: {}",
            vmm.side,
            state(&before)
        ));
        let killed = Instant::now();
        vmm.kill();
        let after = vmm.replace()?;
        console.say(format_args!(
            "backend process {} resumes from the state file, {:.1} ms later: {}",
            vmm.pid(),
            killed.elapsed().as_secs_f64() * 1e3,
            state(&after)
        ));
        Ok(())
    }

    /// Does what the VMM's own thread does in a restore: waits until all vCPUs have their
    /// registers back, puts the VM's offsets into the hypervisor, and confirms them.
    fn open_gate(&self) -> Result<Opened, Error> {
        let (vmm, console) = (self.act.vmm, self.console);
        let epoch = vmm.ask("ask for the epoch", |queue| queue.info(PATIENCE))?;
        // A device state's restore ends in PAUSED.
        let (phase, reached) = match self.act.device_state {
            Some(_) => (Phase::Paused, "the VMM resumes the VM"),
            None => (Phase::Armed, "the VM is armed: its offsets are decided"),
        };
        let mut opened = Opened::default();
        // If the phase is not reached, the waiting vCPUs report why.
        if !vmm.lines.until_phase(phase, epoch.epoch) {
            return Ok(opened);
        }
        console.say(format_args!(
            "all vCPUs are restored, and {reached}; {}",
            self.ran()
        ));
        let earliest = match self.act.device_state {
            Some(_) => host_count(),
            None => self.race.last_done(),
        };
        let before = vmm.hypervisor.times();
        vmm.resume_with(|info| {
            opened.decided_between = [earliest, info.host_count];
            vmm.hypervisor.put_in(info);
            opened.put_in_at = host_count();
            console.say(format_args!(
                "the VMM has put cntvoff {:#x} into its hypervisor; {}",
                info.cntvoff,
                self.ran()
            ));
            if self.act.kill == Some(Moment::Armed) {
                self.kill_backend("before the offsets are confirmed")?;
                console.say(format_args!(
                    "these offsets are in the hypervisor already: the VMM only confirms them"
                ));
            }
            self.race.opening();
            Ok(())
        })?;
        opened.put_in = vmm.hypervisor.times() - before;
        Ok(opened)
    }

    fn ran(&self) -> String {
        match self.race.released() {
            0 => "none of them has run".to_owned(),
            released => format!("{released} of them RAN"),
        }
    }

    fn fail(&self, error: Error) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.get_or_insert(error);
        drop(failed);
        self.give_up();
    }

    /// Ends every wait: a vCPU has failed.
    fn give_up(&self) {
        self.race.abandon();
        self.act.vmm.shutdown_handle().shut_down();
        self.act.vmm.lines.wake_all(Wake::Stop);
    }
}

/// Waits for all threads. Of several errors, returns one that is not a consequence of another.
fn join(
    threads: Vec<VcpuThread<'_>>,
    failed: &Mutex<Option<Error>>,
) -> Result<Vec<Receiver<Wake>>, Error> {
    let (mut inboxes, mut errors) = (Vec::new(), Vec::new());
    for thread in threads {
        match thread.join() {
            Ok(Ok(inbox)) => inboxes.push(inbox),
            Ok(Err(error)) => errors.push(error),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
    errors.extend(failed.take());
    errors.sort_by_key(is_consequence);
    match errors.into_iter().next() {
        Some(error) => Err(error),
        None => {
            inboxes.sort_by_key(|&(vcpu, _)| vcpu);
            Ok(inboxes.into_iter().map(|(_, inbox)| inbox).collect())
        }
    }
}

fn is_consequence(error: &Error) -> bool {
    use frontend::Error::ShutDown;
    matches!(
        error,
        Error::Guest {
            source: ShutDown,
            ..
        } | Error::Vmm {
            source: ShutDown,
            ..
        } | Error::Restore {
            source: RaceError::Abandoned | RaceError::Frontend(ShutDown),
            ..
        }
    )
}
