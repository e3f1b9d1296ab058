//! A vhost-user backend, one process per VM, that owns the VM's counter offset and holds every
//! vCPU at a gate until the last one's timer is restored.
//!
//! - [`device`] is the vhost-user device around it: rings in, model call, rings out.
//! - [`server`] accepts frontends, one at a time, until a signal ends the process.
//! - [`state`] is the VM as a stream to another host, and in a file past a crash.
//! - [`args`] is the command line.

pub mod args;
pub mod device;
#[doc(hidden)]
pub mod failpoint;
pub mod server;
pub mod state;
mod sys;
mod vhost_user;
mod virtio;

pub use sys::with_causes;
