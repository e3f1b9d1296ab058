//! Programs for developers: the mock frontend with its demo, the QEMU demo, the model check, and
//! the bench.
//!
//! - [`mock`]: the program `mock-frontend`, a VMM without a hypervisor;
//! - [`kvm_demo`]: restores on a real KVM, from the eyes of the guest;
//! - [`qemu_demo`]: a Linux guest whose clock is the backend;
//! - [`model`]: the model check of the VM's time;
//! - [`hostile`]: random attacks on a backend, each with an oracle;
//! - [`mod@bench`]: what the backend costs, compared with its floors.

pub mod bench;
pub mod hostile;
pub mod kvm_demo;
pub mod mock;
pub mod model;
pub mod qemu_demo;

/// Compiles the README's example.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;
