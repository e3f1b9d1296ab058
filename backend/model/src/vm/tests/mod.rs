//! Tests of the VM's time.
//!
//! [`rig`] holds a VM, and a host counter that a test turns by hand. Requests are
//! [`Ask`](vhost_user_timer_reference::Ask)s, made from the protocol's own types.
//!
//! - `give_up`, `page`: what no frontend can see of a restore and of the time page;
//! - `as_before`: what a VM without CONFIRM and ONE_OFFSET has always done;
//! - `check_order`, `refusals`: which error comes first, and that none changes anything;
//! - `conditions`: when a timer fires, as the kernel's arch_timer edge cases have it;
//! - `kvm_vectors`: what KVM on arm64 was measured to do, and where this device differs;
//! - `orders`: the order of writes never matters;
//! - `records`: the VM in a state file;
//! - `properties`: random lives of a VM, drawn by [`steps`] and run by [`life`]: what must hold in
//!   each of them, and that the VM's answers are to the byte those of the naive
//!   [`Reference`](vhost_user_timer_reference::Reference).

mod as_before;
mod check_order;
mod clock_device;
mod conditions;
mod give_up;
mod kvm_vectors;
mod life;
mod orders;
mod page;
mod properties;
mod records;
mod refusals;
mod rig;
mod steps;
