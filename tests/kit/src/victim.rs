//! A backend under attack, and what must be true of it during the attack and afterwards.
//!
//! [`Victim::unharmed`] is the whole of it: the process lives, serves a correct frontend of either
//! socket, comes to rest, has the descriptors, threads and memory that it had, and its VM is as it
//! was. When a victim is dropped, SIGTERM must end it.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::backend_process::{Devices, Launch};
use crate::clock_driver::{ClockDriver, F_ALARM, UTC};
use crate::contract::{CNT, CTL, CVAL, Client, Info, VmState};
use crate::raw_driver::{Control, Driver, PATIENCE, Rig, Setup, Usage, release_program};

/// How long a correct frontend may wait, and how long the backend may take to end. Not how fast it
/// is: a machine may be busy for longer than any of that takes.
pub const DEADLINE: Duration = PATIENCE;

/// What a VM's frontend negotiates.
pub const TIMER_FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
/// What a guest's frontend negotiates.
pub const CLOCK_FEATURES: u64 = TIMER_FEATURES | F_ALARM;

/// How much more memory of its own an attack may leave behind, KiB: what the allocator keeps.
const SLACK_KIB: u64 = 2048;

/// A backend to be attacked.
#[derive(Clone, Debug)]
#[must_use]
pub struct NewVictim {
    launch: Launch,
    log_level: &'static str,
    life: Option<Duration>,
    slack_kib: u64,
}

impl NewVictim {
    /// With these options as well.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.launch = self.launch.args(args);
        self
    }

    /// With this log level instead of error.
    pub fn log_level(mut self, level: &'static str) -> Self {
        self.log_level = level;
        self
    }

    /// [`Launch::script`].
    pub fn script(mut self, script: &str) -> Self {
        self.launch = self.launch.script(script);
        self
    }

    /// [`Launch::with_state`].
    pub fn with_state(mut self) -> Self {
        self.launch = self.launch.with_state();
        self
    }

    /// [`Launch::unread`].
    pub fn unread(mut self) -> Self {
        self.launch = self.launch.unread();
        self
    }

    /// It may keep this much memory, KiB, instead of 2 MiB: the allocator has an area for each of
    /// several threads.
    pub fn slack_kib(mut self, slack_kib: u64) -> Self {
        self.slack_kib = slack_kib;
        self
    }

    /// It may live this long before it is killed as one that hangs, instead of as any other.
    pub fn life(mut self, life: Duration) -> Self {
        self.life = Some(life);
        self
    }

    /// Starts it, configures its VM, and notes what it uses.
    ///
    /// # Panics
    ///
    /// If it does not start or does not serve.
    pub fn start(self) -> Victim {
        let level = format!("--log-level={}", self.log_level);
        let launch = self.launch.args(&["--request-queues=2", &level]);
        let backend = launch.inheriting().start().expect("a backend");
        let mut victim = Victim::of(match self.life {
            Some(life) => Rig::watch_within(backend, life),
            None => Rig::watch(backend),
        });
        victim.slack_kib = self.slack_kib;
        victim
    }
}

/// A backend whose VM must not change.
pub struct Victim {
    /// The backend.
    pub rig: Rig,
    /// What it used before the attack, with no frontend connected.
    pub usage: Usage,
    info: Info,
    state: VmState,
    slack_kib: u64,
}

#[allow(
    clippy::missing_panics_doc,
    reason = "each panics where the backend does not do as it should: that is how a test fails"
)]
impl Victim {
    /// The released backend with both sockets, to be started.
    pub fn released() -> NewVictim {
        let (program, _) = release_program().expect("a backend program");
        Self::program(&program)
    }

    /// This backend with both sockets, to be started.
    pub fn program(program: &Path) -> NewVictim {
        NewVictim {
            launch: Launch::new(program, Devices::TimerAndClock),
            log_level: "error",
            life: None,
            slack_kib: SLACK_KIB,
        }
    }

    /// The released backend with both sockets.
    pub fn launch() -> Self {
        Self::released().start()
    }

    /// A backend that was started by other means, with two request queues and both sockets, and
    /// whose VM is in NEW.
    pub fn of(rig: Rig) -> Self {
        let (info, state) = configured(&rig);
        // Warmed up: what is made once is made now.
        for _ in 0..3 {
            Client::connect(&rig).info();
            ClockDriver::connect(&rig).reads_the_hosts(UTC);
        }
        let mut victim = Victim {
            usage: rig.usage(),
            rig,
            info,
            state,
            slack_kib: SLACK_KIB,
        };
        assert!(victim.rig.comes_to_rest());
        victim.usage = victim.rig.usage();
        assert!(
            victim.usage.threads <= 2,
            "between frontends there are main and the log's thread: {}",
            victim.usage.threads
        );
        victim
    }

    /// The state file of [`NewVictim::with_state`].
    pub fn state_path(&self) -> PathBuf {
        self.rig.backend.directory().join("state")
    }

    /// A driver of the timer device, with its rings started.
    pub fn driver(&self) -> Driver {
        self.rig.client().queues(3).queue_size(16).driver()
    }

    /// A driver of the clock device, with its rings started.
    pub fn clock(&self) -> ClockDriver {
        let setup = Setup {
            size: 16,
            ..ClockDriver::setup()
        };
        ClockDriver::connect_with(&self.rig, setup)
    }

    /// A connection to the timer device on which nothing was sent.
    pub fn control(&self) -> Control {
        Control::over(self.rig.stream())
    }

    /// A connection to the timer device on which only features are negotiated.
    pub fn negotiated(&self) -> Control {
        Control::negotiated(self.rig.stream(), TIMER_FEATURES)
    }

    /// A connection to the clock device on which nothing was sent.
    pub fn clock_control(&self) -> Control {
        Control::over(self.rig.clock_stream())
    }

    /// A connection to the clock device on which only these features are negotiated, besides
    /// [`CLOCK_FEATURES`].
    pub fn clock_negotiated(&self, features: u64) -> Control {
        Control::negotiated(self.rig.clock_stream(), CLOCK_FEATURES | features)
    }

    /// Checks that a correct frontend of the timer device is served within [`DEADLINE`], and that
    /// the VM is as it was.
    #[track_caller]
    pub fn serves_the_timer(&self) {
        let (info, state) = self.in_time("a frontend of the timer device is served", || {
            let mut client = Client::connect(&self.rig);
            (client.info().at_rest(), client.state().at_rest(false))
        });
        assert_eq!(info, self.info, "the VM changed");
        assert_eq!(state, self.state, "the VM changed");
    }

    /// Checks that a correct frontend of the clock device is served within [`DEADLINE`].
    #[track_caller]
    pub fn serves_the_clock(&self) {
        self.in_time("a frontend of the clock device is served", || {
            ClockDriver::connect(&self.rig).reads_the_hosts(UTC);
        });
    }

    /// Checks that the process lives and serves, has what it had and no more, comes to rest, and
    /// that its VM is as it was.
    #[track_caller]
    pub fn unharmed(&self) {
        self.serves_the_timer();
        self.serves_the_clock();
        self.as_before();
    }

    /// Checks that the process has the descriptors, threads and memory that it had, and comes to
    /// rest, with no frontend connected.
    #[track_caller]
    pub fn as_before(&self) {
        let usage = self.rig.settled(self.usage.threads, self.usage.fds);
        assert_eq!(usage.threads, self.usage.threads, "threads");
        assert_eq!(usage.fds, self.usage.fds, "descriptors");
        let kib = |usage: &Usage| usage.anonymous_kib + usage.shared_kib;
        let grown = kib(&usage).saturating_sub(kib(&self.usage));
        assert!(grown <= self.slack_kib, "{grown} KiB more");
        assert!(self.rig.comes_to_rest(), "it spins with nobody there");
    }

    /// Sends SIGTERM, which must end the process with 0 within [`DEADLINE`], also with frontends
    /// connected.
    /// A victim that is dropped does this too.
    #[track_caller]
    pub fn ends_on_sigterm(mut self) {
        self.must_end();
    }

    /// [`Rig::in_time`], within [`DEADLINE`].
    #[track_caller]
    pub fn in_time<T>(&self, what: &str, act: impl FnOnce() -> T) -> T {
        self.rig.in_time(DEADLINE, what, act)
    }

    /// Gives it a new VM, configured as the first was, for the next attack.
    #[track_caller]
    pub fn renew(&mut self) {
        let (info, state) = self.in_time("the VM is reset", || {
            Client::connect(&self.rig).reset_and_leave();
            configured(&self.rig)
        });
        (self.info, self.state) = (info, state);
    }

    #[track_caller]
    fn must_end(&mut self) {
        let backend = &mut self.rig.backend;
        // Without effect where it has ended already.
        backend.signal(Signal::TERM);
        let ended = backend.exit_within(DEADLINE);
        let status = ended.expect("SIGTERM ends it in time");
        assert_eq!(status.code(), Some(0), "{status}");
    }
}

/// Configures the VM. Returns what must not change.
fn configured(rig: &Rig) -> (Info, VmState) {
    let mut client = Client::connect(rig);
    client.configure(2);
    client.set(0, &[(CTL, 1), (CVAL, 1 << 40), (CNT, 1 << 30)]);
    (client.info().at_rest(), client.state().at_rest(false))
}

impl Drop for Victim {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.must_end();
        }
    }
}
