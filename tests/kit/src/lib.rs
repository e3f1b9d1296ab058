//! What the tests of vhost-user-timer share.
//!
//! - [`backend_process`]: a backend as an external process;
//! - [`raw_driver`]: an independent driver for black-box tests, hostile on demand;
//! - `contract`: the wire contract, typed by hand, and a client over that driver;
//! - [`mod@reference`]: a naive VM that serves requests by SPEC.md's text;
//! - [`confirming`]: what that client sends to a VM that confirms;
//! - [`clock_driver`]: a guest's driver of the clock device, by hand too;
//! - [`kvm_data`]: timer registers recorded on a real KVM/arm64;
//! - [`qemu`]: a real guest, under QEMU;
//! - [`rounds`]: what the VMM reports of its restores on a real KVM;
//! - [`race`]: vCPU threads that all restore at once;
//! - [`state_file`]: state files as a test edits them;
//! - [`time_out`]: time-outs that run while a test sets its scene up;
//! - [`watch`]: the count as a guest reads it, and whether it decreased;
//! - [`victim`]: a backend under attack, and what must be true of it afterwards;
//! - `shadow`: what a VM must be like, judging by the answers that its frontend got.

pub mod backend_process;
pub mod clock_driver;
pub mod confirming;
#[doc(hidden)]
pub mod contract;
pub mod kvm_data;
pub mod qemu;
pub mod race;
pub mod raw_driver;
pub mod rounds;
#[doc(hidden)]
pub mod shadow;
pub mod state_file;
pub mod time_out;
pub mod victim;
pub mod watch;

pub use vhost_user_timer_reference as reference;
