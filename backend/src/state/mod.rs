//! What outlives this process: the devices on their way to another host, and past a crash.
//!
//! - [`stream`]: a VM as bytes for VHOST_USER_SET_DEVICE_STATE_FD, versioned and checked.
//! - [`clock_stream`]: the clock device as such bytes.
//! - [`file`](mod@file): records in a shared mapping that survives `kill -9` at any instruction.
//! - [`Store`]: such a file, shared by the devices.

pub mod clock_stream;
mod envelope;
pub mod file;
mod store;
pub mod stream;

pub use store::Store;
