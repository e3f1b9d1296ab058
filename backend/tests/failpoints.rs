//! The backend killed at every step between the taking of a request and its answer: the request
//! was done wholly or not at all, and if its answer could be seen, it was done.
//!
//! This needs the backend as it is built with the feature `failpoints`. Killing it at random
//! instants as it is released is the black-box test `crash_safety`.
#![cfg(debug_assertions)]

use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use tempfile::TempDir;
use vhost_user_timer::failpoint::{Point, VARIABLE};
use vhost_user_timer_frontend::{Error, Frontend, HostClock, Options};
use vhost_user_timer_kit::backend_process::BackendProcess;
use vhost_user_timer_kit::reference::{Ask, whole_vcpu};
use vhost_user_timer_kit::shadow::{Asked, Shadow, outcome, submit};
use vhost_user_timer_kit::state_file;
use vhost_user_timer_kit::watch::{HOST_FREQUENCY, host_count};
use vhost_user_timer_protocol::wire::{configure_flags, restore_flags};
use vhost_user_timer_protocol::{Phase, Register};

/// Something that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

const VCPUS: u32 = 3;

/// A VM that outlives its backends.
struct Life {
    folder: TempDir,
    shadow: Shadow,
}

/// A backend of it, and a frontend.
struct Stop {
    backend: BackendProcess,
    frontend: Frontend,
}

fn new_shadow() -> Shadow {
    Shadow::new(VCPUS, 1)
}

impl Life {
    fn new() -> Self {
        Life {
            folder: tempfile::tempdir().unwrap(),
            shadow: new_shadow(),
        }
    }

    fn state_file(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Puts these bytes in the state file's place. (Truncating and rewriting the file
    /// could wait for the disk.)
    fn put(&self, bytes: &[u8]) {
        let _ = std::fs::remove_file(self.state_file());
        state_file::write(&self.state_file(), bytes).unwrap();
    }

    /// The next backend, which is killed at this point.
    fn launch(&self, kill_at: Option<(Point, u32)>) -> BackendProcess {
        self.launch_for(VCPUS, kill_at)
    }

    fn launch_for(&self, max_vcpus: u32, kill_at: Option<(Point, u32)>) -> BackendProcess {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-timer"));
        if let Some((point, time)) = kill_at {
            command.env(VARIABLE, format!("{}:{time}", point.name()));
        }
        let state_file = format!("--state-file={}", self.state_file().display());
        let max_vcpus = format!("--max-vcpus={max_vcpus}");
        let args = [state_file.as_str(), max_vcpus.as_str()];
        BackendProcess::launch_command(command, &args).expect("a backend")
    }

    fn serve(&self, kill_at: Option<(Point, u32)>) -> Stop {
        Self::connect(self.launch(kill_at))
    }

    fn connect(backend: BackendProcess) -> Stop {
        let options = Options::default().timeout(LIMIT);
        let connected = Frontend::connect(backend.socket_path(), options);
        Stop {
            frontend: connected.unwrap_or_else(|error| panic!("{error}: {}", backend.log())),
            backend,
        }
    }

    /// Asks, and takes in the answer if there is one. Returns whether there was.
    fn ask(&mut self, served: &Stop, ask: Ask) -> bool {
        let asked = asked(served, ask);
        let answered = asked.outcome.is_some();
        self.shadow.take(&[vec![asked]], host_count()).unwrap();
        answered
    }

    /// Looks whether the VM is what it should be.
    fn look(&mut self, served: &Stop) {
        assert!(self.ask(served, Ask::get_info()));
        assert!(self.ask(served, Ask::get_vm(0, VCPUS)));
    }
}

fn asked(served: &Stop, ask: Ask) -> Asked {
    let sent = host_count();
    let ticket = submit(served.frontend.queue(), &ask).unwrap();
    let outcome = outcome(ticket.wait(LIMIT)).unwrap();
    Asked {
        ask,
        sent,
        outcome: outcome.map(|outcome| (outcome, host_count())),
    }
}

fn was_killed(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(9)
}

fn values(vcpu: u32) -> [u64; 6] {
    std::array::from_fn(|n| 0x1234_5678_9a00 + 16 * n as u64 + u64::from(vcpu))
}

fn configure() -> Ask {
    Ask::configure(VCPUS, 0, HOST_FREQUENCY)
}

fn begin() -> Ask {
    Ask::begin(VCPUS, restore_flags::AUTORUN)
}

fn set_vm() -> Ask {
    let rows: Vec<_> = (0..VCPUS)
        .map(|vcpu| whole_vcpu(vcpu, values(vcpu)))
        .collect();
    Ask::set_vm(&rows)
}

fn set_regs(vcpu: u32) -> Ask {
    let [ctl, _, cval, _, _, pcval] = values(7 + vcpu);
    let entries = [
        (Register::TimerCtl, ctl),
        (Register::TimerCval, cval),
        (Register::PtimerCval, pcval),
    ];
    Ask::set_regs(vcpu, &entries)
}

/// CONFIGURE_VM of a VM that confirms.
fn configure_confirming() -> Ask {
    Ask::configure_with(VCPUS, 0, configure_flags::CONFIRM, HOST_FREQUENCY)
}

/// The offset of a VM in ARMED, so that CONFIRM_RUN can be written down.
const PINNED: u64 = 1 << 40;

/// What is done first, what is killed, and how many slots of the file that writes.
type Scene = (&'static str, Vec<Ask>, Ask, u32);

/// A VM on its way to ARMED, and out of it.
fn scenes_of_a_vm_that_confirms() -> Vec<Scene> {
    let paused = || vec![configure_confirming(), set_regs(1), Ask::set_offset(PINNED)];
    let resumed = || [paused(), vec![Ask::resume()]].concat();
    let restoring = || vec![configure_confirming(), set_regs(1), begin()];
    // The offset is pinned again, since RESTORE_BEGIN unpins it.
    let but_one_done = || {
        let rest = [
            set_vm(),
            Ask::set_offset(PINNED),
            Ask::restore_done(2),
            Ask::restore_done(0),
        ];
        [restoring(), rest.to_vec()].concat()
    };
    let armed = || [but_one_done(), vec![Ask::restore_done(1)]].concat();
    let confirm = || Ask::confirm(PINNED, PINNED);
    vec![
        (
            "CONFIGURE_VM, CONFIRM",
            vec![],
            configure_confirming(),
            VCPUS + 1,
        ),
        ("RESUME to ARMED", paused(), Ask::resume(), 1),
        ("CONFIRM_RUN after RESUME", resumed(), confirm(), 1),
        ("PAUSE, ARMED", resumed(), Ask::pause(), 1),
        ("SET_REGS, ARMED", resumed(), set_regs(2), 2),
        (
            "RESTORE_BEGIN, ARMED by RESUME",
            resumed(),
            begin(),
            VCPUS + 1,
        ),
        (
            "the last RESTORE_DONE to ARMED",
            but_one_done(),
            Ask::restore_done(1),
            2,
        ),
        (
            "the last SET_REGS with DONE to ARMED",
            but_one_done(),
            Ask::set_regs(1, &[]).done(),
            2,
        ),
        (
            "SET_VM with DONE to ARMED",
            restoring(),
            set_vm().done(),
            VCPUS + 1,
        ),
        ("CONFIRM_RUN of a restore", armed(), confirm(), 1),
        ("PAUSE, ARMED by a restore", armed(), Ask::pause(), 1),
        ("RESTORE_ABORT, ARMED", armed(), Ask::abort(), VCPUS + 1),
        ("RESTORE_BEGIN, ARMED", armed(), begin(), VCPUS + 1),
    ]
}

fn scenes() -> Vec<Scene> {
    let restoring = || vec![configure(), set_regs(0), begin(), set_vm()];
    let but_one_done = || {
        [
            restoring(),
            vec![Ask::restore_done(2), Ask::restore_done(0)],
        ]
        .concat()
    };
    vec![
        ("CONFIGURE_VM", vec![], configure(), VCPUS + 1),
        ("SET_REGS, PAUSED", vec![configure()], set_regs(1), 2),
        (
            "SET_REGS, RUNNING",
            vec![configure(), Ask::resume()],
            set_regs(2),
            2,
        ),
        ("SET_REGS, RESTORING", restoring(), set_regs(1), 2),
        ("RESUME", vec![configure()], Ask::resume(), 1),
        ("PAUSE", vec![configure(), Ask::resume()], Ask::pause(), 1),
        (
            "RESTORE_BEGIN",
            vec![configure(), set_regs(1)],
            begin(),
            VCPUS + 1,
        ),
        ("RESTORE_BEGIN again", but_one_done(), begin(), VCPUS + 1),
        ("SET_VM", vec![configure(), begin()], set_vm(), VCPUS + 1),
        ("RESTORE_DONE", restoring(), Ask::restore_done(1), 2),
        (
            "the last RESTORE_DONE",
            but_one_done(),
            Ask::restore_done(1),
            2,
        ),
        ("RESTORE_ABORT", but_one_done(), Ask::abort(), VCPUS + 1),
        (
            "SET_COUNTER_OFFSET",
            vec![configure()],
            Ask::set_offset(1 << 40),
            1,
        ),
        (
            "SET_COUNTER_ANCHOR",
            vec![configure()],
            Ask::set_anchor(5, 1 << 40),
            1,
        ),
    ]
}

/// Whether a change is whole at this point; `None` where the point is not on a request's way.
fn whole_at(point: Point) -> Option<bool> {
    match point {
        Point::Emptied
        | Point::HeaderWritten
        | Point::Sized
        | Point::Created
        | Point::Trimmed
        | Point::Extended
        | Point::Grown
        | Point::ConvertedHalf
        | Point::ConversionReady
        | Point::Converted => None,
        Point::CommitBegun
        | Point::SlotBegun
        | Point::SlotVoid
        | Point::SlotHalf
        | Point::SlotFull
        | Point::SlotDone
        | Point::CommitReady => Some(false),
        Point::CommitStored | Point::AnswerReady | Point::AnswerWritten | Point::AnswerUsed => {
            Some(true)
        }
    }
}

/// How often this point is reached.
fn times(point: Point, slots: u32) -> u32 {
    match point {
        Point::SlotBegun
        | Point::SlotVoid
        | Point::SlotHalf
        | Point::SlotFull
        | Point::SlotDone => slots,
        _ => 1,
    }
}

#[test]
fn what_was_done_before_a_change_is_answered_before_it_though_they_came_together() {
    let pairs: [[fn() -> Ask; 2]; 3] = [
        [|| set_regs(0), || set_regs(1)],
        [|| Ask::get_vm(0, VCPUS), || set_regs(1)],
        [|| set_regs(0), || Ask::get_vm(0, VCPUS)],
    ];
    for [first, second] in pairs {
        let mut life = Life::new();
        let mut served = life.serve(None);
        assert!(life.ask(&served, configure()));
        assert!(served.backend.terminate().success());

        let mut served = life.serve(Some((Point::AnswerWritten, 2)));
        let queue = served.frontend.queue();
        // One look finds both: the backend is told of them when both are there.
        let tickets = [
            submit(queue, &first()).unwrap(),
            submit(queue, &second()).unwrap(),
        ];
        queue.kick();
        let [first, second] = tickets.map(|ticket| ticket.wait(LIMIT));
        assert!(first.is_ok(), "{first:?}");
        assert!(matches!(second, Err(Error::Disconnected)), "{second:?}");
        assert!(was_killed(served.backend.wait(LIMIT)));
    }
}

#[test]
fn a_request_killed_at_any_step_is_done_wholly_or_not_at_all() {
    for (name, before, ask, slots) in [scenes(), scenes_of_a_vm_that_confirms()].concat() {
        let mut life = Life::new();
        let mut served = life.serve(None);
        for ask in before {
            assert!(life.ask(&served, ask));
        }
        assert!(served.backend.terminate().success());
        let file_before = std::fs::read(life.state_file()).unwrap();
        let shadow_before = life.shadow.clone();
        for &point in Point::ALL {
            let Some(whole) = whole_at(point) else {
                continue;
            };
            for time in 1..=times(point, slots) {
                let at = format!("{name}, {} for the {time}. time", point.name());
                life.put(&file_before);
                life.shadow = shadow_before.clone();
                killed(&mut life, &ask, (point, time), whole, &at);
            }
        }
    }
}

/// Asks, of a backend that is killed at this point, and looks at what is left.
fn killed(life: &mut Life, ask: &Ask, kill_at: (Point, u32), whole: bool, at: &str) {
    let mut served = life.serve(Some(kill_at));
    let asked = asked(&served, ask.clone());
    let status = served.backend.wait(LIMIT);
    assert!(was_killed(status), "{at}: {status}, {asked:?}");
    let seen = asked.outcome.is_some();
    assert_eq!(seen, kill_at.0 == Point::AnswerUsed, "{at}: the answer");
    if whole {
        let mut after = life.shadow.likely().clone();
        let outcome = asked.outcome.as_ref().map(|(outcome, _)| outcome);
        after
            .apply(ask, asked.sent..=host_count(), outcome)
            .unwrap();
        life.shadow = after.into();
    }
    // Again and again: the first may clear up what the killed one left.
    for _ in 0..2 {
        let mut served = life.serve(None);
        life.look(&served);
        assert!(served.backend.terminate().success(), "{at}");
    }
    // And it goes on; configured already, perhaps with a flag.
    let served = life.serve(None);
    assert!(life.ask(&served, configure()));
    assert!(life.ask(&served, configure_confirming()));
    assert!(life.ask(&served, set_regs(0)));
    life.look(&served);
}

#[test]
fn a_backend_killed_while_it_makes_the_state_file_leaves_one_to_begin_with() {
    let mut other_boot = Life::new();
    let mut served = other_boot.serve(None);
    assert!(other_boot.ask(&served, configure()));
    assert!(served.backend.terminate().success());
    let file = std::fs::read(other_boot.state_file()).unwrap();
    let former = [
        None,
        Some(vec![]),
        Some(state_file::of_another_boot(&file)),
        Some(vec![0; file.len()]),
    ];
    let points = [
        Point::Emptied,
        Point::HeaderWritten,
        Point::Sized,
        Point::Created,
    ];
    for former in &former {
        for point in points {
            let mut life = Life::new();
            if let Some(bytes) = former {
                life.put(bytes);
            }
            let status = life.launch(Some((point, 1))).wait(LIMIT);
            assert!(was_killed(status), "{point:?}: {status}");
            let served = life.serve(None);
            life.look(&served);
            assert!(life.ask(&served, configure()));
            life.look(&served);
        }
    }
}

#[test]
fn a_backend_killed_while_it_takes_a_file_over_or_enlarges_it_leaves_the_same_vm() {
    let mut life = Life::new();
    let mut served = life.serve(None);
    for ask in [configure(), set_regs(1), begin(), set_vm()] {
        assert!(life.ask(&served, ask));
    }
    assert!(served.backend.terminate().success());
    let newest = std::fs::read(life.state_file()).unwrap();
    let older = state_file::as_of_version_2(&newest);
    let converts = [
        Point::Extended,
        Point::ConvertedHalf,
        Point::ConversionReady,
        Point::Converted,
    ];
    let grows = [Point::Trimmed, Point::Extended, Point::Grown];
    let converts = converts.map(|point| (&older, VCPUS, point));
    let grows = grows.map(|point| (&newest, VCPUS + 5, point));
    for (file, max_vcpus, point) in converts.into_iter().chain(grows) {
        life.put(file);
        let status = life.launch_for(max_vcpus, Some((point, 1))).wait(LIMIT);
        assert!(was_killed(status), "{point:?}: {status}");
        let shadow = life.shadow.clone();
        // Again and again: the first may clear up what the killed one left. (GET_INFO answers
        // --max-vcpus, so only the VM of a backend with the usual one is compared.)
        for _ in 0..2 {
            let mut served = life.serve(None);
            life.look(&served);
            assert!(served.backend.terminate().success(), "{point:?}");
            let mut larger = Life::connect(life.launch_for(max_vcpus, None));
            assert!(larger.backend.terminate().success(), "{point:?}");
        }
        let served = life.serve(None);
        assert!(life.ask(&served, Ask::restore_done(1)));
        life.look(&served);
        life.shadow = shadow;
    }
}

#[test]
fn a_time_page_that_a_kill_leaves_open_is_not_read_and_holds_nobody_up() {
    let mut life = Life::new();
    let mut served = life.serve(None);
    assert!(life.ask(&served, configure()));
    assert!(life.ask(&served, Ask::resume()));
    assert!(served.backend.terminate().success());

    let mut served = life.serve(Some((Point::CommitBegun, 1)));
    let queue = served.frontend.queue();
    let page = served.frontend.time_page();
    page.start(queue, LIMIT).unwrap();
    let clock = queue.guest_clock(HostClock::MONOTONIC, LIMIT).unwrap();
    assert!(page.read().is_some() && clock.counts().is_some());
    // The count that it freezes at is not told before it is safe in the state file.
    assert!(matches!(queue.pause(LIMIT), Err(Error::Disconnected)));
    assert!(was_killed(served.backend.wait(LIMIT)));
    assert_eq!(page.read(), None);
    assert_eq!(clock.counts(), None);
    let waited = queue.wait_run_by_page(0, LIMIT);
    assert!(matches!(waited, Err(Error::Disconnected)), "{waited:?}");

    let served = life.serve(None);
    let queue = served.frontend.queue();
    let page = served.frontend.time_page();
    page.start(queue, LIMIT).unwrap();
    assert_eq!(page.read().unwrap().phase, Phase::Running);
}
