//! A vhost-user backend, one process per VM, that owns the VM's counter offset and holds every
//! vCPU at a gate until the last one's timer is restored.
//!
//! - [`vm`] is the VM's time, pure: no clock, no descriptor, no thread.
//! - [`rtc`] is the guest's virtio-rtc device, pure likewise.
//! - [`counter`] reads the host's clocks for it.
//! - [`device`] is the vhost-user device around it: rings in, model call, rings out.
//! - [`server`] accepts frontends, one at a time, until a signal ends the process.
//! - [`state`] is the VM as a stream to another host, and in a file past a crash.
//! - [`args`] is the command line.

pub mod args;
pub mod counter;
pub mod device;
#[doc(hidden)]
pub mod failpoint;
pub mod rtc;
pub mod server;
pub mod state;
pub mod vm;
