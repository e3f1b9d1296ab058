//! The gate, raced through by real vCPU threads over the public frontend library: I2 and I3.
//!
//! Each round pauses and restores one VM. The threads stage their registers, say RESTORE_DONE and
//! ask WAIT_RUN in random order; in half of the rounds one of them delays its RESTORE_DONE until
//! all others wait. In every round:
//!
//! - no WAIT_RUN was answered before the last RESTORE_DONE was sent;
//! - all vCPUs that were at the gate got the same `run`, all others its offsets;
//! - the count is the largest that any vCPU brought, and no vCPU ever reads a smaller count than
//!   some vCPU had read before, in this round or an earlier one.
//!
//! A failure names its seed. `VUT_SEED=<seed> cargo test --test process gate` repeats that order.

use std::num::NonZeroU64;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use vhost_user_timer_frontend::{Frontend, Options, RestoreOptions, SavedVcpu};
use vhost_user_timer_kit::backend_process::BackendProcess;
use vhost_user_timer_kit::race::{Asking, Race, RaceError, Release};
use vhost_user_timer_kit::watch::{HOST_FREQUENCY, Watch};
use vhost_user_timer_protocol::{Abi, Register};

/// A round that takes longer is a hang.
const LIMIT: Duration = Duration::from_secs(30);

/// How often each vCPU reads the count after each round.
const READINGS: u32 = 20;

/// A millisecond's ticks.
const MS: u64 = HOST_FREQUENCY / 1_000;

/// What a vCPU thread does in one round.
struct Job {
    race: Arc<Race>,
    registers: SavedVcpu,
    straggles: bool,
    seed: u64,
}

/// How the round ended for it.
struct Outcome {
    crossed: Result<Release, RaceError>,
    backwards: u32,
}

fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| match std::env::var("VUT_SEED") {
        Ok(seed) => seed.parse().expect("VUT_SEED is a number"),
        Err(_) => fastrand::u64(..1_000_000),
    })
}

/// Races `rounds` times, all on one backend.
fn race(vcpus: u32, rounds: u32, request_queues: u16, queue_size: u16) {
    let seed = seed();
    let args = [
        format!("--max-vcpus={vcpus}"),
        format!("--request-queues={request_queues}"),
    ];
    let backend = BackendProcess::launch(&args).expect("a backend");
    let options = Options::default().queue_size(queue_size).timeout(LIMIT);
    let frontend = Frontend::connect(backend.socket_path(), options).expect("a connection");
    let queue = frontend.queue();
    queue
        .configure(vcpus, Abi::Arm64, NonZeroU64::new(HOST_FREQUENCY), LIMIT)
        .unwrap();
    let watch = Watch::default();
    let mut rng = Rng::with_seed(seed);

    let failure = thread::scope(|scope| {
        let (outcomes, finished) = mpsc::channel();
        let jobs: Vec<_> = (0..vcpus)
            .map(|vcpu| {
                let (to_thread, jobs) = mpsc::channel();
                let (frontend, watch, outcomes) = (&frontend, &watch, outcomes.clone());
                thread::Builder::new()
                    .stack_size(256 * 1024)
                    .spawn_scoped(scope, move || {
                        live(vcpu, frontend, watch, &jobs, &outcomes);
                    })
                    .expect("a thread");
                to_thread
            })
            .collect();
        drop(outcomes);
        let mut raced = Rounds {
            frontend: &frontend,
            jobs,
            finished,
            rng: &mut rng,
        };
        let failure = (0..rounds).find_map(|round| {
            let failed = raced.one().err()?;
            Some(format!("round {round}: {failed}"))
        });
        if failure.is_some() {
            // Some threads may wait at a gate that will never open.
            frontend.shutdown_handle().shut_down();
        }
        failure
    });
    if let Some(failure) = failure {
        panic!(
            "{vcpus} vCPUs, seed {seed} (VUT_SEED={seed} for the same order), {failure}\n{}",
            backend.log()
        );
    }
}

/// A vCPU thread.
fn live(
    vcpu: u32,
    frontend: &Frontend,
    watch: &Watch,
    jobs: &Receiver<Job>,
    outcomes: &Sender<(u32, Outcome)>,
) {
    for job in jobs {
        let mut rng = Rng::with_seed(job.seed);
        let turns = rng.u32(..50);
        let hold = || (0..turns).for_each(|_| thread::yield_now());
        let hold: Option<&dyn Fn()> = if job.straggles { Some(&hold) } else { None };
        let queue = frontend.queue_of(vcpu);
        let crossed = job.race.enter(queue, &job.registers, &mut rng, hold);
        if crossed.is_err() {
            job.race.abandon();
        }
        let offset = crossed.as_ref().map_or(0, |release| release.run.cntvoff);
        let readings = if crossed.is_ok() { READINGS } else { 0 };
        let back = (0..readings).filter(|_| watch.read(offset).went_back);
        let backwards = back.count() as u32;
        let outcome = Outcome { crossed, backwards };
        if outcomes.send((vcpu, outcome)).is_err() {
            return;
        }
    }
}

/// The VMM, which runs the rounds.
struct Rounds<'a> {
    frontend: &'a Frontend,
    jobs: Vec<Sender<Job>>,
    finished: Receiver<(u32, Outcome)>,
    rng: &'a mut Rng,
}

impl Rounds<'_> {
    fn one(&mut self) -> Result<(), String> {
        let vcpus = self.jobs.len() as u32;
        let queue = self.frontend.queue();
        let failed = |error| format!("the VMM's request failed: {error}");
        queue.pause(LIMIT).map_err(failed)?;
        let mut saved = queue.save(LIMIT).map_err(failed)?.vcpus().to_vec();
        let largest = self.skew(&mut saved);
        let autorun = RestoreOptions::default().autorun(true);
        queue.restore_begin(autorun, LIMIT).map_err(failed)?;

        let race = Arc::new(Race::new(vcpus, Asking::Anytime, LIMIT));
        let straggler = if self.rng.bool() {
            self.rng.u32(..vcpus)
        } else {
            vcpus
        };
        let mut order: Vec<_> = (0..vcpus).collect();
        self.rng.shuffle(&mut order);
        for vcpu in order {
            let job = Job {
                race: race.clone(),
                registers: saved[vcpu as usize],
                straggles: vcpu == straggler,
                seed: self.rng.u64(..),
            };
            self.jobs[vcpu as usize]
                .send(job)
                .map_err(|_| "a vCPU thread ended")?;
        }
        let mut releases = Vec::new();
        for _ in 0..vcpus {
            let outcome = self.finished.recv_timeout(2 * LIMIT);
            let (vcpu, Outcome { crossed, backwards }) = outcome.map_err(|_| "a vCPU hangs")?;
            let release = crossed.map_err(|error| format!("vCPU {vcpu}: {error}"))?;
            if release.early {
                return Err(format!(
                    "vCPU {vcpu} ran before the last RESTORE_DONE was sent"
                ));
            }
            if backwards > 0 {
                return Err(format!(
                    "vCPU {vcpu} saw the count go back {backwards} times"
                ));
            }
            releases.push((vcpu, release));
        }
        check_agreement(&releases, largest)
    }

    /// Lets most vCPUs bring a count from a little before the pause, like counts that were read
    /// from KVM one after the other. Returns the largest, the count of the pause.
    fn skew(&mut self, saved: &mut [SavedVcpu]) -> u64 {
        let largest = saved[0].get(Register::TimerCnt).expect("a saved count");
        let latest = self.rng.usize(..saved.len());
        for (index, vcpu) in saved.iter_mut().enumerate() {
            if index != latest && self.rng.bool() {
                let behind = self.rng.u64(..MS).min(largest);
                vcpu.set(Register::TimerCnt, largest - behind);
            }
        }
        largest
    }
}

fn check_agreement(releases: &[(u32, Release)], largest: u64) -> Result<(), String> {
    let at_the_gate = releases.iter().find(|(_, release)| release.at_the_gate);
    for (vcpu, release) in releases {
        let run = release.run;
        if run.virt_count != run.host_count.wrapping_sub(run.cntvoff) {
            return Err(format!(
                "vCPU {vcpu} got counts of several instants: {run:?}"
            ));
        }
        if release.at_the_gate && run.virt_count != largest {
            return Err(format!(
                "vCPU {vcpu} was not released at {largest}: {run:?}"
            ));
        }
        let Some((other, Release { run: others, .. })) = at_the_gate else {
            continue;
        };
        if release.at_the_gate && run != *others {
            return Err(format!(
                "vCPUs {vcpu} and {other} differ: {run:?}, {others:?}"
            ));
        }
        if run.host_count < others.host_count {
            return Err(format!(
                "vCPU {vcpu} was let go before the gate: {run:?}, {others:?}"
            ));
        }
    }
    let offsets = |release: &Release| (release.run.cntvoff, release.run.cntpoff);
    match releases
        .iter()
        .find(|(_, r)| offsets(r) != offsets(&releases[0].1))
    {
        Some((vcpu, release)) => Err(format!(
            "vCPUs {vcpu} and {} got different offsets: {:?}, {:?}",
            releases[0].0, release.run, releases[0].1.run
        )),
        None => Ok(()),
    }
}

#[test]
fn one_vcpu_passes_the_gate_a_thousand_times() {
    race(1, 1_000, 1, 64);
}

#[test]
fn two_vcpus_race_a_thousand_times() {
    race(2, 1_000, 1, 64);
}

#[test]
fn two_vcpus_on_queues_of_their_own_race_a_thousand_times() {
    race(2, 1_000, 2, 64);
}

#[test]
fn eight_vcpus_race_a_thousand_times() {
    race(8, 1_000, 3, 64);
}

#[test]
fn sixty_four_vcpus_race_fifty_times() {
    race(64, 50, 4, 64);
}

#[test]
fn five_hundred_and_twelve_vcpus_race_five_times() {
    race(512, 5, 4, 1_024);
}
