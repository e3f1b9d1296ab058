//! A kernel before Linux 6.4.

use super::{COUNT, ahead, armed_at, kvm_with_offset, vm_of};
use crate::Info;
use crate::kvm::{KvmError, apply, set_counts};
use vhost_user_timer_protocol::{Phase, Register};

#[test]
fn without_the_ioctl_counts_are_set_to_within_their_brackets() {
    let Some(kvm) = kvm_with_offset(false) else {
        return;
    };
    let (vm, vcpus) = vm_of(&kvm);
    let error = apply(&vm, &vcpus[0], &armed_at(COUNT)).unwrap_err();
    assert!(matches!(error, KvmError::NoCounterOffset), "{error}");
    let paused = Info {
        phase: Phase::Paused,
        confirm: false,
        cntpoff: 0,
        ..armed_at(COUNT)
    };
    let result = set_counts(&vcpus[0], &paused).unwrap();
    println!("TIMER_CNT {}", result.virt);
    assert_eq!(result.phys, None);
    for vcpu in &vcpus {
        let seen = ahead(vcpu, Register::TimerCnt, result.offset);
        let both = seen.and(result.virt);
        assert!(both.is_some(), "{seen}, {}", result.virt);
    }
}
