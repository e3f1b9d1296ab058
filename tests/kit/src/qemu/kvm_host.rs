//! A Linux for AArch64 whose /dev/kvm is real, with the backend and a VMM in it.

use std::path::Path;
use std::time::Duration;

use super::{Environment, Error, Guest, Options, Output};

/// Which kernel, and how its KVM is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The newest, with its default: VHE, where the host runs at EL2 itself.
    Vhe,
    /// The newest with `kvm-arm.mode=nvhe`: the host runs at EL1, and a part of KVM at EL2.
    Nvhe,
    /// The newest with `kvm-arm.mode=protected`: KVM is kept apart from the host (pKVM).
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
            .vcpus("max", 2)
            .memory(1024)
            // Booting takes longer with `max`, and the machine is often shared.
            .boot_limit(Duration::from_secs(300))
            .life_limit(Duration::from_secs(1800));
        match self {
            Kernel::Vhe => options,
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

/// A machine with such a kernel, which takes commands. Dropping it ends it.
#[derive(Debug)]
pub struct KvmHost {
    guest: Guest,
}

impl KvmHost {
    /// Boots one, with the programs of this archive in its /bin.
    ///
    /// # Errors
    ///
    /// [`Error::Boot`], with the logs, if it does not come up.
    pub fn boot(environment: &Environment, kernel: Kernel, programs: &Path) -> Result<Self, Error> {
        let options = kernel.options(environment).archive(programs.to_owned());
        let guest = Guest::boot(environment, &options)?;
        Ok(KvmHost { guest })
    }

    /// Runs a line of shell, which may fail. Returns its output.
    ///
    /// # Errors
    ///
    /// If it has not ended within the limit, or the machine has ended.
    pub fn run(&mut self, limit: Duration, command: &str) -> Result<Output, Error> {
        self.guest.run_within(limit, command)
    }

    /// What the kernel has said on its console so far.
    pub fn kernel_log(&self) -> String {
        self.guest.kernel_log()
    }
}
