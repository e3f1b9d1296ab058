//! What the tests of vhost-user-timer share.
//!
//! - [`backend_process`]: a backend as the external process that it is;
//! - [`raw_driver`]: a driver of its own for black-box tests, hostile where that is wanted;
//! - `contract`: the wire contract, typed by hand, and a client over that driver;
//! - [`reference`]: a naive VM that serves requests by SPEC.md's text;
//! - [`clock_driver`]: a guest's driver of the clock device, by hand likewise;
//! - [`kvm_data`]: the timer registers that a real KVM/arm64 gave;
//! - [`qemu`]: a real guest, under QEMU;
//! - [`race`]: vCPU threads that restore all at once;
//! - [`watch`]: the count as a guest reads it, and whether it went back;
//! - `shadow`: what a VM must be like, to go by what its frontend was answered;

pub mod backend_process;
pub mod clock_driver;
#[doc(hidden)]
pub mod contract;
pub mod kvm_data;
pub mod qemu;
pub mod race;
pub mod raw_driver;
#[doc(hidden)]
pub mod shadow;
pub mod watch;

pub use vhost_user_timer_reference as reference;
