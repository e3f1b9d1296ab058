//! A real guest under QEMU, for end-to-end tests.
//!
//! - [`environment`]: QEMU and what it boots, or that this test is skipped;
//! - [`Guest`]: a running guest that takes commands, with its [`Options`];
//! - [`KvmHost`]: one that has a real KVM, and the programs that use it;
//! - [`Qmp`]: QEMU's own control channel;
//! - [`TimerVm`]: a guest whose vCPUs' timers this project's backend keeps;
//! - [`Guest::migrate_to`]: its migration to another QEMU;
//! - [`Guest::witness`]: what its counter and timers showed on each vCPU;
//! - [`Bracket`]: a reading of a guest's clock, between two of the host's.
//!
//! Everything that waits has a limit and fails past it. A guest that is dropped is killed, and
//! so is one that outlives its limit. Where a test fails, the end of the kernel's log and of
//! what QEMU said is printed.
//!
//! `tests/qemu/environment` makes what this runs.

mod bracket;
mod channel;
mod clock_vm;
mod error;
mod guest;
mod kvm_host;
mod migration;
mod options;
mod process;
mod qmp;
mod timer_vm;
mod witness;

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

pub use bracket::{Bracket, HostClock};
pub use clock_vm::ClockVm;
pub use error::Error;
pub use guest::{Guest, Output};
pub use kvm_host::{Kernel, KvmHost};
pub use options::{Options, Transport};
pub use qmp::{Event, Qmp, Status};
pub use timer_vm::{Link, Shape, TimerVm, UNHURRIED};
pub use witness::Seen;

/// How long an answer or an event of QEMU may take, and a command in the guest: many times what
/// they take on a busy machine. Only where something is broken does a test wait for so long.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// QEMU and what it boots, as `tests/qemu/environment` made them.
#[derive(Clone, Debug)]
pub struct Environment {
    directory: PathBuf,
}

impl Environment {
    /// The environment, or why there is none.
    ///
    /// # Errors
    ///
    /// [`Error::NoEnvironment`], with the reason that `tests/qemu/environment` had not to make it.
    pub fn find() -> Result<Self, Error> {
        let cache = match std::env::var_os("XDG_CACHE_HOME") {
            Some(cache) if !cache.is_empty() => cache.into(),
            _ => PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"),
        };
        let cache = cache.join("vhost-user-timer/qemu");
        // The link is to what is whole: it is removed before anything there is rebuilt.
        if let Ok(directory) = fs::canonicalize(cache.join("ready")) {
            return Ok(Environment { directory });
        }
        let reason = match fs::read_to_string(cache.join("skipped")) {
            Ok(reason) => reason.trim().to_owned(),
            Err(_) => "make qemu-environment makes it".to_owned(),
        };
        Err(Error::NoEnvironment { cache, reason })
    }

    /// The program to run: QEMU itself, with what it needs.
    pub fn qemu(&self) -> PathBuf {
        self.directory.join("qemu-system-aarch64")
    }

    /// QEMU with the device `vhost-user-timer`, which needs [`timer_library`] in the variable
    /// [`LIBRARY_VARIABLE`]. The variable `VHOST_USER_TIMER_QEMU` names another program.
    pub fn patched_qemu(&self) -> PathBuf {
        std::env::var_os("VHOST_USER_TIMER_QEMU").map_or_else(
            || {
                self.directory
                    .with_file_name("patched")
                    .join("qemu-system-aarch64")
            },
            PathBuf::from,
        )
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("Image")
    }

    /// The guest's initramfs: busybox, the modules and the guest's program.
    pub fn initramfs(&self) -> PathBuf {
        self.directory.join("guest.cpio")
    }

    /// Another one, to follow that: chronyd and chronyc.
    pub fn chrony(&self) -> PathBuf {
        self.directory.join("guest-chrony.cpio")
    }

    /// Debian 12's kernel, Linux 6.1, and the modules that it needs to take commands.
    pub fn bookworm(&self) -> (PathBuf, PathBuf) {
        let in_image = |name| self.directory.join(name);
        (in_image("Image-bookworm"), in_image("guest-bookworm.cpio"))
    }

    /// Where all that is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Names the directory of the `libvhost_user_timer.so` that [`Environment::patched_qemu`] loads.
pub const LIBRARY_VARIABLE: &str = "VHOST_USER_TIMER_LIB";

/// The directory of the library for C: as [`LIBRARY_VARIABLE`] says, else that of the release build
/// beside this program, else that of this build.
///
/// # Errors
///
/// If it has not been built.
pub fn timer_library() -> Result<PathBuf, Error> {
    const NAME: &str = "libvhost_user_timer.so";
    if let Some(directory) = std::env::var_os(LIBRARY_VARIABLE) {
        return Ok(directory.into());
    }
    let program = std::env::current_exe().map_err(Error::system("find this program"))?;
    // target/PROFILE/PROGRAM, or target/PROFILE/deps/PROGRAM.
    let builds = program.ancestors().skip(1).take(3);
    let releases = builds.clone().map(|directory| directory.join("release"));
    releases
        .chain(builds.map(Path::to_owned))
        .find(|directory| directory.join(NAME).is_file())
        .ok_or_else(|| {
            let missing = io::Error::new(
                io::ErrorKind::NotFound,
                "build it with `cargo build --release --package vhost-user-timer-capi`",
            );
            Error::system(format!("find {NAME} near {}", program.display()))(missing)
        })
}

/// The environment, or `None` where the test is to return: this machine cannot have one, and
/// that has been said.
///
/// # Panics
///
/// Without an environment where the variable `CI` is set: there, a skip is a failure.
pub fn environment() -> Option<Environment> {
    match Environment::find() {
        Ok(environment) => Some(environment),
        Err(error) => {
            let is_ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty());
            assert!(!is_ci, "{error}; with CI set, that is a failure");
            eprintln!("skipped: {error}");
            None
        }
    }
}
