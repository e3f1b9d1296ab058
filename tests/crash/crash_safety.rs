//! Every answered request survives `kill -9` of the backend at any instant, and none is half done
//! (I5); no count decreases over the kill (I3); no due timer is lost (I7).
//!
//! Each round starts a backend on the state file that the previous one left. What it reports of
//! its VM must be what the previous one had answered. Then random requests go out, several at a
//! time on two queues, until the backend is killed at a random instant. The requests that were
//! answered must have been done; each of the others wholly or not at all, in order ([`Shadow`]).
//!
//! A failure names its seed. `VUT_SEED=<seed> cargo test --test crash crash_safety` sends the same
//! requests again; the instants of the kills always differ. `VUT_ROUNDS=<n>` plays n rounds.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vhost_user_timer_frontend::{
    Error, Event, Frontend, Options, RawAnswer, RequestQueue, Ticket, Timer,
};
use vhost_user_timer_kit::backend_process::BackendProcess;
use vhost_user_timer_kit::raw_driver::{release_program, seed};
use vhost_user_timer_kit::reference::Ask;
use vhost_user_timer_kit::reference::contract::{Vcpu, VmState};
use vhost_user_timer_kit::shadow::{Asked, Draw, Outcome, Shadow, outcome, submit};
use vhost_user_timer_kit::watch::host_count;
use vhost_user_timer_protocol::Phase;
use vhost_user_timer_protocol::wire::ctl;

/// A wait that takes longer is a hang.
const LIMIT: Duration = Duration::from_secs(30);

const THREADS: u64 = 2;
const ROUNDS: u64 = 6_000;
const MAX_VCPUS: u32 = 8;
const QUEUES: usize = 2;

/// The most requests that a queue has in flight.
const DEPTH: usize = 4;

/// A VM that outlives its backends.
struct Life {
    rng: Rng,
    program: PathBuf,
    folder: TempDir,
    vcpus: u32,
    shadow: Shadow,
    tally: Tally,
}

/// What happened in all rounds, to check that enough did.
#[derive(Debug, Default)]
struct Tally {
    answered: u64,
    unanswered: u64,
    /// Rounds after whose kill more than one state was possible.
    doubtful: u64,
    /// Rounds that began with the VM in each phase.
    phases: [u64; Phase::ALL.len()],
    events: u64,
}

fn new_shadow() -> Shadow {
    Shadow::new(MAX_VCPUS, QUEUES as u16)
}

impl Life {
    fn new(seed: u64, program: PathBuf) -> Self {
        let mut life = Life {
            rng: Rng::with_seed(seed),
            program,
            folder: tempfile::tempdir().expect("a folder"),
            vcpus: 0,
            shadow: new_shadow(),
            tally: Tally::default(),
        };
        life.begin();
        life
    }

    /// A VM that no backend has seen yet.
    fn begin(&mut self) {
        self.folder = tempfile::tempdir().expect("a folder");
        self.vcpus = self.rng.u32(1..=MAX_VCPUS);
        self.shadow = new_shadow();
    }

    fn launch(&self) -> BackendProcess {
        let args = [
            format!(
                "--state-file={}",
                self.folder.path().join("state").display()
            ),
            format!("--max-vcpus={MAX_VCPUS}"),
            format!("--request-queues={QUEUES}"),
        ];
        BackendProcess::launch_program(&self.program, &args).expect("a backend")
    }

    fn round(&mut self) -> Result<(), String> {
        if self.rng.u32(..40) == 0 {
            self.begin();
        }
        let mut backend = self.launch();
        let lived = if self.rng.u32(..8) == 0 {
            // Killed before it serves anybody: it cannot have changed anything.
            thread::sleep(Duration::from_micros(self.rng.u64(..3_000)));
            Ok(Vec::new())
        } else {
            self.live(&backend)
        };
        backend.kill();
        let taken = lived.and_then(|under_way| self.shadow.take(&under_way, host_count()));
        self.tally.doubtful += u64::from(self.shadow.states().len() > 1);
        taken.map_err(|error| format!("{error}\nthe backend: {}", backend.log()))
    }

    /// One backend's life with a frontend. Returns the requests in flight when it was killed.
    fn live(&mut self, backend: &BackendProcess) -> Result<Vec<Vec<Asked>>, String> {
        let options = Options::default().queue_size(32).timeout(LIMIT);
        let connected = Frontend::connect(backend.socket_path(), options);
        let mut frontend = connected.map_err(|error| error.to_string())?;
        self.look(&mut frontend)?;
        // Short lives more often than long ones.
        let magnitude = self.rng.u32(4..12);
        let life = Duration::from_micros(self.rng.u64(..1 << magnitude));
        let pid = Pid::from_raw(backend.pid() as i32).ok_or("no process")?;
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(life);
                // It is not reaped before this thread has ended, so the id is still its own.
                let _ = kill_process(pid, Signal::KILL);
            });
            loop {
                let asked = self.ask(&frontend)?;
                if asked.iter().flatten().any(|asked| asked.outcome.is_none()) {
                    return Ok(asked);
                }
                self.shadow.take(&asked, 0)?;
                if asked.iter().all(Vec::is_empty) {
                    return Ok(Vec::new());
                }
            }
        })
    }

    /// Checks everything that a frontend can see of the VM.
    fn look(&mut self, frontend: &mut Frontend) -> Result<(), String> {
        let mut events = frontend.take_events().ok_or("no events")?;
        let queue = frontend.queue();
        self.ask_one(queue, Ask::get_info())?;
        let vm = self.ask_one(queue, Ask::get_vm(0, self.vcpus))?;
        let phase = self.shadow.likely().phase();
        self.tally.phases[phase.code() as usize] += 1;
        match (phase, vm) {
            (Phase::Restoring, _) => {
                for vcpu in 0..self.vcpus {
                    // An empty SET_REGS changes nothing, and is refused if the vCPU is done. If the
                    // vCPU lacks registers, RESTORE_DONE names them.
                    self.ask_one(queue, Ask::set_regs(vcpu, &[]))?;
                    if self
                        .shadow
                        .states()
                        .iter()
                        .all(|state| state.lacks(vcpu) != 0)
                    {
                        self.ask_one(queue, Ask::restore_done(vcpu))?;
                    }
                }
            }
            (Phase::Running, Outcome::Done(vm)) => {
                let rows = VmState::of(&vm).vcpus;
                let mut due = due(&rows);
                while !due.is_empty() {
                    let event = events.next(LIMIT).map_err(|error| {
                        format!("{error}, and timers are due that were not told: {due:?}")
                    })?;
                    let Event::TimerAsserted {
                        vcpu, timer, cval, ..
                    } = event
                    else {
                        continue;
                    };
                    self.tally.events += 1;
                    let (control, compare) = timer_of(&rows[vcpu as usize], timer);
                    if control & (ctl::ENABLE | ctl::IMASK) != ctl::ENABLE || cval != compare {
                        return Err(format!("{event:?} of {:?}", rows[vcpu as usize]));
                    }
                    due.retain(|other| *other != (vcpu, timer));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn ask_one(&mut self, queue: &RequestQueue, ask: Ask) -> Result<Outcome, String> {
        let asked = start(queue, ask)
            .map_err(|error| error.to_string())?
            .finish()?;
        let outcome = asked.outcome.clone();
        self.shadow.take_one(asked)?;
        outcome
            .map(|(outcome, _)| outcome)
            .ok_or_else(|| "the backend is gone, and nobody killed it".to_owned())
    }

    /// Sends random requests, several at a time, and takes the answers.
    fn ask(&mut self, frontend: &Frontend) -> Result<Vec<Vec<Asked>>, String> {
        let mut under_way = Vec::new();
        // Whether CONFIRM_RUN is granted depends on the instant of what changes the offsets, so in
        // ARMED nothing else is under way.
        let (queues, depth) = match self.shadow.likely().phase() {
            Phase::Armed => (1, 1),
            _ => (QUEUES, DEPTH),
        };
        for queue in frontend.queues().iter().take(queues) {
            let mut started = Vec::new();
            for _ in 0..self.rng.usize(1..=depth) {
                let ask = Draw {
                    rng: &mut self.rng,
                    vcpus: self.vcpus,
                    state: self.shadow.likely(),
                }
                .request();
                match start(queue, ask) {
                    Ok(request) => started.push(request),
                    Err(Error::QueueFull { .. } | Error::Disconnected) => break,
                    Err(error) => return Err(error.to_string()),
                }
            }
            under_way.push(started);
        }
        for queue in frontend.queues() {
            queue.kick();
        }
        let mut all = Vec::new();
        for started in under_way {
            let finished = started.into_iter().map(Started::finish);
            let asked = finished.collect::<Result<Vec<_>, _>>()?;
            let answered = asked.iter().filter(|asked| asked.outcome.is_some()).count();
            self.tally.answered += answered as u64;
            self.tally.unanswered += (asked.len() - answered) as u64;
            all.push(asked);
        }
        Ok(all)
    }
}

/// A request in flight.
struct Started {
    ask: Ask,
    sent: u64,
    ticket: Ticket<RawAnswer>,
}

fn start(queue: &RequestQueue, ask: Ask) -> Result<Started, Error> {
    let sent = host_count();
    let ticket = submit(queue, &ask)?;
    Ok(Started { ask, sent, ticket })
}

impl Started {
    fn finish(self) -> Result<Asked, String> {
        let outcome = outcome(self.ticket.wait(LIMIT));
        let outcome = outcome.map_err(|error| format!("{:?}: {error}", self.ask))?;
        Ok(Asked {
            ask: self.ask,
            sent: self.sent,
            outcome: outcome.map(|outcome| (outcome, host_count())),
        })
    }
}

/// A timer's control register and compare value.
fn timer_of(row: &Vcpu, timer: Timer) -> (u64, u64) {
    match timer {
        Timer::Virtual => (row.registers[0], row.registers[2]),
        Timer::Physical => (row.registers[3], row.registers[5]),
    }
}

/// The timers whose line is high.
fn due(rows: &[Vcpu]) -> Vec<(u32, Timer)> {
    let high = ctl::ENABLE | ctl::ISTATUS;
    let mut due = Vec::new();
    for row in rows {
        for timer in [Timer::Virtual, Timer::Physical] {
            let (control, _) = timer_of(row, timer);
            if control & (high | ctl::IMASK) == high {
                due.push((row.vcpu, timer));
            }
        }
    }
    due
}

#[test]
fn no_answered_request_is_lost_and_none_is_half_done_whenever_the_backend_is_killed() {
    let seed = seed();
    let rounds = std::env::var("VUT_ROUNDS").map_or(ROUNDS, |rounds| {
        rounds.parse().expect("VUT_ROUNDS is a number")
    });
    let (program, _) = release_program().expect("a backend program");
    thread::scope(|scope| {
        for n in 0..THREADS {
            let program = program.clone();
            scope.spawn(move || {
                let mut life = Life::new(seed.wrapping_add(n << 32), program);
                for round in 0..rounds / THREADS {
                    if let Err(failure) = life.round() {
                        panic!("VUT_SEED={seed}, thread {n}, round {round}: {failure}");
                    }
                }
                println!("{:?}", life.tally);
                let Tally {
                    answered,
                    unanswered,
                    phases,
                    ..
                } = life.tally;
                assert!(answered > 0 && unanswered > 0, "nobody was killed at work");
                assert!(phases.iter().skip(1).all(|&rounds| rounds > 0) || rounds < 100);
            });
        }
    });
}
