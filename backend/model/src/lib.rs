//! A VM's time and its gate, and the guest's clock, as plain values.
//!
//! - [`vm`]: the VM's counter offset, its vCPUs' timers, and the gate they wait at;
//! - [`rtc`]: the guest's virtio-rtc device.
//!
//! Nothing here can reach a clock, a descriptor or a thread: time and bytes come in as arguments,
//! answers and effects go out. That is what lets the model check explore the real types.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod rtc;
pub mod vm;
