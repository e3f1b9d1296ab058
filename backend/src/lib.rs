//! A vhost-user backend, one process per VM, that owns the VM's counter offset and holds every
//! vCPU at a gate until the last one's timer is restored.
//!
//! From the outside in:
//!
//! - [`args`] is the command line; [`capabilities`] is what a launcher can ask of it. [`accounts`]
//!   finds the users and groups that it names, [`places`] where each device's frontends come from,
//!   and [`pid_file`] says which process this is.
//! - [`logging`] is the log, which no thread waits for.
//! - [`server`] accepts frontends, one at a time at each socket, until a signal ends the process.
//! - `vhost_user` is the protocol, once for all devices; `virtio` serves rings.
//! - [`device`] are the timer device and the clock device: requests in, model call, answers out.
//! - [`state`] is the devices as streams to another host, and in a file across a crash.
//!
//! What the VM's time and the guest's clocks are is decided by the model, a crate of its own.

pub mod accounts;
pub mod args;
pub mod capabilities;
#[cfg(test)]
mod children;
pub mod device;
#[doc(hidden)]
pub mod failpoint;
mod file_system;
mod given;
pub mod logging;
pub mod pid_file;
pub mod places;
pub mod server;
pub mod state;
mod sys;
mod vhost_user;
mod virtio;

pub use sys::with_causes;
