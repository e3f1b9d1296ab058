use std::error::Error;

use super::super::apply::apply_by;
use super::super::{Applied, KvmError, apply};
use super::{EBUSY, EINVAL, FREQUENCY, FakeKvm};
use crate::Info;
use vhost_user_timer_protocol::{Abi, CounterSource, Phase};

const OFFSET: u64 = 0x1234_5678_9abc;

fn applied(kvm: &FakeKvm, info: &Info) -> Result<Applied, KvmError> {
    apply_by(kvm, kvm, kvm, info)
}

/// Fails, and leaves KVM as it was.
fn refused(kvm: &FakeKvm, info: &Info) -> KvmError {
    let before = kvm.offsets();
    let error = applied(kvm, info).unwrap_err();
    assert_eq!(kvm.offsets(), before, "{error}");
    error
}

#[test]
fn apply_puts_one_offset_into_both_counts_and_sees_that_they_follow_it() {
    // Offsets that lie before, at and after the host counter: counts wrap.
    for offset in [0, OFFSET, u64::MAX - 3, 1 << 63] {
        let kvm = FakeKvm::new(7_000_000_000);
        let applied = applied(&kvm, &kvm.armed(offset)).unwrap();
        assert_eq!(kvm.offsets(), [offset; 2]);
        assert_eq!(applied.offset, offset);
        for bracket in [applied.virt, applied.phys] {
            assert!(bracket.contains_zero(), "{bracket}");
            assert!(bracket.width() <= FakeKvm::IOCTL + 20, "{bracket}");
        }
    }
}

#[test]
fn an_offset_replaces_the_one_of_before_as_after_each_pause() {
    let kvm = FakeKvm::new(0);
    for offset in [OFFSET, OFFSET + 1, 5] {
        applied(&kvm, &kvm.armed(offset)).unwrap();
        assert_eq!(kvm.offsets(), [offset; 2]);
    }
}

#[test]
fn an_offset_that_kvm_took_and_did_not_put_into_effect_is_not_confirmed() {
    for (error, register) in [([20_000, 0], "TIMER_CNT"), ([0, 20_000], "PTIMER_CNT")] {
        let kvm = FakeKvm {
            error,
            ..FakeKvm::new(1 << 40)
        };
        match applied(&kvm, &kvm.armed(OFFSET)).unwrap_err() {
            KvmError::NotInEffect {
                register: found,
                offset,
                bracket,
            } => {
                assert_eq!((found, offset), (register, OFFSET));
                assert!(bracket.least <= -20_000 && bracket.most >= -20_000 && bracket.most < 0);
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn each_refusal_of_kvms_is_an_error_of_its_own_and_changes_nothing() {
    let refusing = |errno| FakeKvm {
        refusal: Some(errno),
        ..FakeKvm::new(0)
    };
    let kvm = refusing(EBUSY);
    let busy = refused(&kvm, &kvm.armed(OFFSET));
    assert!(matches!(busy, KvmError::VcpuBusy) && busy.is_transient());

    let kvm = refusing(EINVAL);
    let protected = refused(&kvm, &kvm.armed(OFFSET));
    assert!(matches!(protected, KvmError::ProtectedVm) && !protected.is_transient());

    const EIO: i32 = 5;
    let kvm = refusing(EIO);
    let other_process = refused(&kvm, &kvm.armed(OFFSET));
    assert_eq!(
        other_process.to_string(),
        "KVM_ARM_SET_COUNTER_OFFSET failed: only the process that made the VM may use it"
    );
    assert!(other_process.source().is_some());

    let kvm = FakeKvm::before_6_4(0);
    assert!(matches!(
        refused(&kvm, &kvm.armed(OFFSET)),
        KvmError::NoCounterOffset
    ));
}

#[test]
fn a_guest_with_el2_is_refused() {
    let kvm = FakeKvm {
        has_el2: true,
        ..FakeKvm::new(0)
    };
    assert!(matches!(
        refused(&kvm, &kvm.armed(OFFSET)),
        KvmError::El2Guest {
            register: "CNTVOFF_EL2"
        }
    ));
}

#[test]
fn two_different_offsets_and_another_frequency_than_cntfrq_are_refused() {
    let kvm = FakeKvm::new(0);
    let two = Info {
        cntpoff: 0,
        ..kvm.armed(OFFSET)
    };
    match refused(&kvm, &two) {
        KvmError::TwoOffsets { cntvoff, cntpoff } => assert_eq!((cntvoff, cntpoff), (OFFSET, 0)),
        other => panic!("{other}"),
    }
    let scaled = Info {
        frequency: 24_000_000,
        ..kvm.armed(OFFSET)
    };
    match refused(&kvm, &scaled) {
        KvmError::Frequency { vm, host } => assert_eq!((vm, host), (24_000_000, FREQUENCY)),
        other => panic!("{other}"),
    }
}

#[test]
fn a_vm_that_is_not_armed_or_counts_by_something_else_is_refused_on_any_host() {
    let kvm = FakeKvm::new(0);
    let armed = kvm.armed(OFFSET);
    let refused = |info: Info| {
        let error = apply(&kvm, &kvm, &info).unwrap_err();
        assert_eq!(kvm.offsets(), [0, 0]);
        error
    };
    for phase in [Phase::New, Phase::Paused, Phase::Running, Phase::Restoring] {
        let error = refused(Info { phase, ..armed });
        assert!(matches!(error, KvmError::Phase { found, .. } if found == phase));
    }
    let anchored = Info {
        anchored: true,
        source: CounterSource::Monotonic,
        ..armed
    };
    match refused(anchored) {
        KvmError::OtherCounter(other) => assert!(other.anchored),
        other => panic!("{other}"),
    }
    let of_32_bits = Info {
        abi: Abi::Arm,
        ..armed
    };
    assert!(matches!(refused(of_32_bits), KvmError::Abi(Abi::Arm)));
    for source in [
        CounterSource::NotTold,
        CounterSource::Monotonic,
        CounterSource::Boottime,
        CounterSource::Tsc,
        CounterSource::Unknown(7),
    ] {
        let error = refused(Info { source, ..armed });
        assert!(matches!(error, KvmError::OtherCounter(other) if other.found == source));
    }
}

#[cfg(not(target_arch = "aarch64"))]
#[test]
fn a_host_without_cntvct_is_refused() {
    let kvm = FakeKvm::new(0);
    assert!(matches!(
        apply(&kvm, &kvm, &kvm.armed(OFFSET)).unwrap_err(),
        KvmError::Host(_)
    ));
}
