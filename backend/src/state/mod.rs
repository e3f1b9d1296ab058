//! The VM outside this process: on its way to another host, and past a crash of this one.
//!
//! - [`stream`]: a VM as bytes for VHOST_USER_SET_DEVICE_STATE_FD, versioned and checked.
//! - [`clock_stream`]: the clock device likewise.
//! - [`file`](mod@file): the VM in a shared mapping that survives `kill -9` at any instruction.

pub mod clock_stream;
mod envelope;
pub mod file;
pub mod stream;
