//! A real guest under QEMU, for end-to-end tests.
//!
//! - [`environment`]: QEMU and what it boots, or that this test is skipped;
//! - [`Guest`]: a running guest that takes commands, with its [`Options`];
//! - [`KvmHost`]: one that has a real KVM, and the programs that use it;
//! - [`Qmp`]: QEMU's own control channel;
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
mod witness;

use std::fs;
use std::path::{Path, PathBuf};

pub use bracket::{Bracket, HostClock};
pub use clock_vm::ClockVm;
pub use error::Error;
pub use guest::{Guest, Output};
pub use kvm_host::{Kernel, KvmHost};
pub use options::{Options, Transport};
pub use qmp::{Event, Qmp, Status};
pub use witness::Seen;

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
