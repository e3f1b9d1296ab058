//! The protocol of the vhost-user timer device, as types.
//!
//! `SPEC.md` beside this crate is the contract in prose. Where to look:
//!
//! - which operations are there, and what does each take, answer and change? [`op`], a table;
//! - what are the bytes? [`wire`]: little-endian, unaligned, no padding; sizes and offsets are
//!   asserted at compile time. [`payload`]: how long a body can be;
//! - which registers are there? [`register`], by timeline and role, and [`abi`], a table an ABI;
//! - how do bytes become a request? [`request`]: a peer may send anything; parsing never panics
//!   and never allocates;
//! - [`phase`], [`status`], [`timeline`], [`source`]: the other values on the wire;
//! - [`counter`]: how the host counter follows from a clock.
//!
//! The crate is `no_std` and does no I/O. A VMM links the library `vhost-user-timer-frontend`.
//!
//! A value that this version does not know is a value here too ([`Op::Unknown`]); what to do about
//! it is the caller's decision.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
pub mod counter;
mod index_ranges;
pub mod op;
pub mod payload;
pub mod phase;
pub mod register;
pub mod request;
pub mod source;
pub mod status;
pub mod timeline;
pub mod wire;

pub use abi::Abi;
pub use index_ranges::IndexRanges;
pub use op::Op;
pub use phase::{Phase, Phases};
pub use register::{Register, Role};
pub use request::Request;
pub use source::CounterSource;
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

/// The most device-readable, and the most device-writable, bytes of one request that are used. The
/// largest body, SET_VM of [`MAX_VCPUS`] vCPUs, fits.
pub const MAX_MESSAGE: usize = 256 * 1024;

/// The longest device state, bytes: as much of a stream is read, and no more.
pub const MAX_STREAM: usize = 4 * 1024 * 1024;

/// The `vcpu` of a VM-wide request.
pub const VM_WIDE: u32 = u32::MAX;
