//! QEMU as a process: watched, and never left behind.

use std::fs::{self, File};
use std::iter;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use super::{Environment, Error, Options};
use crate::backend_process::exit_within;

/// How much of each log is shown.
const TAIL: usize = 30;

/// A running QEMU. Dropping it kills it and reaps it.
#[derive(Debug)]
pub(super) struct Process {
    /// Dropping it ends the watch. It is dropped before the child, which the watch may kill.
    watch: Option<Sender<()>>,
    child: Child,
    directory: TempDir,
}

impl Process {
    /// Starts QEMU with its channels in this directory. Its [life](Self::limit_life) has no limit
    /// yet.
    pub(super) fn start(
        environment: &Environment,
        options: &Options,
        directory: TempDir,
    ) -> Result<Self, Error> {
        let stderr = directory.path().join("stderr");
        let stderr = File::create(&stderr).map_err(Error::system("make QEMU's log"))?;
        let mut command = command(environment, options, directory.path())?;
        let stdin = match &options.stdin {
            // Descriptor 0 goes to this child alone. Any other one without FD_CLOEXEC would also
            // go to children that other threads start.
            Some(path) => {
                let what = format!("connect to {}", path.display());
                Stdio::from(OwnedFd::from(
                    UnixStream::connect(path).map_err(Error::system(what))?,
                ))
            }
            None => Stdio::null(),
        };
        let child = command
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(Error::system(format!(
                "start {}",
                command.get_program().display()
            )))?;
        Ok(Process {
            watch: None,
            child,
            directory,
        })
    }

    /// Has it killed after this time, by a process descriptor: the id may be another process's by
    /// then.
    pub(super) fn limit_life(&mut self, limit: Duration) -> Result<(), Error> {
        let pid = Pid::from_child(&self.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| Error::system("watch QEMU")(error.into()))?;
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("QEMU is killed: its guest has not ended within {limit:?}");
                let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            }
        });
        self.watch = Some(sender);
        Ok(())
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has ended.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<ExitStatus, Error> {
        exit_within(&mut self.child, limit).ok_or_else(|| Error::Late {
            what: "end of QEMU".to_owned(),
            limit,
        })
    }

    /// What the guest's kernel has written to its log.
    pub(super) fn kernel_log(&self) -> String {
        read(&self.directory.path().join("kernel"))
    }

    /// What QEMU has written to stderr.
    pub(super) fn qemu_log(&self) -> String {
        read(&self.directory.path().join("stderr"))
    }

    /// The directory of its channels and logs.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The end of the kernel's log and of QEMU's output.
    pub(super) fn tails(&self) -> String {
        let kernel = self.kernel_log();
        let qemu = self.qemu_log();
        format!(
            "--- the guest's kernel\n{}\n--- QEMU\n{}",
            tail(&kernel),
            tail(&qemu)
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has been reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.tails());
        }
    }
}

/// The command line. The serial port carries the kernel's log alone. The test and the guest talk
/// over virtio-serial, which is faster.
fn command(
    environment: &Environment,
    options: &Options,
    directory: &Path,
) -> Result<Command, Error> {
    let at = |name: &str| directory.join(name).display().to_string();
    let memory = options.memory;
    let program = options.program.clone();
    let mut command = Command::new(program.unwrap_or_else(|| environment.qemu()));
    command
        .envs(options.variables.iter().cloned())
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args([
            "-machine",
            &format!("{},memory-backend=mem", options.machine),
        ])
        .args(["-accel", options.accelerator, "-cpu", &options.cpu])
        .args([
            "-smp",
            &options.vcpus.to_string(),
            "-m",
            &format!("{memory}M"),
        ])
        .args([
            "-object",
            &format!("memory-backend-memfd,id=mem,size={memory}M,share=on"),
        ])
        .arg("-kernel")
        .arg(
            options
                .kernel
                .clone()
                .unwrap_or_else(|| environment.kernel()),
        )
        .arg("-initrd")
        .arg(initrd(environment, options, directory)?)
        .args([
            "-append",
            &format!("console=ttyAMA0 panic=-1 {}", options.kernel_args.join(" ")),
        ])
        .args(["-serial", &format!("file:{}", at("kernel"))])
        .args(["-qmp", &format!("unix:{}", at("qmp"))])
        .args([
            "-chardev",
            &format!("socket,id=commands,path={}", at("commands")),
        ])
        .args(["-device", "virtio-serial-pci"])
        .args(["-device", "virtserialport,chardev=commands,name=commands"])
        .args(&options.args);
    Ok(command)
}

/// The initramfs, which may be several archives in one file.
fn initrd(
    environment: &Environment,
    options: &Options,
    directory: &Path,
) -> Result<PathBuf, Error> {
    if options.archives.is_empty() {
        return Ok(environment.initramfs());
    }
    let path = directory.join("initrd");
    let mut bytes = Vec::new();
    for archive in iter::once(&environment.initramfs()).chain(&options.archives) {
        let what = format!("read {}", archive.display());
        bytes.append(&mut fs::read(archive).map_err(Error::system(what))?);
    }
    fs::write(&path, bytes).map_err(Error::system("write the initramfs"))?;
    Ok(path)
}

fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}
