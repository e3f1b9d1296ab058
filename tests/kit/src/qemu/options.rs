//! What kind of machine a guest gets.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the guest reaches a virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// As a PCI device.
    Pci,
    /// By virtio-mmio.
    Mmio,
}

impl Transport {
    /// Both, for tests that hold over each.
    pub const ALL: [Self; 2] = [Transport::Pci, Transport::Mmio];

    /// The name of QEMU's device for it: `virtio-rng-pci` or `virtio-rng-device`.
    pub fn device(self, name: &str) -> String {
        match self {
            Transport::Pci => format!("{name}-pci"),
            // The vhost-user devices have no suffix there.
            Transport::Mmio if name.starts_with("vhost-user-") => name.to_owned(),
            Transport::Mmio => format!("{name}-device"),
        }
    }
}

/// How long a guest may take to boot. It takes seconds of CPU time, and a minute with systemd.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// The longest life of a QEMU whose test does not end, although each of its waits has a limit.
const LIFE_LIMIT: Duration = Duration::from_secs(3600);

/// The machine that a [`Guest`](super::Guest) gets, by default with no device but its console.
///
/// Two vCPUs of a kind that TCG emulates fast (`max` takes almost twice as long to boot, for its
/// pointer authentication), and memory that a backend can share.
#[derive(Clone, Debug)]
pub struct Options {
    pub(super) program: Option<PathBuf>,
    pub(super) variables: Vec<(OsString, OsString)>,
    pub(super) stdin: Option<PathBuf>,
    pub(super) args: Vec<OsString>,
    pub(super) kernel_args: Vec<String>,
    pub(super) accelerator: &'static str,
    pub(super) machine: String,
    pub(super) cpu: String,
    pub(super) vcpus: u32,
    pub(super) memory: u32,
    pub(super) kernel: Option<PathBuf>,
    pub(super) archives: Vec<PathBuf>,
    pub(super) boot_limit: Duration,
    pub(super) life_limit: Duration,
    rtcs: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            program: None,
            variables: Vec::new(),
            stdin: None,
            args: Vec::new(),
            kernel_args: Vec::new(),
            accelerator: "tcg,thread=multi",
            machine: "virt".to_owned(),
            cpu: "cortex-a72".to_owned(),
            vcpus: 2,
            memory: 256,
            kernel: None,
            archives: Vec::new(),
            boot_limit: BOOT_LIMIT,
            life_limit: LIFE_LIMIT,
            rtcs: 0,
        }
    }
}

impl Options {
    /// With a virtio-rtc device whose backend listens at this path.
    #[must_use]
    pub fn rtc(mut self, transport: Transport, socket: &Path) -> Self {
        let id = format!("rtc{}", self.rtcs);
        self.rtcs += 1;
        let mut chardev = OsString::from(format!("socket,id={id},path="));
        chardev.push(socket);
        let device = transport.device("vhost-user-rtc");
        self.args.extend(["-chardev".into(), chardev]);
        self.arg("-device").arg(format!("{device},chardev={id}"))
    }

    /// With a device of QEMU's own, such as `virtio-rng`.
    #[must_use]
    pub fn device(self, transport: Transport, name: &str) -> Self {
        self.arg("-device").arg(transport.device(name))
    }

    /// With another QEMU than the environment's stock one.
    #[must_use]
    pub fn program(mut self, program: PathBuf) -> Self {
        self.program = Some(program);
        self
    }

    /// With this variable in QEMU's environment.
    #[must_use]
    pub fn variable(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// With a connection to this socket as QEMU's descriptor 0.
    #[must_use]
    pub fn stdin(mut self, socket: &Path) -> Self {
        self.stdin = Some(socket.to_owned());
        self
    }

    /// For a guest that migrates to this QEMU, or that is loaded from a file.
    #[must_use]
    pub fn incoming(self) -> Self {
        self.arg("-incoming").arg("defer")
    }

    /// With one more argument for QEMU.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// With one more argument for the guest's kernel.
    #[must_use]
    pub fn kernel_arg(mut self, arg: impl Into<String>) -> Self {
        self.kernel_args.push(arg.into());
        self
    }

    /// With another kind of machine, such as `virt,virtualization=on`.
    #[must_use]
    pub fn machine(mut self, machine: impl Into<String>) -> Self {
        self.machine = machine.into();
        self
    }

    /// With other vCPUs: their kind and number.
    #[must_use]
    pub fn vcpus(mut self, kind: impl Into<String>, number: u32) -> Self {
        self.cpu = kind.into();
        self.vcpus = number;
        self
    }

    /// On this machine's KVM, with so many of its vCPUs and its interrupt controller.
    #[must_use]
    pub fn kvm(mut self, vcpus: u32) -> Self {
        self.accelerator = "kvm";
        self.machine("virt,gic-version=host").vcpus("host", vcpus)
    }

    /// With this much memory, MiB.
    #[must_use]
    pub fn memory(mut self, mebibytes: u32) -> Self {
        self.memory = mebibytes;
        self
    }

    /// With another kernel than the environment's newest.
    #[must_use]
    pub fn kernel(mut self, image: PathBuf) -> Self {
        self.kernel = Some(image);
        self
    }

    /// With the files of one more initramfs, which replace earlier ones of the same name.
    #[must_use]
    pub fn archive(mut self, path: PathBuf) -> Self {
        self.archives.push(path);
        self
    }

    /// With another time limit for booting.
    #[must_use]
    pub fn boot_limit(mut self, limit: Duration) -> Self {
        self.boot_limit = limit;
        self
    }

    /// With another time limit for its whole life, after which it is killed.
    #[must_use]
    pub fn life_limit(mut self, limit: Duration) -> Self {
        self.life_limit = limit;
        self
    }
}
