//! How a launcher starts a backend: with which sockets, limits, signals and standard streams.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use super::{
    BackendProcess, CLOCK_SOCKET, Devices, TIMER_SOCKET, private_directory, spawn_binding,
    with_state_file,
};

/// A backend to be started.
#[derive(Clone, Debug)]
#[must_use]
pub struct Launch {
    program: PathBuf,
    devices: Devices,
    args: Vec<OsString>,
    script: Option<String>,
    with_state: bool,
    inherits: bool,
    unread: bool,
}

impl Launch {
    /// This program, with a socket for each of these devices, which it binds itself.
    pub fn new(program: &Path, devices: Devices) -> Self {
        Launch {
            program: program.to_owned(),
            devices,
            args: Vec::new(),
            script: None,
            with_state: false,
            inherits: false,
            unread: false,
        }
    }

    /// With these options as well.
    pub fn args<A: AsRef<OsStr>>(mut self, args: &[A]) -> Self {
        self.args
            .extend(args.iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// By this shell script, which ends in `exec … "$@"`: it sets limits (`ulimit -n 64`), closes
    /// descriptors, ignores signals or blocks them (`env --block-signal=TERM`).
    pub fn script(mut self, script: &str) -> Self {
        self.script = Some(script.to_owned());
        self
    }

    /// With a state file, which [`BackendProcess::relaunch_with_state`] finds.
    pub fn with_state(mut self) -> Self {
        self.with_state = true;
        self
    }

    /// With sockets that the launcher has bound (`--fd`, `--rtc-fd`). The launch does not wait:
    /// frontends can connect at once. Log levels below info need this.
    pub fn inheriting(mut self) -> Self {
        self.inherits = true;
        self
    }

    /// With a pipe as its stderr that nobody reads. What is logged before the backend is ready is
    /// read where it binds its sockets.
    pub fn unread(mut self) -> Self {
        self.unread = true;
        self
    }

    /// Starts it. A backend that binds its sockets is ready then.
    ///
    /// # Errors
    ///
    /// If there is no such program, the system refuses to start it, or it ends before it is ready.
    pub fn start(self) -> io::Result<BackendProcess> {
        let directory = private_directory()?;
        let args = match self.with_state {
            true => with_state_file(directory.path(), &self.args),
            false => self.args.clone(),
        };
        let command = self.command();
        if !self.inherits {
            let mut backend = BackendProcess {
                child: spawn_binding(command, directory.path(), self.devices, &args)?,
                devices: self.devices,
                socket_path: directory.path().join(TIMER_SOCKET),
                log_path: directory.path().join("log"),
                unread: None,
                log_writer: None,
                waited_for: Mutex::default(),
                directory,
            };
            backend.until_ready(self.unread)?;
            return Ok(backend);
        }
        let listener = |device, name| -> io::Result<Option<OwnedFd>> {
            if ![device, Devices::TimerAndClock].contains(&self.devices) {
                return Ok(None);
            }
            let socket = UnixListener::bind(directory.path().join(name))?;
            Ok(Some(socket.into()))
        };
        let timer = listener(Devices::Timer, TIMER_SOCKET)?;
        let clock = listener(Devices::Clock, CLOCK_SOCKET)?;
        let stderr = match self.unread {
            true => Stdio::piped(),
            false => File::create(directory.path().join("log"))?.into(),
        };
        BackendProcess::launch_on(command, timer, clock, stderr, directory, &args)
    }

    fn command(&self) -> Command {
        let Some(script) = &self.script else {
            return Command::new(&self.program);
        };
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(&self.program);
        command
    }
}
