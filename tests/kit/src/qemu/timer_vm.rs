//! A guest whose vCPUs' timers this project's backend keeps, under a QEMU with this project's
//! device.

use std::mem;
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use super::{
    Environment, Error, Guest, LIBRARY_VARIABLE, Options, PATIENCE, Transport, timer_library,
};
use crate::backend_process::{BackendProcess, Devices, Launch};
use crate::raw_driver::release_program;

/// The device, as QEMU's object tree has it.
const DEVICE: &str = "/machine/peripheral/timer";

/// The device's time-out where the backend answers, however busy the machine is. It is less than
/// [`PATIENCE`], so that QEMU says what did not come.
pub const UNHURRIED: &str = "timeout=60000";

/// How QEMU reaches the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// By a character device that is a socket (`chardev=`).
    Chardev,
    /// By a connected descriptor (`fd=`).
    Descriptor,
    /// QEMU launches the backend, with a state file (`backend=`, `state-file=`).
    Program,
}

impl Link {
    /// All of them.
    pub const ALL: [Self; 3] = [Link::Chardev, Link::Descriptor, Link::Program];
}

/// What a [`TimerVm`] is to be: by default four vCPUs, a chardev, and no clock device.
#[derive(Clone, Debug)]
pub struct Shape {
    link: Link,
    properties: String,
    options: Options,
    has_clock: bool,
    backend_args: Vec<String>,
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            link: Link::Chardev,
            properties: String::new(),
            options: Options::default().vcpus("cortex-a72", 4),
            has_clock: false,
            backend_args: Vec::new(),
        }
    }
}

impl Shape {
    /// With a backend that is reached in this way.
    #[must_use]
    pub fn link(mut self, link: Link) -> Self {
        self.link = link;
        self
    }

    /// With this property of the device. Without `timeout=`, it is [`UNHURRIED`].
    #[must_use]
    pub fn property(mut self, property: &str) -> Self {
        self.properties.push(',');
        self.properties.push_str(property);
        self
    }

    /// With a machine that `change` changes.
    #[must_use]
    pub fn machine(mut self, change: impl FnOnce(Options) -> Options) -> Self {
        self.options = change(self.options);
        self
    }

    /// With the guest's clock beside the timers, by the same backend, if QEMU does not launch that.
    #[must_use]
    pub fn clock(mut self) -> Self {
        self.has_clock = true;
        self
    }

    /// With one more argument for the backend, if it is not QEMU that launches it.
    #[must_use]
    pub fn backend_arg(mut self, arg: &str) -> Self {
        self.backend_args.push(arg.to_owned());
        self
    }
}

/// A guest, and the backend that keeps its timers.
pub struct TimerVm {
    /// Dropped first: it is the backend's frontend.
    pub guest: Guest,
    /// The backend, unless QEMU has launched it.
    pub backend: Option<BackendProcess>,
    environment: Environment,
    shape: Shape,
    _directory: TempDir,
}

impl TimerVm {
    /// Starts a backend, and boots a guest.
    ///
    /// # Panics
    ///
    /// With the logs, where either does not come up.
    pub fn boot(environment: &Environment, shape: &Shape) -> Self {
        let mut vm = Self::start(environment, shape);
        if let Err(error) = vm.guest.await_ready() {
            panic!("{error}\n{}", vm.logs());
        }
        vm
    }

    /// [`boot`](Self::boot), but returns as soon as QEMU has started.
    ///
    /// # Panics
    ///
    /// Those of [`boot`](Self::boot).
    pub fn start(environment: &Environment, shape: &Shape) -> Self {
        Self::launch(environment, shape, shape.options.clone())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Another QEMU and another backend of this shape, for a guest that migrates there.
    ///
    /// # Panics
    ///
    /// Those of [`boot`](Self::boot).
    pub fn incoming(environment: &Environment, shape: &Shape) -> Self {
        Self::launch(environment, shape, shape.options.clone().incoming())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Starts a backend, unless QEMU is to launch it, and QEMU with this machine.
    fn launch(environment: &Environment, shape: &Shape, options: Options) -> Result<Self, Error> {
        let directory = tempfile::tempdir().expect("a directory");
        let (program, _) = release_program().expect("a backend program");
        let backend = (shape.link != Link::Program).then(|| {
            let devices = match shape.has_clock {
                true => Devices::TimerAndClock,
                false => Devices::Timer,
            };
            let launch = Launch::new(&program, devices).args(&shape.backend_args);
            launch.with_state().start().expect("a backend")
        });
        let mut options = options
            .program(environment.patched_qemu())
            .variable(LIBRARY_VARIABLE, timer_library()?);
        let mut device = "vhost-user-timer,id=timer".to_owned();
        match &backend {
            Some(backend) => {
                let socket = backend.socket_path();
                if shape.link == Link::Descriptor {
                    options = options.stdin(socket);
                    device += ",fd=0";
                } else {
                    let chardev = format!("socket,id=timer,path={}", socket.display());
                    options = options.arg("-chardev").arg(chardev);
                    device += ",chardev=timer";
                }
                if shape.has_clock {
                    options = options.rtc(Transport::Pci, &backend.clock_path());
                }
            }
            None => {
                let state = directory.path().join("state");
                device += &format!(
                    ",backend={},state-file={}",
                    program.display(),
                    state.display()
                );
            }
        }
        device += &shape.properties;
        if !shape.properties.contains("timeout=") {
            device = format!("{device},{UNHURRIED}");
        }
        let guest = Guest::start(environment, &options.arg("-device").arg(device))?;
        Ok(TimerVm {
            guest,
            backend,
            environment: environment.clone(),
            shape: shape.clone(),
            _directory: directory,
        })
    }

    /// Migrates the guest to another QEMU with another backend, which this value holds afterwards.
    /// Returns the source, whose guest does not run any more.
    ///
    /// # Panics
    ///
    /// With the logs, where it does not succeed.
    pub fn migrate(&mut self) -> TimerVm {
        let destination = Self::incoming(&self.environment, &self.shape);
        match self.migrate_to(destination) {
            Ok(source) => source,
            Err(error) => panic!("{error}\n{}", self.logs()),
        }
    }

    /// [`migrate`](Self::migrate), to this one.
    ///
    /// # Errors
    ///
    /// [`Error::Migration`] where it does not succeed: this value is the same as before.
    pub fn migrate_to(&mut self, mut destination: TimerVm) -> Result<TimerVm, Error> {
        self.guest.send_to(&mut destination.guest)?;
        Ok(mem::replace(self, destination))
    }

    /// Runs a line of shell in the guest, which must succeed.
    ///
    /// # Panics
    ///
    /// With the logs, where it does not.
    pub fn run(&mut self, command: &str) -> String {
        match self.guest.run(command) {
            Ok(text) => text,
            Err(error) => panic!("{error}\n{}", self.logs()),
        }
    }

    /// A property of the device. QEMU itself waits for the backend's answer for a second.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if QEMU cannot say.
    pub fn property(&mut self, name: &str) -> Result<Value, Error> {
        let began = Instant::now();
        loop {
            match self.guest.qmp().property(DEVICE, name) {
                Err(Error::Refused { description, .. })
                    if description.ends_with("in time") && began.elapsed() < PATIENCE => {}
                answer => return answer,
            }
        }
    }

    /// A number that the device has as a property, such as `cntvoff`.
    ///
    /// # Panics
    ///
    /// If it has none by this name.
    pub fn number(&mut self, property: &str) -> u64 {
        let value = self.property(property);
        let value = value.unwrap_or_else(|error| panic!("{error}\n{}", self.logs()));
        value
            .as_u64()
            .unwrap_or_else(|| panic!("{property} is {value}"))
    }

    /// The phase, as the device reports it.
    ///
    /// # Errors
    ///
    /// Those of [`property`](Self::property).
    pub fn phase(&mut self) -> Result<String, Error> {
        let value = self.property("phase")?;
        Ok(value.as_str().unwrap_or_default().to_owned())
    }

    /// What QEMU and the backend have logged.
    pub fn logs(&self) -> String {
        let backend = self.backend.as_ref().map(BackendProcess::log);
        format!(
            "--- QEMU\n{}\n--- the backend\n{}",
            self.guest.qemu_log(),
            backend.unwrap_or_default()
        )
    }
}
