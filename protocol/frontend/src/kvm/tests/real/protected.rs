//! KVM in protected mode (`kvm-arm.mode=protected`).

use super::{COUNT, armed_at, kvm, skip, vcpu};
use crate::kvm::{KvmError, apply};

/// KVM_VM_TYPE_ARM_PROTECTED (include/uapi/linux/kvm.h).
const PROTECTED: u64 = 1 << 31;

#[test]
fn a_protected_vm_is_refused() {
    let Some(kvm) = kvm() else { return };
    let Ok(vm) = kvm.create_vm_with_type(PROTECTED) else {
        return skip("this kernel makes no protected VMs");
    };
    let vcpu = vcpu(&vm, 0, &[]);
    let error = apply(&vm, &vcpu, &armed_at(COUNT)).unwrap_err();
    assert!(matches!(error, KvmError::NoCounterOffset), "{error}");
    println!("{error}");
}
