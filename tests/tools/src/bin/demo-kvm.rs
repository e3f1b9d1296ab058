//! Restores a VM on a real KVM by the kernel alone, behind a gate, and behind a gate that waits for
//! the confirmation, and shows what the guest saw.
//!
//! Its argument is the archive of programs that `tests/kvm/programs` makes.

use std::process::ExitCode;

use vhost_user_timer_tools::kvm_demo as demo;

fn main() -> ExitCode {
    let Some(programs) = std::env::args_os().nth(1) else {
        eprintln!("usage: demo-kvm ARCHIVE, which tests/kvm/programs makes; or: make demo-kvm");
        return ExitCode::FAILURE;
    };
    match demo::show(programs.as_ref()) {
        Ok(()) => {
            println!("demo-kvm: OK");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("demo-kvm: FAILED {error}");
            ExitCode::FAILURE
        }
    }
}
