//! The machines that the tests run on. Tests on the same kernel take turns on one machine, which is
//! booted for the first of them and ends with the last that waits for it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use serde_json::Value;
use vhost_user_timer_kit::qemu::{Kernel, KvmHost, environment};
use vhost_user_timer_kit::raw_driver::release_program;
use vhost_user_timer_kit::rounds::{self, Round};

/// The longest that a command may take.
const LIMIT: Duration = Duration::from_secs(600);

/// A machine that a test has for itself.
pub(crate) struct Machine<'a> {
    host: &'a mut KvmHost,
}

impl Machine<'_> {
    /// What a command prints, which must succeed.
    pub(crate) fn output(&mut self, command: &str) -> String {
        let output = self
            .host
            .run(LIMIT, command)
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(output.status, 0, "{command}: {}", output.text);
        output.text
    }

    /// The rounds that the VMM reports.
    pub(crate) fn rounds(&mut self, command: &str) -> Vec<Round> {
        let text = self.output(command);
        rounds::parse(&text).unwrap_or_else(|error| panic!("{command}: {error}\n{text}"))
    }

    /// The line of JSON that a command prints.
    pub(crate) fn answer(&mut self, command: &str) -> Value {
        let text = self.output(command);
        let line = text.lines().find(|line| line.starts_with('{'));
        serde_json::from_str(line.unwrap_or_default())
            .unwrap_or_else(|error| panic!("{command}: {error}: {text}"))
    }

    /// What the kernel of an emulated machine has said.
    pub(crate) fn kernel_log(&self) -> Option<String> {
        self.host.kernel_log()
    }
}

/// The archive of programs, built once for this process.
fn programs() -> &'static PathBuf {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| KvmHost::programs("kvm/programs"))
}

type Shared = Mutex<Option<KvmHost>>;

/// The machine with this kernel that other tests have or wait for, or else a new one.
fn shared(kernel: Kernel) -> Arc<Shared> {
    static MACHINES: Mutex<Vec<(Kernel, Weak<Shared>)>> = Mutex::new(Vec::new());
    let mut machines = MACHINES.lock().unwrap_or_else(PoisonError::into_inner);
    let of_kernel = machines.iter().find(|(k, _)| *k == kernel);
    if let Some(machine) = of_kernel.and_then(|(_, machine)| machine.upgrade()) {
        return machine;
    }
    let machine = Arc::default();
    machines.retain(|(k, _)| *k != kernel);
    machines.push((kernel, Arc::downgrade(&machine)));
    machine
}

/// Runs a test on a machine with this kernel. [`Kernel::Newest`] is this machine, where it is
/// AArch64 and has KVM. Where a machine cannot be emulated the test is skipped, which is reported.
pub(crate) fn on(kernel: Kernel, test: impl FnOnce(&mut Machine<'_>)) {
    let shared = shared(kernel);
    // Where a test failed, its machine was taken out: see below.
    let mut slot = shared.lock().unwrap_or_else(PoisonError::into_inner);
    // Taken out, so that a test that panics ends its machine, with the logs.
    let Some(mut host) = slot.take().or_else(|| boot(kernel)) else {
        return;
    };
    test(&mut Machine { host: &mut host });
    *slot = Some(host);
}

/// This machine, if it is one and any kernel will do, or else an emulated one.
fn boot(kernel: Kernel) -> Option<KvmHost> {
    let own = || (kernel == Kernel::Newest).then(|| KvmHost::own(released));
    own().flatten().or_else(|| {
        let booted = KvmHost::boot(&environment()?, kernel, programs());
        Some(booted.unwrap_or_else(|error| panic!("{error}")))
    })
}

/// Where this machine's own programs are.
fn released() -> PathBuf {
    let (backend, _) = release_program().expect("a backend program");
    backend.parent().expect("a directory").to_owned()
}
