use super::super::apply::apply_by;
use super::super::best_effort::set_counts_by;
use super::super::{KvmError, set_counts};
use super::FakeKvm;
use crate::Info;
use vhost_user_timer_protocol::{Phase, Register};

/// A VM without CONFIRM, PAUSED at `count`.
fn paused(kvm: &FakeKvm, count: u64) -> Info {
    let info = kvm.armed(0);
    Info {
        phase: Phase::Paused,
        cntvoff: info.host_count.wrapping_sub(count),
        cntpoff: 0,
        confirm: false,
        one_offset: false,
        ..info
    }
}

/// How far the true count is ahead of what this offset makes it.
fn ahead(offset: u64, true_offset: u64) -> i64 {
    offset.wrapping_sub(true_offset).cast_signed()
}

#[test]
fn counts_that_are_written_one_by_one_are_known_to_within_their_brackets() {
    for count in [0, 1 << 40, u64::MAX - 3] {
        let kvm = FakeKvm::new(9_000_000_000);
        let result = set_counts_by(&kvm, &kvm, &paused(&kvm, count)).unwrap();
        let [virt, phys] = kvm.offsets().map(|truth| ahead(result.offset, truth));
        let within = |ticks, bracket: super::super::Bracket| {
            assert!(bracket.least <= ticks && ticks <= bracket.most, "{bracket}");
            assert!(bracket.width() <= FakeKvm::IOCTL + 20, "{bracket}");
        };
        within(virt, result.virt);
        within(phys, result.phys.unwrap());
        assert!(result.virt.contains_zero());
        // The guest resumes at its count, not before it.
        let first = kvm.writes.borrow()[0];
        assert_eq!(first, (Register::TimerCnt, count));
    }
}

#[test]
fn before_linux_6_4_the_physical_count_stays_the_hosts() {
    let kvm = FakeKvm::before_6_4(9_000_000_000);
    let result = set_counts_by(&kvm, &kvm, &paused(&kvm, 77)).unwrap();
    assert_eq!(result.phys, None);
    assert_eq!(kvm.offsets()[1], 0);
    let virt = ahead(result.offset, kvm.offsets()[0]);
    assert!(result.virt.least <= virt && virt <= result.virt.most);
}

#[test]
fn a_count_that_kvm_drops_since_the_vms_offset_is_set_is_an_error() {
    let kvm = FakeKvm::new(9_000_000_000);
    apply_by(&kvm, &kvm, &kvm, &kvm.armed(1_000)).unwrap();
    match set_counts_by(&kvm, &kvm, &paused(&kvm, 77)).unwrap_err() {
        KvmError::CountDropped { register, bracket } => {
            assert_eq!(register, "TIMER_CNT");
            assert!(bracket.least > 8_000_000_000);
        }
        other => panic!("{other}"),
    }
    assert_eq!(kvm.offsets(), [1_000; 2]);
}

#[test]
fn a_vm_with_confirm_or_not_paused_or_of_unknown_count_is_refused() {
    let kvm = FakeKvm::new(1 << 40);
    let with_confirm = Info {
        confirm: true,
        ..paused(&kvm, 0)
    };
    assert!(matches!(
        set_counts(&kvm, &with_confirm).unwrap_err(),
        KvmError::Confirm
    ));
    let of_config_space = Info {
        host_count: 0,
        ..paused(&kvm, 0)
    };
    assert!(matches!(
        set_counts(&kvm, &of_config_space).unwrap_err(),
        KvmError::NoHostCount
    ));
    for phase in [Phase::New, Phase::Running, Phase::Restoring, Phase::Armed] {
        let info = Info {
            phase,
            ..paused(&kvm, 0)
        };
        let error = set_counts(&kvm, &info).unwrap_err();
        assert!(matches!(error, KvmError::Phase { found, .. } if found == phase));
    }
    assert!(kvm.writes.borrow().is_empty());
}
