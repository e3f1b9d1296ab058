//! The timer device's contract told again, for tests to compare the project with.
//!
//! - [`contract`]: codes, layouts and parsing, typed by hand from SPEC.md;
//! - [`Reference`]: a naive VM that serves requests by SPEC.md's text, over `contract` alone;
//! - [`Ask`]: requests made from the protocol crate's own types.
//!
//! A test that sends an [`Ask`] to the product and to the [`Reference`] compares the protocol
//! crate's types with `contract`, and the product's VM with the naive one. Neither `contract` nor
//! [`Reference`] uses anything of the project; that is what makes them worth comparing with.

mod ask;
#[doc(hidden)]
pub mod contract;
mod vm;

pub use ask::{Ask, whole_vcpu};
pub use vm::{Notice, Profile, Reference, Released, Waiter};
