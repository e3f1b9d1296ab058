//! Pauses through which the guest's time goes on (PAUSE with KEEP_COUNTING).

use std::num::NonZeroU64;

use serde_json::{Value, json};
use vhost_user_timer_frontend::{Abi, Frontend, Register, Run, VmOptions, kvm};

use crate::Result;
use crate::vm::{LIMIT, Vm, backend, host_counter};

/// Pauses and resumes so often, and says what each resume made of the offset.
pub(super) fn run(program: &str, rounds: &str) -> Result<Value> {
    let vm = Vm::new(2)?;
    let backend = backend(program, &[])?;
    let frontend = backend.frontend();
    let queue = frontend.queue();
    let frequency = NonZeroU64::new(host_counter()?.native_frequency());
    let vcpus = u32::try_from(vm.vcpus.len())?;
    queue.configure_with(vcpus, Abi::Arm64, frequency, VmOptions::KVM, LIMIT)?;
    let first = resume(&vm, frontend)?;
    let mut moved = Vec::new();
    let mut ahead = Vec::new();
    for _ in 0..rounds.parse::<u32>()? {
        queue.pause_vm_only(LIMIT)?;
        let run = resume(&vm, frontend)?;
        moved.push(run.cntvoff.wrapping_sub(first.cntvoff).cast_signed());
        ahead.extend(vm.ahead(Register::TimerCnt, first.cntvoff)?);
    }
    Ok(json!({ "moved": moved, "ahead": ahead }))
}

fn resume(vm: &Vm, frontend: &Frontend) -> Result<Run> {
    let run = frontend.resume_with(LIMIT, |info| {
        kvm::apply(&vm.fd, &vm.vcpus[0], info)?;
        Ok(())
    });
    Ok(run?)
}
