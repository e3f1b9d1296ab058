//! A small VMM on KVM/arm64 that keeps its time with `vhost-user-timer`: see README.md.

#[cfg(target_arch = "aarch64")]
mod args;
#[cfg(target_arch = "aarch64")]
mod guest;
#[cfg(target_arch = "aarch64")]
mod machine;
#[cfg(any(target_arch = "aarch64", test))]
#[cfg_attr(
    not(target_arch = "aarch64"),
    expect(dead_code, reason = "only its arithmetic is tested elsewhere")
)]
mod report;

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
