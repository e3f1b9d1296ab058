//! A VM with its backend, which can be killed, hung and started again.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};
use vhost_user_timer_kit::backend_process::BackendProcess;
use vhost_user_timer_kit::qemu::{Environment, Guest, Link, Shape, TimerVm};
use vhost_user_timer_kit::raw_driver::release_program;

/// How a backend is launched, and so what outlives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// By QEMU, which starts it again.
    Launched,
    /// By a supervisor, which starts it again.
    Supervised,
    /// By a supervisor, which starts another one without its state file.
    Forgotten,
    /// By nobody who starts it again.
    Lonely,
}

impl Kind {
    pub(crate) const ALL: [Kind; 4] = [
        Kind::Launched,
        Kind::Supervised,
        Kind::Forgotten,
        Kind::Lonely,
    ];

    /// `shape`, with a backend of this kind.
    fn shape(self, shape: Shape) -> Shape {
        match self {
            Kind::Launched => shape.link(Link::Program).property("reconnect=on"),
            Kind::Supervised | Kind::Forgotten => {
                shape.link(Link::Chardev).property("reconnect=on")
            }
            Kind::Lonely => shape.link(Link::Chardev),
        }
    }
}

/// See the module.
pub(crate) struct Side {
    vm: TimerVm,
    pub(crate) kind: Kind,
    /// The backend that QEMU launched.
    child: Option<Pid>,
    is_killed: bool,
    /// The supervisor has started another one.
    is_replaced: bool,
}

impl Side {
    /// Starts a backend of this kind, and a QEMU that is connected to it.
    pub(crate) fn start(environment: &Environment, shape: Shape, kind: Kind) -> Self {
        let vm = TimerVm::start(environment, &kind.shape(shape));
        let mut side = Side {
            vm,
            kind,
            child: None,
            is_killed: false,
            is_replaced: false,
        };
        side.find_backend();
        side
    }

    pub(crate) fn guest(&mut self) -> &mut Guest {
        &mut self.vm.guest
    }

    /// What QEMU and the backend have logged.
    pub(crate) fn logs(&self) -> String {
        self.vm.logs()
    }

    /// Notes which process is the backend now, for a signal that must not wait for QEMU.
    pub(crate) fn find_backend(&mut self) {
        if self.kind == Kind::Launched {
            let id = self.vm.number("backend-pid");
            self.child = id.try_into().ok().and_then(Pid::from_raw);
        }
    }

    fn backend(&mut self) -> Option<&mut BackendProcess> {
        self.vm.backend.as_mut()
    }

    /// Kills the backend.
    pub(crate) fn kill(&mut self) {
        (self.is_killed, self.is_replaced) = (true, false);
        match self.backend() {
            Some(backend) => drop(backend.kill()),
            None => self.signal(Signal::KILL),
        }
    }

    /// Sends the backend a signal.
    pub(crate) fn signal(&mut self, signal: Signal) {
        if let Some(backend) = self.backend() {
            backend.signal(signal);
        } else if let Some(child) = self.child {
            // Fails where it has ended, and QEMU has noticed.
            let _ = kill_process(child, signal);
        }
    }

    /// Does what the supervisor does, if there is one, for a backend that has ended.
    pub(crate) fn supervise(&mut self) {
        let has_supervisor = [Kind::Supervised, Kind::Forgotten].contains(&self.kind);
        if !has_supervisor || !self.is_killed || self.is_replaced {
            return;
        }
        let forgets = self.kind == Kind::Forgotten;
        let (program, _) = release_program().expect("a backend program");
        if let Some(backend) = self.backend() {
            if forgets {
                fs::remove_file(backend.directory().join("state")).expect("its state file");
            }
            let started = backend.relaunch_with_state(&program, &[""; 0]);
            started.expect("another backend");
        }
        self.is_replaced = true;
    }

    /// Whether the VM has no backend.
    pub(crate) fn has_no_backend(&self) -> bool {
        self.is_killed && self.kind == Kind::Lonely
    }

    /// Whether what the backend knew is lost.
    pub(crate) fn has_lost_its_backend(&self) -> bool {
        self.is_killed && [Kind::Forgotten, Kind::Lonely].contains(&self.kind)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // A child that hangs would outlive QEMU.
        self.signal(Signal::CONT);
    }
}
