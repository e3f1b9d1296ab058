//! The programs that are no tests: the mock frontend and the demos, the model check, the bench.
//!
//! - [`mock`]: the program `mock-frontend`, which plays the VMM;
//! - [`qemu_demo`]: a Linux guest with its clock from the backend;
//! - [`model`]: the model check of the backend's time;
//! - [`mod@bench`]: what the backend costs, beside its floors.

pub mod bench;
pub mod mock;
pub mod model;
pub mod qemu_demo;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;
