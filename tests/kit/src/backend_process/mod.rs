//! A backend as an external process: started, watched, and never left behind.
//!
//! The backend gets its socket from its launcher, as libvirt gives it to QEMU's backends: bound
//! and listening already, with `--fd`. So there is nothing to wait for; a frontend can connect
//! at once, and finds the connection closed if the backend did not come up.

mod ending;
mod launch;
mod log;
mod program;
#[cfg(test)]
mod tests;

pub use ending::{exit_within, kill_and_wait};
pub use launch::Launch;
pub use program::{BACKEND_VARIABLE, copy_program, find_program, write_script};

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use ending::has_ended;
use program::PROGRAM;

/// How long a backend may take to end after SIGTERM before it is killed, and to write a line of its
/// log. Only a failure takes this long.
const GRACE: Duration = Duration::from_secs(30);

/// The sockets' file names.
const TIMER_SOCKET: &str = "timer.sock";
const CLOCK_SOCKET: &str = "clock.sock";

/// The devices for which a backend binds a socket itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// The timer device alone.
    Timer,
    /// The guest's clock device alone.
    Clock,
    /// Both.
    TimerAndClock,
}

impl Devices {
    /// Each device's option, and the name of its socket.
    fn sockets(self) -> &'static [(&'static str, &'static str)] {
        const BOTH: [(&str, &str); 2] = [
            ("--socket-path", TIMER_SOCKET),
            ("--rtc-socket-path", CLOCK_SOCKET),
        ];
        match self {
            Devices::Timer => &BOTH[..1],
            Devices::Clock => &BOTH[1..],
            Devices::TimerAndClock => &BOTH,
        }
    }
}

/// A running backend. Dropping it kills it and reaps it.
#[derive(Debug)]
pub struct BackendProcess {
    child: Child,
    devices: Devices,
    socket_path: PathBuf,
    log_path: PathBuf,
    /// A stderr that nobody reads.
    unread: Option<BufReader<ChildStderr>>,
    /// Writes what comes by a stderr that is a pipe to the log file, until the process has ended.
    log_writer: Option<JoinHandle<io::Result<u64>>>,
    /// How often [`log_with`](Self::log_with) has waited for each text.
    waited_for: Mutex<BTreeMap<String, usize>>,
    directory: TempDir,
}

impl BackendProcess {
    /// Starts the program that [`find_program`] finds, listening at
    /// [`socket_path`](Self::socket_path).
    ///
    /// # Errors
    ///
    /// If there is no such program or the system refuses to start it. A program that starts and
    /// then fails is not noticed here, but when a frontend connects.
    pub fn launch<A: AsRef<OsStr>>(extra_args: &[A]) -> io::Result<Self> {
        Self::launch_program(&find_program()?, extra_args)
    }

    /// [`launch`](Self::launch), with this program.
    ///
    /// # Errors
    ///
    /// Those of [`launch`](Self::launch).
    pub fn launch_program<A: AsRef<OsStr>>(program: &Path, extra_args: &[A]) -> io::Result<Self> {
        Self::launch_command(Command::new(program), extra_args)
    }

    /// [`launch`](Self::launch), with this command, which may have an environment of its own.
    ///
    /// # Errors
    ///
    /// Those of [`launch`](Self::launch).
    pub fn launch_command<A: AsRef<OsStr>>(command: Command, extra_args: &[A]) -> io::Result<Self> {
        let directory = private_directory()?;
        let socket = UnixListener::bind(directory.path().join(TIMER_SOCKET))?;
        let log = File::create(directory.path().join("log"))?.into();
        Self::launch_on(
            command,
            Some(socket.into()),
            None,
            log,
            directory,
            extra_args,
        )
    }

    /// Starts the backend with one connected socket. Returns the other end; the backend ends when
    /// that is closed.
    ///
    /// # Errors
    ///
    /// Those of [`launch`](Self::launch).
    pub fn launch_connected<A: AsRef<OsStr>>(extra_args: &[A]) -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let directory = private_directory()?;
        let command = Command::new(find_program()?);
        let log = File::create(directory.path().join("log"))?.into();
        let theirs = Some(theirs.into());
        let backend = Self::launch_on(command, theirs, None, log, directory, extra_args)?;
        Ok((backend, ours))
    }

    /// Starts the backend with these sockets for its devices, each of them listening or connected.
    ///
    /// # Errors
    ///
    /// Those of [`launch`](Self::launch).
    pub fn launch_on_sockets<A: AsRef<OsStr>>(
        timer: Option<OwnedFd>,
        clock: Option<OwnedFd>,
        extra_args: &[A],
    ) -> io::Result<Self> {
        let command = Command::new(find_program()?);
        let directory = private_directory()?;
        let log = File::create(directory.path().join("log"))?.into();
        Self::launch_on(command, timer, clock, log, directory, extra_args)
    }

    /// Starts the backend so that it binds its socket itself (`--socket-path`), and waits until its
    /// log says that it is ready, which needs log level info or more.
    ///
    /// # Errors
    ///
    /// Those of [`launch`](Self::launch), or where the program ends without ever being ready.
    pub fn launch_binding<A: AsRef<OsStr>>(extra_args: &[A]) -> io::Result<Self> {
        Self::launch_devices(&find_program()?, Devices::Timer, extra_args)
    }

    /// [`launch_binding`](Self::launch_binding), with this program and a socket for each of
    /// these devices.
    ///
    /// # Errors
    ///
    /// Those of [`launch_binding`](Self::launch_binding).
    pub fn launch_devices<A: AsRef<OsStr>>(
        program: &Path,
        devices: Devices,
        extra_args: &[A],
    ) -> io::Result<Self> {
        Launch::new(program, devices).args(extra_args).start()
    }

    /// Starts this program so that it binds its socket itself and keeps its VM in a state file,
    /// where [`relaunch_with_state`](Self::relaunch_with_state) finds both.
    ///
    /// # Errors
    ///
    /// Those of [`launch_binding`](Self::launch_binding).
    pub fn launch_with_state<A: AsRef<OsStr>>(
        program: &Path,
        extra_args: &[A],
    ) -> io::Result<Self> {
        Self::launch_devices_with_state(program, Devices::Timer, extra_args)
    }

    /// [`launch_with_state`](Self::launch_with_state), with a socket for each of these devices.
    ///
    /// # Errors
    ///
    /// Those of [`launch_binding`](Self::launch_binding).
    pub fn launch_devices_with_state<A: AsRef<OsStr>>(
        program: &Path,
        devices: Devices,
        extra_args: &[A],
    ) -> io::Result<Self> {
        let launch = Launch::new(program, devices).args(extra_args);
        launch.with_state().start()
    }

    /// Starts another backend at the same socket paths and on the same state file, in the place of
    /// one that has ended, and returns when it is ready. The new log follows the old one.
    ///
    /// # Errors
    ///
    /// Those of [`launch_binding`](Self::launch_binding), or where the previous one still runs.
    pub fn relaunch_with_state<A: AsRef<OsStr>>(
        &mut self,
        program: &Path,
        extra_args: &[A],
    ) -> io::Result<()> {
        if self.try_wait()?.is_none() {
            return Err(io::Error::other("the previous backend still runs"));
        }
        let args = with_state_file(self.directory(), extra_args);
        let command = Command::new(program);
        self.child = spawn_binding(command, self.directory(), self.devices, &args)?;
        self.until_ready(false)
    }

    /// Reads the log until each device is ready, and has the rest of it written to the log file,
    /// or leaves it unread.
    fn until_ready(&mut self, unread: bool) -> io::Result<()> {
        let stderr = self.child.stderr.take();
        let mut lines = BufReader::new(stderr.ok_or(io::ErrorKind::BrokenPipe)?);
        let mut options = File::options();
        let mut log = options.append(true).create(true).open(&self.log_path)?;
        let mut said = String::new();
        let mut ready = 0;
        while ready < self.devices.sockets().len() {
            let start = said.len();
            if lines.read_line(&mut said)? == 0 {
                // Its stderr is closed before it has ended, and then another can take its place.
                self.wait(GRACE);
                let words: Vec<_> = said.split_whitespace().collect();
                let text = format!("{PROGRAM} ended before it was ready: {}", words.join(" "));
                return Err(io::Error::other(text));
            }
            io::Write::write_all(&mut log, &said.as_bytes()[start..])?;
            ready += usize::from(said[start..].contains("Ready for a frontend"));
        }
        if unread {
            self.unread = Some(lines);
            return Ok(());
        }
        let thread = std::thread::Builder::new().name("backend log".to_owned());
        self.log_writer = Some(thread.spawn(move || io::copy(&mut lines, &mut log))?);
        Ok(())
    }

    /// The log of a process that has ended is whole from here on.
    fn complete_log(&mut self) {
        if let Some(writer) = self.log_writer.take() {
            let _ = writer.join();
        }
    }

    /// Reaps the process, which has ended or is about to.
    fn reap(&mut self) -> ExitStatus {
        let status = self.child.wait().expect("the child is ours to reap");
        self.complete_log();
        status
    }

    fn launch_on<A: AsRef<OsStr>>(
        mut command: Command,
        timer: Option<OwnedFd>,
        clock: Option<OwnedFd>,
        stderr: Stdio,
        directory: TempDir,
        extra_args: &[A],
    ) -> io::Result<Self> {
        let devices = match (&timer, &clock) {
            (_, None) => Devices::Timer,
            (None, Some(_)) => Devices::Clock,
            (Some(_), Some(_)) => Devices::TimerAndClock,
        };
        // As descriptors 0 and 1, which go to this child alone. Descriptors without FD_CLOEXEC
        // would also go to children that other threads start.
        let mut pass = |option, fd, socket: Option<OwnedFd>| match socket {
            Some(socket) => {
                command.args([option, fd]);
                Stdio::from(socket)
            }
            None => Stdio::null(),
        };
        let (stdin, stdout) = (pass("--fd", "0", timer), pass("--rtc-fd", "1", clock));
        let child = command
            .args(counting_as_tests_do(extra_args))
            .args(extra_args)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .map_err(|error| {
                let program = command.get_program().display();
                let text = format!("Cannot start {program}: {error}");
                io::Error::new(error.kind(), text)
            })?;
        Ok(BackendProcess {
            child,
            devices,
            socket_path: directory.path().join(TIMER_SOCKET),
            log_path: directory.path().join("log"),
            unread: None,
            log_writer: None,
            waited_for: Mutex::default(),
            directory,
        })
    }

    /// Where frontends connect; nothing listens there if the backend has a connected socket.
    pub fn socket_path(&self) -> &Path {
        &self.socket_path
    }

    /// Where frontends of the clock device connect, if the backend was launched with one.
    pub fn clock_path(&self) -> PathBuf {
        self.directory().join(CLOCK_SOCKET)
    }

    /// The private directory of the sockets and the log. It is removed with this value.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fills the pipe that is its stderr, where nobody reads it ([`Launch::unread`]).
    ///
    /// # Errors
    ///
    /// If its stderr is no such pipe, or the system does not open it for writing.
    pub fn fill_stderr(&self) -> io::Result<()> {
        let unread = self.unread.as_ref().map(BufReader::get_ref);
        let stderr = unread.or(self.child.stderr.as_ref());
        let stderr = stderr.ok_or(io::ErrorKind::NotFound)?;
        // An open file description of its own, so the backend's one stays blocking.
        let writer = rustix::fs::open(
            format!("/proc/self/fd/{}", stderr.as_raw_fd()),
            OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        loop {
            match rustix::io::write(&writer, &[b'.'; 4096]) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    ///
    /// If the system has lost track of the child.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        if status.is_some() {
            self.complete_log();
        }
        Ok(status)
    }

    /// Its exit status, if it ends by itself within `limit`.
    ///
    /// # Panics
    ///
    /// If something else in this process has reaped the child.
    pub fn exit_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        has_ended(&mut self.child, limit).then(|| self.reap())
    }

    /// Waits for it to end by itself. After `limit` it is killed, which the status shows.
    ///
    /// # Panics
    ///
    /// If something else in this process has reaped the child.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        if !has_ended(&mut self.child, limit) {
            let _ = self.child.kill();
        }
        self.reap()
    }

    /// Ends it by SIGTERM and waits. A backend that does not end is killed, which the status shows.
    ///
    /// # Panics
    ///
    /// If something else in this process has reaped the child.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait(GRACE)
    }

    /// Ends it by SIGKILL and waits.
    ///
    /// # Panics
    ///
    /// If something else in this process has reaped the child.
    pub fn kill(&mut self) -> ExitStatus {
        let _ = self.child.kill();
        self.reap()
    }

    /// Sends a signal, unless the process is known to have ended.
    pub fn signal(&mut self, signal: Signal) {
        if let Ok(None) = self.child.try_wait() {
            // It is not reaped, so the id is still its own.
            let _ = kill_process(Pid::from_child(&self.child), signal);
        }
    }
}

impl Drop for BackendProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.complete_log();
    }
}

fn spawn_binding<A: AsRef<OsStr>>(
    mut command: Command,
    directory: &Path,
    devices: Devices,
    extra_args: &[A],
) -> io::Result<Child> {
    for (option, name) in devices.sockets() {
        command.arg(option).arg(directory.join(name));
    }
    command
        .args(counting_as_tests_do(extra_args))
        .args(extra_args);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let child = command.stderr(Stdio::piped()).spawn();
    child.map_err(|error| {
        let program = command.get_program().display();
        let text = format!("Cannot start {program}: {error}");
        io::Error::new(error.kind(), text)
    })
}

/// The option that has a backend count by CLOCK_MONOTONIC, as [`watch`](crate::watch) does, where
/// the test names no other source: the default differs between architectures.
fn counting_as_tests_do<A: AsRef<OsStr>>(extra_args: &[A]) -> Option<&'static str> {
    const OPTION: &str = "--counter-source";
    let names_one = extra_args.iter().any(|arg| {
        let arg = arg.as_ref().as_encoded_bytes();
        arg.starts_with(OPTION.as_bytes())
    });
    (!names_one).then_some("--counter-source=monotonic")
}

fn with_state_file<A: AsRef<OsStr>>(directory: &Path, extra_args: &[A]) -> Vec<OsString> {
    let state_file = ["--state-file".into(), directory.join("state").into()];
    let extra_args = extra_args.iter().map(|arg| arg.as_ref().to_owned());
    state_file.into_iter().chain(extra_args).collect()
}

fn private_directory() -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix("vhost-user-timer-")
        .tempdir()
}
