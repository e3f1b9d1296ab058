//! A backend that this process launches: no socket path, nothing to wait for, nothing left behind.
//!
//! The backend gets one end of a socket pair as its stdin (`--fd=0`), a descriptor that no other
//! child of this process inherits. It ends with the connection, so also when this process dies.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::sys::{lock, poll};
use crate::{Connector, Deadline, Error, Frontend, InvalidArgument, Options};

/// How a backend is launched, and how its frontend is set up.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct SpawnOptions {
    /// The program's options, without `--fd` and `--state-file`.
    pub args: Vec<OsString>,
    /// `--state-file`: the file that keeps the VM while no backend runs. It is best on a tmpfs.
    /// Remove it when the VM ends.
    ///
    /// With [`Options::reconnect`], which needs it, a backend that ended is replaced: the thread
    /// that reconnects launches the next one, with the same options and this file.
    pub state_file: Option<PathBuf>,
    /// The frontend's options.
    pub frontend: Options,
    prepare: Option<Arc<Prepare>>,
}

type Prepare = dyn Fn(&mut Command) + Send + Sync;

/// What a service manager tells the process that it started (sd_notify(3), sd_listen_fds(3)), which
/// is this one: a backend that had the variables would report itself as the ready service.
const OF_THE_SERVICE: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
];

impl SpawnOptions {
    /// Adds an option of the program, such as `--counter-source=cntvct`.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Sets [`state_file`](Self::state_file).
    #[must_use]
    pub fn state_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_file = Some(path.into());
        self
    }

    /// Sets [`frontend`](Self::frontend).
    #[must_use]
    pub fn frontend(mut self, options: Options) -> Self {
        self.frontend = options;
        self
    }

    /// A function that prepares each launch: environment, stderr, user, limits. The program's stdin
    /// is set after that.
    #[must_use]
    pub fn prepare(mut self, prepare: impl Fn(&mut Command) + Send + Sync + 'static) -> Self {
        self.prepare = Some(Arc::new(prepare));
        self
    }
}

impl fmt::Debug for SpawnOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpawnOptions")
            .field("args", &self.args)
            .field("state_file", &self.state_file)
            .field("frontend", &self.frontend)
            .finish_non_exhaustive()
    }
}

/// A backend process that this process launched, and the [`Frontend`] that is connected to it.
///
/// Dropping it shuts the frontend down, kills the process, and reaps it.
/// [`close`](Self::close) lets the process end by itself.
///
/// A process that ends earlier is reaped when [`exit_status`](Self::exit_status) asks, when the
/// next process replaces it, and when this is dropped; the library has no thread that could do so
/// at once.
pub struct Backend {
    frontend: Frontend,
    process: Arc<Process>,
}

impl Backend {
    /// Launches `program`, a path or a name that is searched for in `PATH`, with one end of a
    /// socket pair, and connects to it.
    ///
    /// # Errors
    ///
    /// [`Error::Spawn`] where the program cannot be started, [`Error::BackendEnded`] where it ends
    /// before it serves, as for an option that it does not accept;
    /// [`InvalidArgument::ReconnectWithoutState`]; or as [`Frontend::connect`].
    ///
    /// ```no_run
    /// # use vhost_user_timer_frontend::{Backend, Error, Options, Reconnect, SpawnOptions};
    /// # fn spawn() -> Result<Backend, Error> {
    /// let options = SpawnOptions::default()
    ///     .arg("--log-level=warn")
    ///     .state_file("/dev/shm/vm1.timer")
    ///     .frontend(Options::default().reconnect(Reconnect::default()));
    /// let backend = Backend::spawn("vhost-user-timer", options)?;
    /// println!("the VM is {}", backend.frontend().config()?.phase);
    /// # Ok(backend)
    /// # }
    /// ```
    pub fn spawn(program: impl Into<PathBuf>, options: SpawnOptions) -> Result<Self, Error> {
        let frontend = options.frontend.clone();
        let again = frontend.reconnect.is_some();
        if again && options.state_file.is_none() {
            return Err(InvalidArgument::ReconnectWithoutState.into());
        }
        let timeout = frontend.timeout;
        let process = Arc::new(Process {
            program: program.into(),
            options,
            state: Mutex::default(),
        });
        let socket = process.launch().map_err(|source| Error::Spawn {
            program: process.program.clone(),
            source,
        })?;
        let connector = match again {
            true => process.clone().connector(socket),
            false => Connector::stream(socket),
        };
        match Frontend::connect(connector, frontend) {
            Ok(frontend) => Ok(Backend { frontend, process }),
            Err(error) => Err(process.why_not(error, timeout.into())),
        }
    }

    /// The frontend that is connected to it.
    pub fn frontend(&self) -> &Frontend {
        &self.frontend
    }

    /// The same, for [`Frontend::take_events`].
    pub fn frontend_mut(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// The process's id; `None` once it ended and was reaped.
    pub fn pid(&self) -> Option<u32> {
        self.process.state().child.as_ref().map(Child::id)
    }

    /// Waits until the process has ended, reaps it, and returns how it ended; `None` if it still
    /// runs at the deadline. The connection ends slightly earlier than the process.
    pub fn exit_status(&self, deadline: impl Into<Deadline>) -> Option<ExitStatus> {
        let pidfd = self.process.state().pidfd();
        // Not under the lock: a thread that reconnects replaces the process.
        if let Some(pidfd) = pidfd {
            has_ended(&pidfd, deadline.into());
        }
        let mut state = self.process.state();
        state.reap_if_ended();
        match state.child {
            Some(_) => None,
            None => state.status,
        }
    }

    /// Closes the frontend ([`Frontend::close`]), waits until the process has ended, and reaps it.
    /// A process that is still there after [`Options::timeout`] is killed. The state file is left
    /// as it is.
    ///
    /// # Errors
    ///
    /// As [`Frontend::close`]; the process is gone in any case.
    pub fn close(mut self) -> Result<Option<ExitStatus>, Error> {
        let closed = self.frontend.stop();
        let timeout = self.process.options.frontend.timeout;
        let mut state = self.process.state();
        state.closed = true;
        if closed.is_ok() {
            state.wait_for_end(timeout.into());
        }
        state.end();
        closed.map(|()| state.status)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // No thread replaces the process, or waits for it, from here on.
        self.frontend.shutdown_handle().shut_down();
        let mut state = self.process.state();
        state.closed = true;
        state.end();
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend")
            .field("program", &self.process.program)
            .field("pid", &self.pid())
            .finish_non_exhaustive()
    }
}

/// The program and its latest process.
struct Process {
    program: PathBuf,
    options: SpawnOptions,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The process, until it is reaped.
    child: Option<Child>,
    /// How the last one that was reaped ended.
    status: Option<ExitStatus>,
    /// No other process is launched.
    closed: bool,
}

impl Process {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What connects by this socket first, and by a new process's from then on.
    fn connector(self: Arc<Self>, first: UnixStream) -> Connector {
        let first = Mutex::new(Some(first));
        Connector::function(move || match lock(&first).take() {
            Some(socket) => Ok(socket),
            None => self.launch(),
        })
    }

    /// Launches a process in the place of the previous one. Returns this process's end of its
    /// socket.
    fn launch(&self) -> io::Result<UnixStream> {
        let mut state = self.state();
        if state.closed {
            return Err(io::ErrorKind::NotConnected.into());
        }
        // It may still have the state file, whose content is whole at any instant.
        state.end();
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(&self.program);
        command.arg("--fd=0").args(&self.options.args);
        if let Some(path) = &self.options.state_file {
            command.arg("--state-file").arg(path);
        }
        for variable in OF_THE_SERVICE {
            command.env_remove(variable);
        }
        if let Some(prepare) = &self.options.prepare {
            prepare(&mut command);
        }
        // The backend has the only descriptor of its end once `command` is dropped.
        state.child = Some(command.stdin(OwnedFd::from(theirs)).spawn()?);
        Ok(ours)
    }

    /// Why the process could not be connected to. It is gone then.
    fn why_not(&self, error: Error, deadline: Deadline) -> Error {
        let mut state = self.state();
        state.closed = true;
        // A connection that is closed is that of a process that ends.
        let ended = matches!(error, Error::Disconnected) && state.wait_for_end(deadline);
        state.end();
        match state.status.filter(|_| ended) {
            Some(status) => Error::BackendEnded {
                program: self.program.clone(),
                status,
            },
            None => error,
        }
    }
}

impl State {
    /// A descriptor that is readable once the process has ended; `None` if it was reaped.
    fn pidfd(&self) -> Option<OwnedFd> {
        // The process is not reaped yet, so the id is its own.
        let pid = Pid::from_child(self.child.as_ref()?);
        pidfd_open(pid, PidfdFlags::empty()).ok()
    }

    /// Waits until the process has ended; `false` if it has not by the deadline.
    fn wait_for_end(&self, deadline: Deadline) -> bool {
        self.pidfd()
            .is_some_and(|pidfd| has_ended(&pidfd, deadline))
    }

    fn reap_if_ended(&mut self) {
        if let Some(child) = &mut self.child
            && let Ok(Some(status)) = child.try_wait()
        {
            self.status = Some(status);
            self.child = None;
        }
    }

    /// Kills the process, unless it has ended, and reaps it.
    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            // A process that has ended keeps the status that it ended with.
            let _ = child.kill();
            self.status = child.wait().ok();
        }
    }
}

/// Waits until the process behind the descriptor has ended, or until the deadline.
fn has_ended(pidfd: &OwnedFd, deadline: Deadline) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    poll(&mut fds, deadline).is_ok() && !fds[0].revents().is_empty()
}
