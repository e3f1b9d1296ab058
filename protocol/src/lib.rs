//! The language that both ends of a vhost-user timer device speak.
//!
//! `SPEC.md` beside this crate is the contract in prose; these modules are the
//! same contract as types:
//!
//! - [`wire`]: the structures as bytes. Little-endian, unaligned, no padding; sizes
//!   and offsets are asserted at compile time.
//! - [`op`]: the operations, each a row of one table.
//! - [`phase`]: the phases of a VM's life.
//! - [`request`]: bytes → [`Request`]. A peer may send anything;
//!   parsing never panics and never allocates.
//! - [`status`]: the errno-valued status of an answer.
//! - [`register`]: the timer registers, by timeline and role; [`abi`]: their ids, a table an ABI.
//! - [`counter`]: the host counter as it follows from a clock.
//!
//! All of that is `no_std` and does no I/O. The library that a VMM links is the crate
//! `vhost-user-timer-frontend`.
//!
//! Values from the wire that this version does not know are values here too
//! ([`Op::Unknown`]), not failures: what to do about them is for the
//! caller to say.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
pub mod counter;
pub mod op;
pub mod payload;
pub mod phase;
mod ranges;
pub mod register;
pub mod request;
pub mod status;
pub mod timeline;
pub mod wire;

pub use abi::Abi;
pub use op::Op;
pub use phase::{Phase, Phases};
pub use ranges::Ranges;
pub use register::{Register, Role};
pub use request::Request;
pub use status::Status;
pub use timeline::Timeline;

/// Version of the protocol, the `version` field of [`wire::Info`].
pub const VERSION: u32 = 1;

/// The event queue's index.
pub const EVENT_QUEUE: u16 = 0;

/// The first request queue's index; [`MAX_REQUEST_QUEUES`] at most follow.
pub const FIRST_REQUEST_QUEUE: u16 = 1;

/// The most request queues that a backend serves.
pub const MAX_REQUEST_QUEUES: u16 = 16;

/// The largest ring, in descriptors.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// The most vCPUs that a VM can have.
pub const MAX_VCPUS: u32 = 4096;

/// How many device-readable, and how many device-writable, bytes of one request are looked
/// at. The largest body, SET_VM of [`MAX_VCPUS`] vCPUs, fits.
pub const MAX_MESSAGE: usize = 256 * 1024;

/// The `vcpu` of a VM-wide request.
pub const VM_WIDE: u32 = u32::MAX;
