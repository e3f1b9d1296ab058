//! A vring whose descriptors cannot block the worker.
//!
//! `vhost-user-backend` reads the kick descriptor and writes the call descriptor as they come.
//! A frontend that sends blocking ones, or a full pipe, would hold the worker for good, and
//! with it every other ring. Here they are made non-blocking when they arrive. The rest is the
//! crate's [`VringMutex`].

use std::fs::File;
use std::io;
use std::sync::MutexGuard;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// The memory that a frontend shares.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// See the module.
#[derive(Clone)]
pub struct Vring(VringMutex<Memory>);

fn nonblocking(file: Option<File>) -> Option<File> {
    file.filter(|file| {
        let set = fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags | OFlags::NONBLOCK));
        if let Err(error) = set {
            log::error!("A kick or call descriptor that cannot be made non-blocking: {error}");
        }
        set.is_ok()
    })
}

impl<'a> VringStateGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for Vring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for Vring {
    fn new(mem: Memory, max_queue_size: u16) -> Result<Self, Error> {
        VringMutex::new(mem, max_queue_size).map(Vring)
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.0.get_ref()
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<Memory>> {
        self.0.get_mut()
    }

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), Error> {
        self.0.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.0.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.0.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.0.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.0.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.0.set_enabled(enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), Error> {
        self.0.set_queue_info(desc, avail, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.0.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.0.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, idx: u16) {
        self.0.set_queue_next_used(idx);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.0.queue_used_idx()
    }

    fn set_queue_size(&self, num: u16) {
        if !num.is_power_of_two() {
            log::error!("A ring of {num} descriptors: a split ring's size is a power of two");
        }
        self.0.set_queue_size(num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.0.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.0.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.0.set_kick(nonblocking(file));
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.0.read_kick()
    }

    fn set_call(&self, file: Option<File>) {
        self.0.set_call(nonblocking(file));
    }

    fn set_err(&self, file: Option<File>) {
        self.0.set_err(file);
    }
}
