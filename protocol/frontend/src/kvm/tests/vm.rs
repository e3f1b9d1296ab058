use super::super::{KvmError, paused_vm, save_vcpu, save_vm};
use super::{FREQUENCY, FakeKvm, armed};
use crate::{Info, Run, SavedVmError};
use vhost_user_timer_protocol::{Phase, Register};

const PAUSED: Run = Run {
    cntvoff: 0,
    cntpoff: 0,
    virt_count: 1_000,
    phys_count: 1_000,
    host_count: 5_000,
};

fn info_of(vcpus: u32) -> Info {
    Info {
        phase: Phase::Paused,
        vcpus,
        ..armed(5_000, FREQUENCY, 4_000)
    }
}

#[test]
fn a_vm_is_saved_with_the_timers_of_kvm_and_the_counts_of_the_pause() {
    let kvm = [FakeKvm::new(1 << 40), FakeKvm::new(1 << 41)];
    super::super::restore_vcpu(&kvm[1], &super::registers::saved()).unwrap();
    let vm = save_vm(&kvm, &PAUSED, &info_of(2)).unwrap();
    assert_eq!(vm.frequency().get(), FREQUENCY);
    assert_eq!((vm.virt_count(), vm.phys_count()), (1_000, 1_000));
    assert!(vm.realtime_ns() > 0);
    for vcpu in vm.vcpus() {
        assert_eq!(vcpu.get(Register::TimerCnt), Some(1_000));
        assert_eq!(vcpu.get(Register::PtimerCnt), Some(1_000));
    }
    assert_eq!(vm.vcpus()[1].get(Register::TimerCval), Some(900));
    assert_eq!(vm.vcpus()[1].index(), 1);
}

#[test]
fn before_linux_6_4_no_physical_count_is_saved() {
    let kvm = FakeKvm::before_6_4(1 << 40);
    let vm = save_vm([&kvm], &PAUSED, &info_of(1)).unwrap();
    assert_eq!(vm.vcpus()[0].get(Register::TimerCnt), Some(1_000));
    assert_eq!(vm.vcpus()[0].get(Register::PtimerCnt), None);
}

#[test]
fn vcpus_that_are_not_those_of_the_vm_are_not_saved() {
    let kvm = FakeKvm::new(0);
    let vcpu = |index| save_vcpu(&kvm, index).unwrap();
    let refused = |vcpus| paused_vm(vcpus, &PAUSED, &info_of(2)).unwrap_err();
    assert!(matches!(
        refused(vec![vcpu(0)]),
        KvmError::VcpuCount { saved: 1, vm: 2 }
    ));
    let order = SavedVmError::VcpuOrder {
        expected: 0,
        found: 1,
    };
    match refused(vec![vcpu(1), vcpu(0)]) {
        KvmError::Saved(error) => assert_eq!(error, order),
        other => panic!("{other}"),
    }
}
