//! The backend is killed or hangs before, during and after a migration, on either side: the VM
//! continues with the right time, or it is stopped and QEMU says why. It never runs with a wrong
//! clock.

mod side;

use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::process::Signal;
use serde_json::json;
use vhost_user_timer_kit::qemu::{Environment, Error, Seen, Shape, TimerVm, environment};
use vhost_user_timer_kit::raw_driver::seed;

use self::side::{Kind, Side};
use crate::oracle::{self, Found};

/// How many migrations, each with one fault.
const ROUNDS: usize = 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGKILL. A supervisor, where there is one, starts another one at once or later.
    Kill { supervised_at_once: bool },
    /// SIGSTOP, and SIGCONT only when all else is over.
    Hang,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Before the migration begins.
    Before,
    /// So long after it has begun.
    During(Duration),
    /// When the source's vCPUs are stopped, and nothing of the device is sent yet.
    Stopped,
    /// When the destination has loaded everything, and has not started its vCPUs.
    Loaded,
    /// When the VM runs on the destination.
    After,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    fault: Fault,
    victim: Victim,
    when: When,
    destination: Kind,
}

impl Plan {
    /// The instants and the victims take turns; everything else is random.
    fn new(round: usize, rng: &mut Rng) -> Self {
        let fault = match rng.u32(..4) {
            0 => Fault::Hang,
            _ => Fault::Kill {
                supervised_at_once: rng.bool(),
            },
        };
        let delay = Duration::from_millis(rng.u64(..1_500));
        let (when, victim) = match round % 7 {
            0 => (When::Before, Victim::Source),
            1 => (When::Before, Victim::Destination),
            2 => (When::During(delay), Victim::Source),
            3 => (When::During(delay), Victim::Destination),
            4 => (When::Stopped, Victim::Source),
            5 => (When::Loaded, Victim::Destination),
            _ => (When::After, Victim::Destination),
        };
        Plan {
            fault,
            victim,
            when,
            destination: rng.choice(Kind::ALL).expect("there are some"),
        }
    }

    fn strike(self, source: &mut Side, destination: &mut Side) {
        let side = match self.victim {
            Victim::Source => source,
            Victim::Destination => destination,
        };
        match self.fault {
            Fault::Hang => side.signal(Signal::STOP),
            Fault::Kill { supervised_at_once } => {
                side.kill();
                if supervised_at_once {
                    side.supervise();
                }
            }
        }
    }
}

/// Where the VM is after a migration was tried.
enum Held {
    /// The source has it, for this reason.
    BySource(String),
    ByDestination,
}

/// Migrates, with the fault at its time. Both are left as they are afterwards.
fn migrate(plan: Plan, source: &mut Side, destination: &mut Side) -> Held {
    let socket = tempfile::tempdir().expect("a directory");
    let uri = format!("unix:{}", socket.path().join("migration").display());
    let from = source.guest().qmp();
    from.prepare_migration(true).unwrap();
    let stops = plan.when == When::Stopped;
    let capability = json!({ "capability": "pause-before-switchover", "state": stops });
    let capabilities = json!({ "capabilities": [capability] });
    from.command_with("migrate-set-capabilities", capabilities)
        .unwrap();
    let to = destination.guest().qmp();
    to.prepare_migration(true).unwrap();
    to.command_with("migrate-incoming", json!({ "uri": uri }))
        .unwrap();
    if plan.when == When::Before {
        plan.strike(source, destination);
    }
    let from = source.guest().qmp();
    from.command_with("migrate", json!({ "uri": uri })).unwrap();
    match plan.when {
        When::During(delay) => {
            thread::sleep(delay);
            plan.strike(source, destination);
        }
        When::Stopped => {
            while from.event("MIGRATION").unwrap().data["status"] != "pre-switchover" {}
            plan.strike(source, destination);
            let state = json!({ "state": "pre-switchover" });
            let from = source.guest().qmp();
            from.command_with("migrate-continue", state).unwrap();
        }
        When::Before | When::Loaded | When::After => {}
    }
    match source.guest().qmp().await_migration() {
        Ok(()) => {}
        Err(Error::Refused { description, .. }) => return Held::BySource(description),
        Err(error) => panic!("{error}\n{}\n{}", source.logs(), destination.logs()),
    }
    destination.guest().qmp().await_migration().unwrap();
    Held::ByDestination
}

/// Migrations of one VM after another.
struct Rounds<'a> {
    environment: &'a Environment,
    shape: Shape,
    rng: Rng,
    outcomes: Outcomes,
}

/// How often rounds ended how.
#[derive(Debug, Default)]
struct Outcomes {
    /// The VM was moved.
    moved: usize,
    /// The migration failed, and the source kept the VM.
    stayed: usize,
    /// The VM was stopped for a while.
    stopped: usize,
    /// The VM could not be started again, since its backend's memory is lost.
    lost: usize,
}

impl Rounds<'_> {
    /// A VM that runs, with its witness. The counter of half of them is not QEMU's clock.
    fn boot(&mut self) -> Side {
        let count = self.rng.u64(..2) << 40;
        let kind = self.rng.choice(Kind::ALL).expect("there are some");
        let count = format!("x-initial-count={count}");
        let shape = self.shape.clone().property(&count);
        let mut side = Side::start(self.environment, shape, kind);
        side.guest().await_ready().unwrap();
        side.guest().start_witness(0).unwrap();
        side
    }

    /// One migration with one fault. Returns the VM, if it can still run.
    fn one(&mut self, plan: Plan, mut source: Side) -> Result<Option<Side>, String> {
        let shape = self.shape.clone().machine(|machine| {
            let machine = machine.incoming();
            match plan.when {
                When::Loaded => machine.arg("-S"),
                _ => machine,
            }
        });
        let mut destination = Side::start(self.environment, shape, plan.destination);
        source.find_backend();
        let since = source.guest().witness().unwrap();
        let refused = oracle::refusals(source.guest());
        match migrate(plan, &mut source, &mut destination) {
            Held::BySource(why) => {
                self.outcomes.stayed += 1;
                let ended = destination.guest().wait();
                if !ended.as_ref().is_ok_and(|status| !status.success()) {
                    return Err(format!(
                        "the migration failed ({why}), and the destination's QEMU: {ended:?}\n{}\n{}",
                        source.logs(),
                        destination.logs()
                    ));
                }
                self.outlive(source, &since, refused)
            }
            Held::ByDestination => {
                self.outcomes.moved += 1;
                if oracle::runs(source.guest()) {
                    return Err("the VM runs on both sides".to_owned());
                }
                match plan.when {
                    When::Loaded => {
                        plan.strike(&mut source, &mut destination);
                        oracle::resumes(destination.guest());
                    }
                    When::After => {
                        oracle::judge(destination.guest(), &since, 0)?;
                        plan.strike(&mut source, &mut destination);
                    }
                    _ => {}
                }
                self.outlive(destination, &since, 0)
            }
        }
    }

    /// Judges the VM after a fault: as it is, when it has been stopped and started, and, where it
    /// does not run, when the fault is over.
    fn outlive(
        &mut self,
        mut side: Side,
        since: &[Seen],
        refused: usize,
    ) -> Result<Option<Side>, String> {
        let mut found = oracle::judge(side.guest(), since, refused)?;
        if found == Found::Right {
            found = oracle::judge_again(side.guest())?;
        }
        side.signal(Signal::CONT);
        side.supervise();
        if found == Found::Stopped {
            self.outcomes.stopped += 1;
            let refused = oracle::refusals(side.guest());
            oracle::resumes(side.guest());
            found = oracle::judge(side.guest(), since, refused)?;
        }
        match found {
            Found::Right if side.has_no_backend() => {
                Err("the VM runs without a backend".to_owned())
            }
            Found::Right => Ok(Some(side)),
            Found::Stopped if side.has_lost_its_backend() => {
                self.outcomes.lost += 1;
                Ok(None)
            }
            Found::Stopped => {
                let logs = side.logs();
                Err(format!(
                    "the fault is over, and the VM does not run: {logs}"
                ))
            }
        }
    }
}

#[test]
fn a_backend_that_is_killed_or_hangs_around_a_migration_never_leaves_a_wrong_clock() {
    let Some(environment) = environment() else {
        return;
    };
    let seed = seed();
    let mut rounds = Rounds {
        environment: &environment,
        shape: Shape::default().property("timeout=3000"),
        rng: Rng::with_seed(seed),
        outcomes: Outcomes::default(),
    };
    let mut vm = None;
    for round in 0..ROUNDS {
        let mut rng = Rng::with_seed(seed.wrapping_add(round as u64));
        let plan = Plan::new(round, &mut rng);
        let source = vm.take().unwrap_or_else(|| rounds.boot());
        let kind = source.kind;
        let outcome = rounds.one(plan, source);
        println!(
            "round {round}: {kind:?} to {plan:?}: {}",
            match &outcome {
                Ok(Some(_)) => "the VM runs",
                Ok(None) => "the VM stays stopped",
                Err(wrong) => wrong,
            }
        );
        vm = outcome.unwrap_or_else(|wrong| {
            panic!(
                "round {round}, from {kind:?}, {plan:?}: {wrong}\nto repeat: VUT_SEED={seed} cargo \
                 test -p vhost-user-timer-tests --test migration faults"
            )
        });
    }
    println!("{:?}", rounds.outcomes);
    let Outcomes {
        moved,
        stayed,
        stopped,
        lost,
    } = rounds.outcomes;
    assert_eq!(moved + stayed, ROUNDS);
    assert!(
        moved > 0 && stopped > 0 && stayed + lost > 0,
        "all went well, or nothing did"
    );
}

/// What the rounds would find if a destination put in an offset that is wrong.
#[test]
fn an_offset_that_is_wrong_is_found_in_either_direction() {
    const SECOND: i64 = 62_500_000;
    let Some(environment) = environment() else {
        return;
    };
    for (error, finding) in [
        (SECOND, "time is out of order"),
        // Longer than a busy host needs from a reading in the guest to the stop.
        (-10 * SECOND, "the guest is ahead"),
    ] {
        let mut source = TimerVm::boot(&environment, &Shape::default());
        source.guest.start_witness(0).unwrap();
        let wrong = Shape::default().property(&format!("x-offset-error={error}"));
        let mut destination = TimerVm::incoming(&environment, &wrong);
        let since = source.guest.witness().unwrap();
        source.guest.send_to(&mut destination.guest).unwrap();
        let guest = &mut destination.guest;
        let judged = oracle::judge(guest, &since, 0).and_then(|_| oracle::judge_again(guest));
        let found = judged.expect_err("the offset is wrong");
        assert!(found.contains(finding), "{error}: {found}");
    }
}
