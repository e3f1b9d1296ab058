//! One side of the move: a backend process, the VMM's connection to it, and the interrupt lines
//! from its event stream to the vCPU threads.

use std::collections::HashSet;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost_user_timer_frontend::{
    self as frontend, ApplyError, Deadline, Event, EventStream, Frontend, Info, Options, Reconnect,
    RequestQueue, ShutdownHandle, Timer, VmOptions,
};
use vhost_user_timer_protocol::{Abi, MAX_REQUEST_QUEUES, Phase};

use super::error::{Error, Side};
use super::hypervisor::Hypervisor;
use vhost_user_timer_kit::backend_process::BackendProcess;

/// How long anything may take before it counts as failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// vCPUs for each request queue, as long as there are queues.
const VCPUS_PER_QUEUE: u32 = 32;

/// A timer's programmed deadline: whose, which timer's, and its CVAL.
pub(super) type Programmed = (u32, Timer, u64);

/// What a vCPU thread is woken by.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wake {
    /// A timer's line went high; its CVAL.
    Interrupt(Timer, u64),
    /// The VMM takes the vCPU out of the guest at once.
    Stop,
    /// The guest shall shut down: take what is due, and program nothing more.
    ShutDown,
}

/// A backend and the VMM's end of it. Dropping it kills the backend.
pub(super) struct Vmm {
    pub(super) side: Side,
    pub(super) lines: Arc<Lines>,
    /// The VM's.
    pub(super) hypervisor: Hypervisor,
    frontend: Frontend,
    listener: Option<JoinHandle<()>>,
    backend: Mutex<BackendProcess>,
    program: PathBuf,
    args: Vec<String>,
}

impl Vmm {
    /// Starts a backend for a VM of that many vCPUs, and connects to it. A `mortal` backend has
    /// a state file, can be [replaced](Self::replace), and is reconnected to.
    pub(super) fn start(
        side: Side,
        program: &Path,
        vcpus: u32,
        mortal: bool,
    ) -> Result<Self, Error> {
        let queues = vcpus
            .div_ceil(VCPUS_PER_QUEUE)
            .min(MAX_REQUEST_QUEUES.into());
        let args = [
            // What the guests count by, on every architecture.
            "--counter-source=monotonic".to_owned(),
            format!("--max-vcpus={vcpus}"),
            format!("--request-queues={queues}"),
        ];
        let args = args.to_vec();
        let launched = match mortal {
            true => BackendProcess::launch_with_state(program, &args),
            false => BackendProcess::launch_program(program, &args),
        };
        let mut backend = launched.map_err(Error::Launch)?;
        let mut options = options(vcpus, queues);
        if mortal {
            options = options.reconnect(Reconnect::default().patience(PATIENCE));
        }
        let connected = Frontend::connect(backend.socket_path(), options);
        let mut frontend = match connected {
            Ok(frontend) => frontend,
            Err(source) => {
                // A backend that failed to start has logged more than its closed socket shows.
                return Err(match backend.exit_within(PATIENCE) {
                    Some(status) => Error::BackendEnded {
                        side,
                        status,
                        log: backend.log(),
                    },
                    None => Error::Vmm {
                        what: "reach the backend",
                        side,
                        source,
                    },
                });
            }
        };
        let lines = Arc::new(Lines::default());
        let listener = frontend.take_events().map(|events| {
            let lines = lines.clone();
            std::thread::Builder::new()
                .name(format!("{side} events"))
                .spawn(move || lines.follow(events))
        });
        Ok(Vmm {
            side,
            lines,
            hypervisor: Hypervisor::default(),
            frontend,
            listener: listener.transpose().map_err(Error::Thread)?,
            backend: Mutex::new(backend),
            program: program.to_owned(),
            args,
        })
    }

    /// Ends the backend by SIGKILL.
    pub(super) fn kill(&self) {
        self.backend().kill();
    }

    /// Starts another backend on the state file of the one that was killed. Returns the VM's
    /// state there, once every request that was in flight has arrived.
    pub(super) fn replace(&self) -> Result<Info, Error> {
        let relaunched = self
            .backend()
            .relaunch_with_state(&self.program, &self.args);
        relaunched.map_err(Error::Launch)?;
        // Requests of one queue are served in order, those from before the outage first.
        for queue in self.frontend.queues() {
            let info = queue.info(PATIENCE);
            info.map_err(self.failed_to("reach the new backend"))?;
        }
        self.ask("ask for the phase", |queue| queue.info(PATIENCE))
    }

    /// The VM as the backend's device state.
    pub(super) fn save_device_state(&self) -> Result<Vec<u8>, Error> {
        let saved = self.frontend.save_device_state(PATIENCE);
        saved.map_err(self.failed_to("save the device state"))
    }

    /// Loads a device state, which opens a restore.
    pub(super) fn load_device_state(&self, state: &[u8]) -> Result<(), Error> {
        let loaded = self.frontend.load_device_state(state, PATIENCE);
        loaded.map_err(self.failed_to("load the device state"))
    }

    /// CONFIGURE_VM, with CONFIRM.
    pub(super) fn configure(&self, vcpus: u32, frequency: u64) -> Result<(), Error> {
        let frequency = NonZeroU64::new(frequency);
        let options = VmOptions::default().confirm(true);
        self.ask("configure the VM", |queue| {
            queue.configure_with(vcpus, Abi::Arm64, frequency, options, PATIENCE)
        })
    }

    /// Resumes the VM, or continues to do so: `apply` puts its offsets into the hypervisor, and
    /// then they are confirmed.
    pub(super) fn resume_with(
        &self,
        apply: impl FnOnce(&Info) -> Result<(), ApplyError>,
    ) -> Result<(), Error> {
        let resumed = self.frontend.resume_with(PATIENCE, apply);
        resumed.map(drop).map_err(self.failed_to("resume the VM"))
    }

    /// A request of the VMM's own, on the first queue.
    pub(super) fn ask<T>(
        &self,
        what: &'static str,
        request: impl FnOnce(&RequestQueue) -> Result<T, frontend::Error>,
    ) -> Result<T, Error> {
        request(self.frontend.queue()).map_err(self.failed_to(what))
    }

    /// RESET_DEVICE.
    pub(super) fn reset(&self) -> Result<(), Error> {
        let reset = self.frontend.reset_device();
        reset.map_err(self.failed_to("reset the device"))
    }

    fn failed_to(&self, what: &'static str) -> impl FnOnce(frontend::Error) -> Error {
        let side = self.side;
        move |source| Error::Vmm { what, side, source }
    }

    pub(super) fn queue_of(&self, vcpu: u32) -> &RequestQueue {
        self.frontend.queue_of(vcpu)
    }

    /// How many request queues there are.
    pub(super) fn queues(&self) -> usize {
        self.frontend.queues().len()
    }

    pub(super) fn pid(&self) -> u32 {
        self.backend().pid()
    }

    fn backend(&self) -> MutexGuard<'_, BackendProcess> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn shutdown_handle(&self) -> ShutdownHandle {
        self.frontend.shutdown_handle()
    }

    /// Disconnects, and ends the backend by SIGTERM, as a manager does. Its status must be 0.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        let side = self.side;
        self.shutdown_handle().shut_down();
        if let Some(listener) = self.listener.take() {
            // It ended with the shutdown; its result says nothing more.
            let _ = listener.join();
        }
        drop(self.frontend);
        let backend = (self.backend.get_mut()).unwrap_or_else(PoisonError::into_inner);
        let status = backend.terminate();
        if status.success() {
            return Ok(());
        }
        let log = backend.log();
        Err(Error::BackendEnded { side, status, log })
    }
}

fn options(vcpus: u32, queues: u32) -> Options {
    // Every vCPU's WAIT_RUN at once may take three quarters of a queue.
    let waiting = vcpus.div_ceil(queues);
    let size = (2 * waiting).next_power_of_two().clamp(64, 1024);
    Options::default().queue_size(size as u16).timeout(PATIENCE)
}

/// The timers' interrupt lines, and whatever else the backend reports by events.
#[derive(Default)]
pub(super) struct Lines {
    state: Mutex<LineState>,
    changed: Condvar,
}

#[derive(Default)]
struct LineState {
    /// The vCPU threads' inboxes, by vCPU.
    inboxes: Vec<Sender<Wake>>,
    asserted: HashSet<Programmed>,
    phase: Option<(Phase, u64)>,
    ended: bool,
}

impl Lines {
    /// Connects the lines to these vCPU threads from now on.
    pub(super) fn lead_to(&self, inboxes: Vec<Sender<Wake>>) {
        let mut state = self.state();
        state.inboxes = inboxes;
        state.asserted.clear();
    }

    /// Wakes every vCPU thread.
    pub(super) fn wake_all(&self, wake: Wake) {
        for inbox in &self.state().inboxes {
            // A thread that has already ended needs no waking.
            let _ = inbox.send(wake);
        }
    }

    /// Waits until the backend has asserted the lines of all these deadlines. Returns how many
    /// are missing if [`PATIENCE`] or the connection ends first.
    pub(super) fn until_asserted(&self, deadlines: &[Programmed]) -> usize {
        let missing = |state: &LineState| {
            let asserted = |programmed: &&Programmed| state.asserted.contains(*programmed);
            deadlines.len() - deadlines.iter().filter(asserted).count()
        };
        missing(&self.until(|state| missing(state) == 0))
    }

    /// Waits until the backend has reported this phase, and so everything before it.
    pub(super) fn until_phase(&self, phase: Phase, epoch: u64) -> bool {
        let reported = |state: &LineState| state.phase == Some((phase, epoch));
        reported(&self.until(reported))
    }

    fn until(&self, condition: impl Fn(&LineState) -> bool) -> MutexGuard<'_, LineState> {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() || condition(&state) {
                return state;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes events until the frontend is shut down or the backend is gone.
    fn follow(&self, mut events: EventStream) {
        while let Ok(event) = events.next(Deadline::NEVER) {
            self.take(event);
        }
        self.state().ended = true;
        self.changed.notify_all();
        // Without a backend no vCPU can continue.
        self.wake_all(Wake::Stop);
    }

    fn take(&self, event: Event) {
        let mut state = self.state();
        match event {
            Event::TimerAsserted {
                vcpu, timer, cval, ..
            } => {
                state.asserted.insert((vcpu, timer, cval));
                if let Some(inbox) = state.inboxes.get(vcpu as usize) {
                    // A stopped vCPU takes no interrupt. The line stays high.
                    let _ = inbox.send(Wake::Interrupt(timer, cval));
                }
            }
            Event::PhaseChanged { phase, epoch, .. } => state.phase = Some((phase, epoch)),
            _ => {}
        }
        drop(state);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
