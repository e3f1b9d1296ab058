//! Where a scenario runs: on the model in this process, or on the released backend.
//!
//! A scenario is written once, over a [`Vm`]: the by-hand client of the contract over any
//! [`Device`]. On the model time passes when [`Vm::pass`] is called and at no other instant, so
//! what is a range on the backend is one value there.

mod asks;
mod binary;
mod model;
mod snapshot;
mod vm;

pub(crate) use asks::one_of_each;
pub(crate) use binary::Binary;
pub(crate) use model::Model;
pub(crate) use snapshot::{Motion, Seen, Snapshot};
pub(crate) use vm::{Clock, PHASES, Vm, vm_body};

use vhost_user_timer_kit::contract::{Client, Queues, configure, phase, restore};

/// A nanosecond is a tick, unless a scenario wants another frequency.
pub(crate) const HZ: u64 = 1_000_000_000;

/// A millisecond, in such ticks.
pub(crate) const MS: u64 = HZ / 1_000;

/// What a scenario needs of a device besides its queues.
pub(crate) trait Device: Queues {
    /// Lets this many ticks of the VM's frequency pass: exactly on the model, at least on the
    /// backend.
    fn pass(&mut self, ticks: u64);

    /// RESET_DEVICE, and the next connection.
    fn reset(&mut self);

    /// The end of the connection, and the next one.
    fn reconnect(&mut self);

    /// GET_VRING_BASE.
    fn stop(&mut self, queue: u16);

    /// Starts a stopped queue again, as new.
    fn start(&mut self, queue: u16);

    /// The time page, as its 64 bytes, where SET_TIME_PAGE named this address.
    fn page(&mut self, address: u64) -> Vec<u8>;

    /// CLOCK_MONOTONIC, ns.
    fn monotonic(&self) -> u64;

    /// CLOCK_REALTIME, ns.
    fn realtime(&self) -> u64;

    /// The model, where it is that.
    fn model(&mut self) -> Option<&mut Model> {
        None
    }

    /// The backend, where it is that.
    fn binary(&mut self) -> Option<&mut Binary> {
        None
    }
}

/// How a backend is started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// `--max-vcpus`.
    pub(crate) max_vcpus: u32,
    /// `--counter-frequency`, where there is one.
    pub(crate) frequency: Option<u64>,
}

/// `--request-queues`.
pub(crate) const REQUEST_QUEUES: u16 = 4;

/// The queues by which the backend is observed; scenarios leave them alone.
const OBSERVERS: [u16; 2] = [REQUEST_QUEUES - 1, REQUEST_QUEUES];

impl Default for Options {
    fn default() -> Self {
        Options {
            max_vcpus: 4096,
            frequency: None,
        }
    }
}

/// What a scenario runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum World {
    Model,
    Binary,
}

impl World {
    /// A VM in NEW.
    pub(crate) fn fresh(self) -> Vm {
        self.with(Options::default())
    }

    /// A VM in NEW, of a backend that is started so.
    pub(crate) fn with(self, options: Options) -> Vm {
        let device: Box<dyn Device> = match self {
            World::Model => Box::new(Model::new(options)),
            World::Binary => Box::new(Binary::launch(options)),
        };
        Vm::new(Client::new(device))
    }

    /// A VM just configured.
    pub(crate) fn paused(self, vcpus: u32) -> Vm {
        let mut vm = self.fresh();
        vm.configure(vcpus);
        vm
    }

    /// A VM of the 32-bit ABI just configured.
    pub(crate) fn paused_arm(self, vcpus: u32) -> Vm {
        let mut vm = self.fresh();
        vm.configure_as(vcpus, 1, 0);
        vm
    }

    /// A VM that runs, with its events so far read.
    pub(crate) fn running(self, vcpus: u32) -> Vm {
        let mut vm = self.paused(vcpus);
        vm.resume();
        vm.events();
        vm
    }

    /// A VM in a restore.
    pub(crate) fn restoring(self, vcpus: u32, flags: u32) -> Vm {
        let mut vm = self.paused(vcpus);
        vm.restore_begin(vcpus, flags);
        vm
    }

    /// A VM just configured with these flags.
    pub(crate) fn configured(self, vcpus: u32, flags: u8) -> Vm {
        let mut vm = self.fresh();
        vm.configure_with(vcpus, flags);
        vm
    }

    /// A VM with CONFIRM that RESUME has armed, with its events so far read.
    pub(crate) fn armed(self, vcpus: u32) -> Vm {
        let mut vm = self.configured(vcpus, configure::CONFIRM);
        vm.resume();
        vm.events();
        vm
    }

    /// A VM with CONFIRM that a restore has armed, in which every vCPU brought this count.
    pub(crate) fn armed_by_restore(self, vcpus: u32, count: u64) -> Vm {
        let mut vm = self.configured(vcpus, configure::CONFIRM);
        vm.restore_begin(vcpus, restore::AUTORUN);
        for vcpu in 0..vcpus {
            vm.restored(vcpu, count);
        }
        vm
    }

    /// A VM in this phase.
    pub(crate) fn in_phase(self, wanted: u32, vcpus: u32) -> Vm {
        match wanted {
            phase::NEW => self.fresh(),
            phase::PAUSED => self.paused(vcpus),
            phase::RUNNING => self.running(vcpus),
            phase::ARMED => self.armed(vcpus),
            _ => self.restoring(vcpus, 0),
        }
    }
}
