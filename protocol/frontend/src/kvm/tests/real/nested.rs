//! KVM with nested virtualization (`kvm-arm.mode=nested`).

use kvm_bindings::KVM_ARM_VCPU_HAS_EL2;

use super::{COUNT, ahead, armed_at, kvm, skip, small_vm, vcpu};
use crate::SavedVcpu;
use crate::kvm::{KvmError, apply, restore_vcpu, save_vcpu};
use vhost_user_timer_protocol::Register;

/// KVM_CAP_ARM_EL2 (include/uapi/linux/kvm.h).
const KVM_CAP_ARM_EL2: u64 = 240;

#[test]
fn a_guest_with_el2_is_refused_and_its_time_left_alone() {
    let Some(kvm) = kvm() else { return };
    if kvm.check_extension_raw(KVM_CAP_ARM_EL2) == 0 {
        return skip("this kernel makes no guests with EL2");
    }
    let vm = small_vm(&kvm);
    let vcpu = vcpu(&vm, 0, &[KVM_ARM_VCPU_HAS_EL2]);
    let refused = |error: KvmError| assert!(matches!(error, KvmError::El2Guest { .. }), "{error}");
    let info = armed_at(COUNT);
    refused(apply(&vm, &vcpu, &info).unwrap_err());
    refused(save_vcpu(&vcpu, 0).unwrap_err());
    refused(restore_vcpu(&vcpu, &SavedVcpu::new(0)).unwrap_err());
    assert!(!ahead(&vcpu, Register::TimerCnt, info.cntvoff).contains_zero());
}
