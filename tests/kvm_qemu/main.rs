//! QEMU with this project's device on a real KVM.
//!
//! `inside.rs` has the tests, as a program that runs in an emulated machine. This boots the machine
//! and runs the program there.

use std::time::Duration;

use vhost_user_timer_kit::qemu::{Kernel, KvmHost, environment};

/// The longest that the program may take: it boots guests by an emulated KVM.
const LIMIT: Duration = Duration::from_secs(1500);

/// MiB of the machine: for two QEMUs, and what they boot twice, packed and unpacked.
const MEMORY: u32 = 3072;

#[test]
fn time_is_right_in_a_guest_of_qemu_on_kvm() {
    let Some(environment) = environment() else {
        return;
    };
    // QEMU, the backend, the program and what it boots.
    let programs = KvmHost::programs("kvm_qemu/programs");
    let booted = KvmHost::boot_with(&environment, Kernel::Newest, &programs, MEMORY);
    let mut host = booted.unwrap_or_else(|error| panic!("{error}"));
    // One at a time: a guest has more vCPUs than the machine has CPUs.
    let command = "XDG_CACHE_HOME=/environment VHOST_USER_TIMER=/bin/vhost-user-timer \
        VHOST_USER_TIMER_QEMU=/bin/qemu-system-aarch64 VHOST_USER_TIMER_LIB=/lib CI=1 \
        qemu-tests --test-threads=1 --nocapture 2>&1";
    let output = host
        .run(LIMIT, command)
        .unwrap_or_else(|error| panic!("{error}"));
    println!("{}", output.text);
    assert_eq!(output.status, 0, "{}", output.text);
    assert!(
        output.text.contains("test result: ok. 3 passed"),
        "{}",
        output.text
    );
}
