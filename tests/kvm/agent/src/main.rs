//! What runs beside the VMM in the tests on a real KVM. It asks KVM, or KVM and a backend, and
//! prints each answer as a line of JSON, or fails with one line on stderr and exit status 1. The
//! tests judge.

use std::process::ExitCode;

#[cfg(target_arch = "aarch64")]
mod commands;
#[cfg(target_arch = "aarch64")]
mod vm;

#[cfg(target_arch = "aarch64")]
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[cfg(target_arch = "aarch64")]
fn main() -> ExitCode {
    commands::main()
}

#[cfg(not(target_arch = "aarch64"))]
fn main() -> ExitCode {
    eprintln!(
        "kvm-agent: asks KVM on AArch64, and this is {}",
        std::env::consts::ARCH
    );
    ExitCode::FAILURE
}
