//! A Linux for AArch64 whose /dev/kvm is real, with the backend and a VMM in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use super::{Environment, Error, Guest, Options, Output};

/// The memory of an emulated machine, MiB.
const MEMORY: u32 = 1024;

/// Which kernel an emulated machine boots, and how its KVM is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The environment's newest, as it sets itself up: VHE, where the host runs at EL2.
    Newest,
    /// The newest with `kvm-arm.mode=nvhe`: the host runs at EL1, and a part of KVM at EL2.
    Nvhe,
    /// The newest with `kvm-arm.mode=protected`: the part of KVM at EL2 does not trust the host
    /// (pKVM).
    Protected,
    /// The newest with `kvm-arm.mode=nested`: a guest may have EL2, and be a hypervisor itself.
    Nested,
    /// Debian 12's, Linux 6.1: without an ioctl for the counter's offset.
    Bookworm,
}

impl Kernel {
    /// The machine that boots it. TCG emulates EL2 and a GICv3 only where it is asked to.
    fn options(self, environment: &Environment) -> Options {
        let options = Options::default()
            .machine("virt,virtualization=on,gic-version=3")
            // LPA2's page tables of five levels, at two stages, double the time that TCG takes.
            .vcpus("max,lpa2=off", 2);
        match self {
            Kernel::Newest => options,
            Kernel::Nvhe => options.kernel_arg("kvm-arm.mode=nvhe"),
            Kernel::Protected => options.kernel_arg("kvm-arm.mode=protected"),
            Kernel::Nested => options.kernel_arg("kvm-arm.mode=nested"),
            Kernel::Bookworm => {
                let (kernel, modules) = environment.bookworm();
                options.kernel(kernel).archive(modules)
            }
        }
    }
}

/// A host with a real KVM that takes commands: an emulated machine, or this machine.
#[derive(Debug)]
pub enum KvmHost {
    /// An emulated machine. Dropping it ends it.
    Emulated(Box<Guest>),
    /// This machine, where the programs are in this directory.
    Own(PathBuf),
}

impl KvmHost {
    /// Runs a script that builds programs for a machine, a path below the caller's package, and
    /// returns the archive that it names.
    ///
    /// # Panics
    ///
    /// If it fails.
    pub fn programs(script: &str) -> PathBuf {
        let package = env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test");
        let script = Path::new(&package).join(script);
        let output = Command::new(&script)
            .stderr(Stdio::inherit())
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", script.display()));
        assert!(
            output.status.success(),
            "{}: {}",
            script.display(),
            output.status
        );
        String::from_utf8(output.stdout)
            .expect("a path")
            .trim()
            .into()
    }

    /// Boots a machine, with the programs of this archive in its /bin.
    ///
    /// # Errors
    ///
    /// [`Error::Boot`], with the logs, if it does not come up.
    pub fn boot(environment: &Environment, kernel: Kernel, programs: &Path) -> Result<Self, Error> {
        Self::boot_with(environment, kernel, programs, MEMORY)
    }

    /// [`boot`](Self::boot), with this much memory, MiB.
    ///
    /// # Errors
    ///
    /// Those of [`boot`](Self::boot).
    pub fn boot_with(
        environment: &Environment,
        kernel: Kernel,
        programs: &Path,
        memory: u32,
    ) -> Result<Self, Error> {
        let options = kernel.options(environment).archive(programs.to_owned());
        let options = options.memory(memory);
        let guest = Guest::boot(environment, &options)?;
        Ok(KvmHost::Emulated(Box::new(guest)))
    }

    /// This machine, where it is one: AArch64, with a /dev/kvm that this user may open.
    pub fn own(programs: impl FnOnce() -> PathBuf) -> Option<Self> {
        let kvm = || {
            fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
        };
        let is_one = cfg!(target_arch = "aarch64") && kvm().is_ok();
        is_one.then(|| KvmHost::Own(programs()))
    }

    /// Runs a line of shell, which may fail. Returns its output.
    ///
    /// # Errors
    ///
    /// If it has not ended within the limit, or the machine has ended.
    pub fn run(&mut self, limit: Duration, command: &str) -> Result<Output, Error> {
        match self {
            KvmHost::Emulated(guest) => guest.run_within(limit, command),
            KvmHost::Own(programs) => run_here(programs, limit, command),
        }
    }

    /// What an emulated machine's kernel has said on its console so far.
    pub fn kernel_log(&self) -> Option<String> {
        match self {
            KvmHost::Emulated(guest) => Some(guest.kernel_log()),
            KvmHost::Own(_) => None,
        }
    }
}

/// As a [`Guest`] does: both outputs together, and an end within the limit.
fn run_here(programs: &Path, limit: Duration, command: &str) -> Result<Output, Error> {
    // What timeout(1) exits with where the command did not end.
    const LATE: i32 = 124;
    let before = env::var_os("PATH").unwrap_or_default();
    let paths = [programs.to_owned()]
        .into_iter()
        .chain(env::split_paths(&before));
    let path = env::join_paths(paths).map_err(|error| Error::Malformed {
        what: "a directory of programs",
        text: error.to_string(),
    })?;
    let output = Command::new("timeout")
        .args(["--kill-after=1", &limit.as_secs().to_string()])
        .args(["sh", "-c", &format!("exec 2>&1; {command}")])
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .map_err(Error::system(format!("run `{command}`")))?;
    match output.status.code() {
        Some(LATE) => Err(Error::Late {
            what: format!("end of `{command}`"),
            limit,
        }),
        code => Ok(Output {
            // A signal's number is not of interest here.
            status: code
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(u8::MAX),
            text: String::from_utf8_lossy(&output.stdout).into_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_runs_a_command_as_an_emulated_one_does() {
        let mut own = KvmHost::Own("/nowhere".into());
        let second = Duration::from_secs(1);
        let output = own.run(30 * second, "echo a; echo b >&2; exit 3").unwrap();
        assert_eq!((output.status, output.text.as_str()), (3, "a\nb\n"));
        let output = own.run(30 * second, "echo ${PATH%%:*}").unwrap();
        assert_eq!(output.text, "/nowhere\n");
        let error = own.run(second, "sleep 60").unwrap_err().to_string();
        assert_eq!(error, "No end of `sleep 60` within 1s");
    }
}
