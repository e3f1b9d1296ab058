//! A guest whose clock is this project's backend.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{Environment, Guest, Options, Transport};
use crate::backend_process::BackendProcess;
use crate::raw_driver::release_program;

/// A backend with both of its devices, and a guest that has the clock.
pub struct ClockVm {
    /// Dropped first: it is the backend's frontend.
    pub guest: Guest,
    /// The backend.
    pub backend: BackendProcess,
    clock_socket: PathBuf,
    args: Vec<String>,
    program: PathBuf,
    _directory: TempDir,
}

impl ClockVm {
    /// Starts the backend with these arguments, and boots a guest that has its driver loaded.
    ///
    /// # Panics
    ///
    /// With the logs, where either does not come up.
    pub fn boot(environment: &Environment, transport: Transport, args: &[&str]) -> Self {
        Self::boot_with(environment, args, |options, socket| {
            options.rtc(transport, socket)
        })
    }

    /// [`boot`](Self::boot), with a machine that `machine` changes; it gets the path of the clock's
    /// socket.
    ///
    /// # Panics
    ///
    /// Those of [`boot`](Self::boot).
    pub fn boot_with(
        environment: &Environment,
        args: &[&str],
        machine: impl FnOnce(Options, &Path) -> Options,
    ) -> Self {
        let mut vm = Self::start(environment, args, machine);
        vm.guest.await_ready().unwrap_or_else(|error| {
            panic!("{error}\n{}\n{}", vm.guest.kernel_log(), vm.backend.log())
        });
        vm.load_driver();
        vm
    }

    /// [`boot_with`](Self::boot_with), but returns as soon as QEMU has started.
    ///
    /// # Panics
    ///
    /// Those of [`boot`](Self::boot).
    pub fn start(
        environment: &Environment,
        args: &[&str],
        machine: impl FnOnce(Options, &Path) -> Options,
    ) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let clock_socket = directory.path().join("clock.sock");
        let mut all = vec![format!("--rtc-socket-path={}", clock_socket.display())];
        all.extend(args.iter().map(ToString::to_string));
        let (program, _) = release_program().expect("a backend program");
        let backend = BackendProcess::launch_with_state(&program, &all).expect("a backend");
        let options = machine(Options::default(), &clock_socket);
        let guest = Guest::start(environment, &options)
            .unwrap_or_else(|error| panic!("{error}\n{}", backend.log()));
        ClockVm {
            guest,
            backend,
            clock_socket,
            args: all,
            program,
            _directory: directory,
        }
    }

    /// Starts another backend in place of one that was killed.
    ///
    /// # Panics
    ///
    /// If it does not come up.
    pub fn relaunch_backend(&mut self) {
        // The backend replaces a socket on which nothing listens.
        self.backend
            .relaunch_with_state(&self.program, &self.args)
            .expect("another backend");
    }

    /// Ends QEMU, and boots another guest that has the clock.
    ///
    /// # Panics
    ///
    /// Those of [`boot`](Self::boot).
    pub fn boot_again(&mut self, environment: &Environment, transport: Transport) {
        let options = Options::default().rtc(transport, &self.clock_socket);
        self.guest = Guest::boot(environment, &options)
            .unwrap_or_else(|error| panic!("{error}\n{}", self.backend.log()));
        self.load_driver();
    }

    /// Runs a line of shell in the guest, which must succeed.
    ///
    /// # Panics
    ///
    /// With the logs, where it does not.
    pub fn run(&mut self, command: &str) -> String {
        self.guest.run(command).unwrap_or_else(|error| {
            panic!(
                "{error}\n{}\n{}",
                self.guest.kernel_log(),
                self.backend.log()
            )
        })
    }

    /// Loads the driver.
    ///
    /// # Panics
    ///
    /// If it does not load.
    pub fn load_driver(&mut self) {
        self.run("modprobe virtio_rtc");
    }

    /// The name of the driver's RTC, such as `rtc1`: the machine has another one.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn rtc(&mut self) -> String {
        let clocks = self.run("guest clocks");
        clocks
            .lines()
            .find(|line| line.contains("name=virtio_rtc"))
            .and_then(|line| {
                line.split_whitespace()
                    .find_map(|w| w.strip_prefix("device="))
            })
            .unwrap_or_else(|| panic!("no RTC of the driver's: {clocks}"))
            .to_owned()
    }

    /// How many interrupts the driver has had, of all queues.
    ///
    /// # Panics
    ///
    /// If it has none at all.
    pub fn interrupts(&mut self) -> u64 {
        let device = self.run("basename $(realpath /sys/bus/virtio/drivers/virtio_rtc/virtio*)");
        let table = self.run("cat /proc/interrupts");
        let mine = |line: &&str| {
            let name = line.split_whitespace().next_back().unwrap_or_default();
            name == device || name.starts_with(&format!("{device}-"))
        };
        let rows: Vec<_> = table.lines().filter(mine).collect();
        assert!(!rows.is_empty(), "{device} has no interrupt: {table}");
        let counts = rows.iter().flat_map(|row| {
            let words = row.split_whitespace().skip(1);
            words.map_while(|word| word.parse::<u64>().ok())
        });
        counts.sum()
    }

    /// Checks that neither side has logged a warning.
    ///
    /// # Panics
    ///
    /// If one has.
    pub fn assert_no_complaint(&mut self) {
        let log = self.backend.log();
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
        let log = self.guest.kernel_log();
        // The kernel warns of a module that the distribution did not build and sign.
        let of_any_module = ["loading out-of-tree module", "module verification failed"];
        let complaints = ["WARNING", "BUG", "Oops", "rror", "ailed", "imeout"];
        for line in log.lines() {
            let of_interest = line.contains("virtio_rtc") || line.contains("WARNING");
            let complains = complaints.iter().any(|bad| line.contains(bad));
            let harmless = of_any_module
                .iter()
                .any(|line_of_any| line.contains(line_of_any));
            assert!(!(of_interest && complains) || harmless, "{line}\n{log}");
        }
    }
}
