//! A small VMM on KVM/arm64 that keeps its time with `vhost-user-timer`: see README.md.

#![cfg_attr(
    target_arch = "aarch64",
    expect(dead_code, reason = "saving and restoring are not wired yet")
)]

#[cfg(target_arch = "aarch64")]
mod guest;
#[cfg(target_arch = "aarch64")]
mod machine;

use std::process::ExitCode;

#[cfg(target_arch = "aarch64")]
fn main() -> ExitCode {
    machine::main()
}

#[cfg(not(target_arch = "aarch64"))]
fn main() -> ExitCode {
    let here = std::env::consts::ARCH;
    eprintln!("vhost-user-timer-vmm: runs on AArch64 with /dev/kvm; this is {here}");
    ExitCode::FAILURE
}
