//! Each reason for which an offset does not go into KVM, brought about on a real KVM.

use std::error::Error;
use std::num::NonZeroU64;

use serde_json::{Map, Value};
use vhost_user_timer_frontend::{Abi, ApplyError, Backend, Frontend, Info, VmOptions, kvm};

use super::chain;
use crate::Result;
use crate::vm::{LIMIT, Vm, backend, host_counter};

/// Tries each, and says the error.
pub(super) fn run(program: &str) -> Result<Value> {
    let own = NonZeroU64::new(host_counter()?.native_frequency());
    let other = NonZeroU64::new(24_000_000);
    let two_offsets = VmOptions::default().confirm(true);
    let mut refusals = Map::new();
    let mut add = |name: &str, error: String| refusals.insert(name.to_owned(), error.into());

    let vm = Vm::new(2)?;
    let backend_of = |args: &[&str], frequency, options| -> Result<Backend> {
        let backend = backend(program, args)?;
        let queue = backend.frontend().queue();
        queue.configure_with(2, Abi::Arm64, frequency, options, LIMIT)?;
        Ok(backend)
    };
    let monotonic = backend_of(&["--counter-source=monotonic"], own, VmOptions::KVM)?;
    add("source", refusal(&vm, monotonic.frontend())?);
    let scaled = backend_of(&[], other, VmOptions::KVM)?;
    add("frequency", refusal(&vm, scaled.frontend())?);
    let two = backend_of(&[], own, two_offsets)?;
    add("two_offsets", refusal(&vm, two.frontend())?);

    let anchored = backend_of(&[], own, VmOptions::KVM)?;
    anchored
        .frontend()
        .queue()
        .set_counter_anchor(0, 0, LIMIT)?;
    add("anchored", refusal(&vm, anchored.frontend())?);

    let right = backend_of(&[], own, VmOptions::KVM)?;
    let info = right.frontend().queue().info(LIMIT)?;
    add(
        "not_armed",
        chain(&unwanted(kvm::apply(&vm.fd, &vm.vcpus[0], &info))?),
    );
    add(
        "confirm",
        chain(&unwanted(kvm::set_counts(&vm.vcpus[0], &info))?),
    );
    Ok(refusals.into())
}

/// Tries on a VM of this type, which the host cannot look into.
pub(super) fn run_protected(program: &str) -> Result<Value> {
    /// Documentation/virt/kvm/api.rst, KVM_CREATE_VM: KVM_VM_TYPE_ARM_PROTECTED.
    const PROTECTED: u64 = 1 << 31;
    let own = NonZeroU64::new(host_counter()?.native_frequency());
    let backend = backend(program, &[])?;
    let frontend = backend.frontend();
    frontend
        .queue()
        .configure_with(1, Abi::Arm64, own, VmOptions::KVM, LIMIT)?;
    let vm = Vm::with_type(1, PROTECTED)?;
    let mut refusals = Map::new();
    refusals.insert("protected".to_owned(), refusal(&vm, frontend)?.into());
    Ok(refusals.into())
}

/// Why the VM's offset did not go into KVM.
fn refusal(vm: &Vm, frontend: &Frontend) -> Result<String> {
    let error = unwanted(frontend.resume_with(LIMIT, apply_to(vm)))?;
    told(frontend, &error)
}

/// The closure of a resume.
fn apply_to(vm: &Vm) -> impl FnOnce(&Info) -> std::result::Result<(), ApplyError> {
    |info| {
        kvm::apply(&vm.fd, &vm.vcpus[0], info)?;
        Ok(())
    }
}

/// An error, and the phase in which it left the VM.
fn told(frontend: &Frontend, error: &dyn Error) -> Result<String> {
    let phase = frontend.queue().info(LIMIT)?.phase;
    Ok(format!("{phase}: {}", chain(error)))
}

fn unwanted<T, E>(result: std::result::Result<T, E>) -> Result<E> {
    match result {
        Ok(_) => Err("it was not refused".into()),
        Err(error) => Ok(error),
    }
}
