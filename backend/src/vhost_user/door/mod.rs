//! The door: what a frontend sends is checked here before the crates `vhost` and
//! `vhost-user-backend` see it.
//!
//! - [`descriptors`]: whether a descriptor is what its message says.
//! - [`memory`]: whether a file can be memory.

mod descriptors;
mod memory;

pub(super) use descriptors::{Direction, check_eventfd, check_pipe};
pub(super) use memory::check_region;
#[allow(unused_imports, reason = "for the relay of messages")]
pub(super) use memory::{check_log, region_limit};

/// Why something that a frontend sent is not passed on: what is there, and what to send instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub(super) String);
