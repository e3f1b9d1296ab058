//! The door: every message of a frontend passes it before the crates `vhost` and
//! `vhost-user-backend` see it.
//!
//! Those crates act on a message before they know whether it can be carried out, take any
//! descriptor for what the message says it is, wait without end for the rest of a message, and
//! serve nothing but a connection that they accept. So the frontend is connected to the door, and
//! the door to the crate ([`inner_connection`]). What is kept out, and where:
//!
//! | | |
//! |---|---|
//! | a message that is none, is too long or carries more descriptors than belong to it | [`message`], [`stream`] |
//! | a message that is never finished; replies that are never read; a frontend that is gone | [`relay`] |
//! | a descriptor that is not what its message says | [`descriptors`] |
//! | a descriptor whose close waits for a server | [`closing`] |
//! | memory that blocks or faults when it is touched | [`memory`] |
//! | more regions than are announced, a kick that never comes | [`checks`] |
//! | a ring that is no ring, or where no memory is shared | [`rings`] |
//!
//! A frontend that can be told that its message is refused is told, and continues with what it had
//! before. Otherwise its connection ends. Either way there is a log line.

mod checks;
mod closing;
mod descriptors;
mod inner;
mod memory;
mod message;
mod relay;
mod rings;
mod stream;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub(super) use descriptors::{Direction, check_eventfd, check_pipe};
pub(super) use inner::inner_connection;
pub(super) use memory::{check_log, check_region, region_limit};
pub(super) use relay::{Bell, Door, End, Guarded};

/// Why something that a frontend sent is not passed on: what is there, and what to send instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub(super) String);

/// What to do where the frontend's memory does not reach the backend.
pub(super) const SHARE_ON: &str = "the backend needs memory of a file that is shared: with QEMU, -machine \
    memory-backend=mem -object memory-backend-memfd,id=mem,size=...,share=on";

/// How long a message may take from its first byte to its last.
pub(super) const MESSAGE: Duration = Duration::from_secs(5);

/// How long the messages of a frontend that is gone may take at the door, and then with the crate.
pub(super) const AFTERMATH: Duration = Duration::from_secs(1);

/// What one frontend may have at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Memory regions, as GET_MAX_MEM_SLOTS announces them.
    pub(super) regions: usize,
    /// Descriptors of a ring.
    pub(super) queue_size: u16,
    /// How many queues the device has.
    pub(super) queues: u16,
    /// From the first byte of a message to its last.
    pub(super) message: Duration,
    /// For the messages of a frontend that is gone, at the door.
    pub(super) aftermath: Duration,
}
