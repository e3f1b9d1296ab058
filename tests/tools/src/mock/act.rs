//! One restore on one backend, and what the vCPUs do after it: the threads, and how they are
//! started and stopped.

use std::collections::HashSet;
use std::fmt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use fastrand::Rng;
use vhost_user_timer_frontend::{self as frontend, RestoreOptions, Run, SavedVcpu};
use vhost_user_timer_protocol::{Phase, Register};

use super::error::Error;
use super::guest::{Guest, Machine, Taken};
use super::report::{Console, Restore, counted, grouped};
use super::vmm::{PATIENCE, Vmm, Wake};
use vhost_user_timer_kit::race::{Asking, Race, RaceError, Release};
use vhost_user_timer_kit::watch::Watch;

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
    /// The backend is killed while all but the straggler wait.
    pub(super) kill: bool,
}

/// A finished act.
pub(super) struct Played {
    /// By vCPU.
    pub(super) releases: Vec<Release>,
    /// By vCPU, what arrived too late to wake it.
    pub(super) inboxes: Vec<Receiver<Wake>>,
    pub(super) record: Restore,
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
    released: Sender<(u32, Release)>,
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
        let (released, releases) = mpsc::channel();
        let (taken, interrupts) = mpsc::channel();
        let mut roles = self.cast(guests, rng, &released, &taken);
        drop((released, taken));
        rng.shuffle(&mut roles);

        let race = Race::new(self.vcpus(), Asking::First, PATIENCE);
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
            if self.device_state.is_some()
                && let Err(error) = stage.resume()
            {
                stage.fail(error);
            }
            let mut releases: Vec<_> = releases.iter().take(self.brought.len()).collect();
            releases.sort_by_key(|&(vcpu, _)| vcpu);
            let releases: Vec<_> = releases.into_iter().map(|(_, release)| release).collect();
            let record = self.record(&releases);
            if releases.len() == self.brought.len() {
                console.say(format_args!("{}", Outcome(&record, self.vcpus())));
                let deadline = Instant::now() + PATIENCE;
                conduct(&mut std::iter::from_fn(|| {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    interrupts.recv_timeout(left).ok()
                }));
            }
            Ok(Played {
                inboxes: join(threads, &stage.failed)?,
                releases,
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
        released: &Sender<(u32, Release)>,
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
                released: released.clone(),
                taken: taken.clone(),
            })
            .collect()
    }

    fn record(&self, releases: &[Release]) -> Restore {
        let offsets: HashSet<_> = releases
            .iter()
            .map(|release| (release.run.cntvoff, release.run.cntpoff))
            .collect();
        let parts = |run: &Run| {
            let counts = (run.virt_count, run.phys_count, run.host_count);
            (run.cntvoff, run.cntpoff, counts)
        };
        let different: HashSet<_> = releases.iter().map(|release| parts(&release.run)).collect();
        let counts = releases.iter().map(|release| release.run.virt_count);
        Restore {
            name: self.name,
            largest_brought: self.brought.iter().map(count).max().unwrap_or(0),
            released_at: counts.min().unwrap_or(0),
            offsets: offsets.len(),
            releases: different.len(),
            early: releases.iter().filter(|release| release.early).count(),
        }
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
            released,
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
        let readings = (READINGS / self.act.vcpus()).clamp(20, 1_000);
        guest.watch_count(watch, &release.run, readings);
        // The VMM waits for this.
        let _ = released.send((vcpu, release));

        let machine = Machine {
            side,
            queue,
            run: release.run,
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
        if self.act.kill
            && let Err(error) = self.kill_backend()
        {
            return self.fail(error);
        }
        self.console.say(format_args!(
            "vCPU {vcpu} sends the last RESTORE_DONE; {}",
            self.ran()
        ));
    }

    /// Kills the backend, and starts another in its place.
    fn kill_backend(&self) -> Result<(), Error> {
        let (vmm, console) = (self.act.vmm, self.console);
        let restored = vmm.ask("ask who is missing", |queue| queue.info(PATIENCE))?;
        console.say(format_args!(
            "the {} is killed in mid-restore: {} had restored",
            vmm.side,
            counted(restored.restored, "vCPU")
        ));
        let killed = Instant::now();
        vmm.kill();
        let info = vmm.replace()?;
        console.say(format_args!(
            "backend process {} resumes from the state file, {:.1} ms later: {}, {} had \
             restored",
            vmm.pid(),
            killed.elapsed().as_secs_f64() * 1e3,
            info.phase,
            counted(info.restored, "vCPU")
        ));
        Ok(())
    }

    /// Lets a VM run whose restore ends in PAUSED, as that of a device state does.
    fn resume(&self) -> Result<(), Error> {
        let vmm = self.act.vmm;
        let info = vmm.ask("ask for the epoch", |queue| queue.info(PATIENCE))?;
        // If the phase is not reached, the waiting vCPUs report why.
        if vmm.lines.until_phase(Phase::Paused, info.epoch) {
            self.console.say(format_args!(
                "all vCPUs are restored, and the VM is paused; {}; the VMM resumes it",
                self.ran()
            ));
            self.race.resuming();
            vmm.ask("resume the VM", |queue| queue.resume(PATIENCE))?;
        }
        Ok(())
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

/// A restore in a sentence.
struct Outcome<'a>(&'a Restore, u32);

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome(restore, vcpus) = self;
        let vcpus = counted(*vcpus, "vCPU");
        let count = grouped(restore.released_at);
        if restore.releases == 1 {
            write!(
                f,
                "{vcpus} released at one instant, with one offset, at {count}"
            )?;
        } else {
            write!(
                f,
                "{vcpus} released at {} INSTANTS with {} OFFSETS, at {count} or more",
                restore.releases, restore.offsets
            )?;
        }
        if restore.released_at == restore.largest_brought {
            f.write_str(", the largest count brought")
        } else {
            let largest = grouped(restore.largest_brought);
            write!(f, ", NOT the largest count brought, {largest}")
        }
    }
}
