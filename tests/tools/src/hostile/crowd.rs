//! vCPU threads that all restore at once, through the project's own library: nobody is released
//! before the last RESTORE_DONE was sent, all who were at the gate get one `run`, and all others
//! get its offsets.
//!
//! Each thread stages its registers in an order of its own, and asks WAIT_RUN before or after its
//! RESTORE_DONE. In half of the restores one thread is late.

use std::num::NonZeroU64;
use std::thread;

use fastrand::Rng;
use vhost_user_timer_frontend::{Frontend, Options, RestoreOptions, SavedVcpu};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::race::{Asking, Race, RaceError, Release};
use vhost_user_timer_kit::victim::DEADLINE;
use vhost_user_timer_kit::watch::HOST_FREQUENCY;
use vhost_user_timer_protocol::Abi;

use super::round::{Round, Socket};

/// Restores in a round.
const RESTORES: usize = 20;

pub(super) fn round(round: &mut Round<'_>) {
    round.tally.connections += 2;
    Client::connect(&round.victim.rig).reset_and_leave();
    round.beside_a_neighbour(Socket::Timer, |round| {
        let vcpus = round.random.u32(1..10);
        let options = Options::default().queue_size(64).timeout(DEADLINE);
        let socket = round.victim.rig.backend.socket_path();
        let frontend = Frontend::connect(socket, options).expect("a connection");
        let frequency = NonZeroU64::new(HOST_FREQUENCY);
        let queue = frontend.queue();
        let configured = queue.configure(vcpus, Abi::Arm64, frequency, DEADLINE);
        configured.expect("CONFIGURE_VM");
        for _ in 0..RESTORES {
            restore(round, &frontend);
        }
    });
}

fn restore(round: &mut Round<'_>, frontend: &Frontend) {
    let queue = frontend.queue();
    queue.pause(DEADLINE).expect("PAUSE");
    let saved = queue.save(DEADLINE).expect("GET_VM");
    let autorun = RestoreOptions::default().autorun(true);
    queue
        .restore_begin(autorun, DEADLINE)
        .expect("RESTORE_BEGIN");
    let vcpus = saved.vcpus();
    let late = round.random.usize(0..2 * vcpus.len());
    round.act(|| format!("{} vCPUs restore, {late} is late", vcpus.len()));
    let race = Race::new(vcpus.len() as u32, Asking::Anytime, DEADLINE);
    let releases: Vec<_> = thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, vcpu) in vcpus.iter().enumerate() {
            let (race, random) = (&race, round.random.fork());
            let enter = move || enter(race, frontend, vcpu, random, index == late);
            threads.push(scope.spawn(enter));
        }
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .map(|entered| entered.expect("a vCPU thread"))
            .collect()
    });
    let releases: Vec<Release> = releases
        .into_iter()
        .map(|release| release.unwrap_or_else(|error| panic!("a vCPU: {error}")))
        .collect();
    let at_the_gate: Vec<_> = releases
        .iter()
        .filter(|release| release.at_the_gate)
        .collect();
    for release in &releases {
        assert!(
            !release.early,
            "a vCPU ran before the last RESTORE_DONE was sent"
        );
        let (run, first) = (release.run, releases[0].run);
        let offsets = (run.cntvoff, run.cntpoff);
        assert_eq!(
            offsets,
            (first.cntvoff, first.cntpoff),
            "two vCPUs' offsets"
        );
    }
    for release in &at_the_gate {
        assert_eq!(
            release.run, at_the_gate[0].run,
            "one run for all at the gate"
        );
    }
}

fn enter(
    race: &Race,
    frontend: &Frontend,
    vcpu: &SavedVcpu,
    mut random: Rng,
    is_late: bool,
) -> Result<Release, RaceError> {
    let turns = random.u32(..50);
    let hold = || (0..turns).for_each(|_| thread::yield_now());
    let hold: Option<&dyn Fn()> = if is_late { Some(&hold) } else { None };
    let entered = race.enter(frontend.queue_of(vcpu.index()), vcpu, &mut random, hold);
    if entered.is_err() {
        race.abandon();
    }
    entered
}
