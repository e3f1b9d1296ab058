//! The machine that the tests run on: booted for the first of them, it ends with the last. They
//! take turns.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use vhost_user_timer_kit::qemu::{Guest, KvmHost, Options, PATIENCE, environment};

type Shared = Mutex<Option<Machine>>;

/// A booted Debian, with what `make install PREFIX=/usr` installs.
pub(crate) struct Machine(Guest);

impl Machine {
    fn boot() -> Option<Self> {
        let environment = environment()?;
        let archives = KvmHost::programs("system/programs");
        let options = Options::default()
            .memory(1024)
            .kernel_arg("rdinit=/system-init quiet");
        let archives = archives.to_str().expect("paths").lines();
        let options = archives.fold(options, |options, path| options.archive(path.into()));
        let booted = Guest::boot(&environment, &options);
        let mut machine = Machine(booted.unwrap_or_else(|error| panic!("{error}")));
        machine.output("apparmor_parser -r /etc/apparmor.d/usr.bin.vhost-user-timer");
        Some(machine)
    }

    /// What a command prints, and whether it succeeds.
    pub(crate) fn run(&mut self, command: &str) -> (bool, String) {
        let output = self.0.run_within(PATIENCE, command);
        let output = output.unwrap_or_else(|error| panic!("{error}"));
        (output.status == 0, output.text.trim().to_owned())
    }

    /// What a command prints, which must succeed.
    #[track_caller]
    pub(crate) fn output(&mut self, command: &str) -> String {
        let (succeeded, text) = self.run(command);
        assert!(succeeded, "{command}: {text}");
        text
    }

    /// Waits until a command prints this.
    #[track_caller]
    pub(crate) fn until(&mut self, command: &str, wanted: &str) {
        let began = Instant::now();
        loop {
            let (_, printed) = self.run(command);
            if printed == wanted {
                return;
            }
            let late = began.elapsed() > PATIENCE;
            assert!(!late, "{command}: {printed:?}, and not {wanted:?}");
        }
    }

    /// The lines of the journal that these options of journalctl choose, of all logged before.
    #[track_caller]
    pub(crate) fn journal(&mut self, options: &str) -> String {
        self.output(&format!("journalctl --sync && journalctl -o cat {options}"))
    }
}

/// Runs a test on the machine. Where none can be emulated the test is skipped, which is reported.
/// AppArmor has denied nothing, whatever the test did.
pub(crate) fn on(test: impl FnOnce(&mut Machine)) {
    let shared = shared();
    // Where a test failed, its machine was taken out: see below.
    let mut slot = shared.lock().unwrap_or_else(PoisonError::into_inner);
    // Taken out, so that a test that panics ends its machine, with the logs.
    let Some(mut machine) = slot.take().or_else(Machine::boot) else {
        return;
    };
    test(&mut machine);
    let denied = machine.output("dmesg | grep 'apparmor=\"DENIED\"' || true");
    assert_eq!(denied, "");
    *slot = Some(machine);
}

/// The machine that other tests have or wait for, or else a new one.
fn shared() -> Arc<Shared> {
    static MACHINE: Mutex<Weak<Shared>> = Mutex::new(Weak::new());
    let mut machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    machine.upgrade().unwrap_or_else(|| {
        let shared = Arc::default();
        *machine = Arc::downgrade(&shared);
        shared
    })
}
