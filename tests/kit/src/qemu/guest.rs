//! A running guest that takes commands.

use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use super::bracket::{Bracket, HostClock};
use super::channel::{Channel, Deadline, listen};
use super::process::Process;
use super::qmp::Event;
use super::{Environment, Error, Options, PATIENCE, Qmp};

/// The start of the line that ends each command's output; a number follows.
const MARK: &str = "end-of-command-";

/// QEMU's event of a machine that was reset. Each is taken by what has caused it: one that is left
/// would be taken for the next.
const RESET: &str = "RESET";

/// What a command printed, to stdout and stderr, and its exit status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// 0 where it succeeded.
    pub status: u8,
    /// What it printed.
    pub text: String,
}

/// A guest that takes commands. Dropping it kills it.
#[derive(Debug)]
pub struct Guest {
    // In the order in which they are dropped: QEMU first, while its sockets are there.
    process: Process,
    commands: Channel,
    qmp: Qmp,
    boot_limit: Duration,
    /// The number of commands so far. With QEMU's process id it distinguishes the ends of their
    /// outputs.
    count: u64,
}

impl Guest {
    /// Starts QEMU, and returns when the guest takes commands.
    ///
    /// # Errors
    ///
    /// [`Error::Boot`], with the logs, if it does not come up.
    pub fn boot(environment: &Environment, options: &Options) -> Result<Self, Error> {
        let mut guest = Self::start(environment, options)?;
        match guest.await_ready() {
            Ok(()) => Ok(guest),
            Err(source) => Err(boot_error(source, &guest.process)),
        }
    }

    /// Starts QEMU, and returns as soon as [`qmp`](Self::qmp) can be used: for a guest that must
    /// not run yet.
    ///
    /// # Errors
    ///
    /// Those of [`boot`](Self::boot).
    pub fn start(environment: &Environment, options: &Options) -> Result<Self, Error> {
        let directory = tempfile::Builder::new()
            .prefix("guest-")
            .tempdir()
            .map_err(Error::system("make a directory for QEMU"))?;
        let commands = listen(&directory.path().join("commands"))?;
        let qmp = listen(&directory.path().join("qmp"))?;
        let mut process = Process::start(environment, options, directory)?;
        let connect = || {
            let qmp = Qmp::new(Channel::accept(&qmp, PATIENCE)?)?;
            Ok((qmp, Channel::accept(&commands, PATIENCE)?))
        };
        match connect() {
            Ok((qmp, commands)) => {
                process.limit_life(options.life_limit)?;
                Ok(Guest {
                    process,
                    commands,
                    qmp,
                    boot_limit: options.boot_limit,
                    count: 0,
                })
            }
            Err(source) => Err(boot_error(source, &process)),
        }
    }

    /// Waits until the guest has booted, for the first time or after a reset, and takes commands.
    /// Output from before the reset is dropped.
    ///
    /// # Errors
    ///
    /// If it is not ready within its limit.
    pub fn await_ready(&mut self) -> Result<(), Error> {
        // Its own `ready` may be of a boot that a reset has ended. QEMU keeps the command until the
        // guest has opened its port, so no boot but the last one answers.
        self.run_within(self.boot_limit, "true").map(drop)
    }

    /// Resets the machine. The guest is [ready](Self::await_ready) again later.
    ///
    /// # Errors
    ///
    /// If QEMU does not report that it has.
    pub fn reset(&mut self) -> Result<Event, Error> {
        self.qmp.command("system_reset")?;
        self.qmp.event(RESET)
    }

    /// Has the guest reboot, and returns when it has left its kernel. It is
    /// [ready](Self::await_ready) again later.
    ///
    /// # Errors
    ///
    /// If QEMU does not report that it has.
    pub fn reboot(&mut self) -> Result<Event, Error> {
        self.send("reboot -f")?;
        self.qmp.event(RESET)
    }

    /// Runs a line of shell in the guest, which must succeed. Returns its output without
    /// surrounding white space.
    ///
    /// # Errors
    ///
    /// [`Error::Failed`] where it does not succeed; otherwise as [`run_within`](Self::run_within).
    pub fn run(&mut self, command: &str) -> Result<String, Error> {
        let Output { status, text } = self.run_within(PATIENCE, command)?;
        let text = text.trim().to_owned();
        if status == 0 {
            return Ok(text);
        }
        Err(Error::Failed {
            command: command.to_owned(),
            status,
            text,
        })
    }

    /// Runs a line of shell in the guest, which may fail. Returns its output.
    ///
    /// # Errors
    ///
    /// If it has not ended within the limit, or QEMU has ended.
    pub fn run_within(&mut self, limit: Duration, command: &str) -> Result<Output, Error> {
        let mark = self.begin(command)?;
        self.finish(&mark, limit, command)
    }

    /// Sends a command without waiting for its end, such as `poweroff -f`.
    ///
    /// # Errors
    ///
    /// If QEMU does not take it.
    pub fn send(&mut self, command: &str) -> Result<(), Error> {
        self.begin(command).map(drop)
    }

    /// Reads a clock of the guest, such as `ptp0`, this many times, each between two readings of
    /// the host's. A round trip takes about half a millisecond.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run).
    pub fn exchange(
        &mut self,
        clock: &str,
        host: HostClock,
        count: usize,
    ) -> Result<Vec<Bracket>, Error> {
        let command = format!("guest exchange {clock}");
        let mark = self.begin(&command)?;
        let mut brackets = Vec::with_capacity(count);
        for _ in 0..count {
            let deadline = Deadline::after(PATIENCE);
            let before = host.now();
            self.commands.send("")?;
            let line = self.commands.line(&deadline, "reading")?;
            let after = host.now();
            let Ok(reading) = line.parse() else {
                // The last of the program's output; its end follows.
                let Output { status, text } = self.finish(&mark, PATIENCE, &command)?;
                let text = format!("{line}\n{text}").trim().to_owned();
                return Err(Error::Failed {
                    command,
                    status,
                    text,
                });
            };
            brackets.push(Bracket {
                before,
                reading,
                after,
            });
        }
        self.commands.send("q")?;
        let Output { status, text } = self.finish(&mark, PATIENCE, &command)?;
        if status == 0 {
            return Ok(brackets);
        }
        Err(Error::Failed {
            command,
            status,
            text,
        })
    }

    fn begin(&mut self, command: &str) -> Result<String, Error> {
        self.count += 1;
        // A guest that has migrated may still print for the previous QEMU's commands.
        let mark = format!("{MARK}{}-{}", self.pid(), self.count);
        self.commands.send(format_args!("{mark} {command}"))?;
        Ok(mark)
    }

    fn finish(&mut self, mark: &str, limit: Duration, command: &str) -> Result<Output, Error> {
        let deadline = Deadline::after(limit);
        let what = format!("end of `{command}`");
        let mut text = String::new();
        loop {
            let line = self.commands.line(&deadline, &what)?;
            let (word, status) = line.split_once(' ').unwrap_or((&line, ""));
            if word == mark {
                // The mark stands on its own line, whatever came before.
                text.pop();
                let status = status.parse().map_err(|_| Error::Malformed {
                    what: "an exit status",
                    text: line.clone(),
                })?;
                return Ok(Output { status, text });
            }
            if word.starts_with(MARK) {
                // All that was the late output of another command.
                text.clear();
                continue;
            }
            text.push_str(&line);
            text.push('\n');
        }
    }

    /// QEMU's control channel.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The private directory of QEMU's channels and logs.
    pub(super) fn directory(&self) -> &Path {
        self.process.directory()
    }

    /// What QEMU has written to stderr so far.
    pub fn qemu_log(&self) -> String {
        self.process.qemu_log()
    }

    /// What the guest's kernel has said on its console so far.
    pub fn kernel_log(&self) -> String {
        self.process.kernel_log()
    }

    /// Waits until QEMU has ended by itself.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn wait(&mut self) -> Result<ExitStatus, Error> {
        self.process.wait(PATIENCE)
    }
}

fn boot_error(source: Error, process: &Process) -> Error {
    Error::Boot {
        source: Box::new(source),
        log: process.tails(),
    }
}
