use std::error::Error;

use proptest::prelude::*;

use super::super::{KvmError, restore_vcpu, save_vcpu, timer_register, timers_among};
use super::{CNTVOFF_EL2, FakeKvm};
use crate::{RegValue, SavedVcpu, SavedVmError};
use vhost_user_timer_protocol::{Abi, Register};

/// Ids that are no timer's: PC, a core register; SCTLR_EL1; CNTKCTL_EL1.
const OTHERS: [u64; 3] = [
    0x6030_0000_0010_0040,
    0x6030_0000_0013_c080,
    0x6030_0000_0013_c708,
];

pub(super) fn saved() -> SavedVcpu {
    let values = [0x5, 1_000, 900, 0x3, 2_000, u64::MAX];
    let registers = Register::ALL.into_iter().zip(values);
    registers.fold(SavedVcpu::new(3), |vcpu, (register, value)| {
        vcpu.with(register, value)
    })
}

#[test]
fn a_vcpu_is_written_back_cval_before_ctl_without_counts_and_without_istatus() {
    let kvm = FakeKvm::new(1 << 40);
    let offsets = kvm.offsets();
    restore_vcpu(&kvm, &saved()).unwrap();
    let expected = [
        (Register::TimerCval, 900),
        (Register::TimerCtl, 0x1),
        (Register::PtimerCval, u64::MAX),
        (Register::PtimerCtl, 0x3),
    ];
    assert_eq!(*kvm.writes.borrow(), expected);
    assert_eq!(kvm.offsets(), offsets);
}

#[test]
fn what_is_read_of_a_vcpu_that_was_written_back_is_what_was_saved_but_for_counts_and_istatus() {
    let kvm = FakeKvm::new(0);
    restore_vcpu(&kvm, &saved()).unwrap();
    let again = save_vcpu(&kvm, 3).unwrap();
    assert_eq!(again.index(), 3);
    for register in [
        Register::TimerCval,
        Register::PtimerCtl,
        Register::PtimerCval,
    ] {
        assert_eq!(again.get(register), saved().get(register));
    }
    assert_eq!(again.get(Register::TimerCtl), Some(1));
    assert!(again.get(Register::TimerCnt).is_some());
    assert!(again.get(Register::PtimerCnt).is_some());
}

#[test]
fn registers_that_are_not_known_are_left_alone() {
    let kvm = FakeKvm::new(0);
    let control = SavedVcpu::new(0).with(Register::TimerCtl, 1);
    restore_vcpu(&kvm, &control).unwrap();
    restore_vcpu(&kvm, &SavedVcpu::new(0)).unwrap();
    assert_eq!(*kvm.writes.borrow(), [(Register::TimerCtl, 1)]);
}

#[test]
fn before_linux_6_4_a_vcpu_has_no_physical_timer_and_needs_none_that_is_off() {
    let kvm = FakeKvm::before_6_4(0);
    let read = save_vcpu(&kvm, 0).unwrap();
    let known = Register::ALL.map(|register| read.get(register).is_some());
    assert_eq!(known, [true, true, true, false, false, false]);

    let off = saved().with(Register::PtimerCtl, 0x2);
    restore_vcpu(&kvm, &off).unwrap();
    let written = [(Register::TimerCval, 900), (Register::TimerCtl, 1)];
    assert_eq!(*kvm.writes.borrow(), written);
    assert!(matches!(
        restore_vcpu(&kvm, &saved()).unwrap_err(),
        KvmError::NoPhysicalTimer { vcpu: 3 }
    ));
}

#[test]
fn a_vcpu_with_el2_is_neither_saved_nor_restored() {
    let kvm = FakeKvm {
        has_el2: true,
        ..FakeKvm::new(0)
    };
    let refused = |error: KvmError| match error {
        KvmError::El2Guest { register } => assert_eq!(register, "CNTVOFF_EL2"),
        other => panic!("{other}"),
    };
    refused(save_vcpu(&kvm, 0).unwrap_err());
    refused(restore_vcpu(&kvm, &saved()).unwrap_err());
    refused(timers_among([RegValue::new(CNTVOFF_EL2, 0)], 0).unwrap_err());
    assert!(kvm.writes.borrow().is_empty());
}

#[test]
fn an_error_of_kvm_names_the_register_and_what_to_do() {
    const ENOEXEC: i32 = 8;
    let kvm = FakeKvm {
        register_error: Some(ENOEXEC),
        ..FakeKvm::new(0)
    };
    let error = save_vcpu(&kvm, 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot read CNTVOFF_EL2 of a vCPU: the vCPU needs KVM_ARM_VCPU_INIT first"
    );
    assert!(error.source().is_some());
}

#[test]
fn the_timer_registers_are_told_from_all_the_others() {
    for register in Register::ALL {
        assert_eq!(timer_register(register.id(Abi::Arm64)), Some(register));
    }
    for id in OTHERS {
        assert_eq!(timer_register(id), None);
    }
}

#[test]
fn a_register_that_is_listed_twice_is_an_error() {
    let twice = [RegValue::new(Register::TimerCtl.id(Abi::Arm64), 1); 2];
    assert!(matches!(
        timers_among(twice, 0).unwrap_err(),
        KvmError::Saved(SavedVmError::RepeatedRegister(_))
    ));
}

proptest! {
    /// KVM_GET_REG_LIST's order differs between kernel versions.
    #[test]
    fn the_order_in_which_kvm_lists_registers_never_matters(
        regs in Just(
            saved()
                .regs(Abi::Arm64)
                .chain(OTHERS.map(|id| RegValue::new(id, 7)))
                .collect::<Vec<_>>(),
        )
        .prop_shuffle()
    ) {
        let vcpu = timers_among(regs, 3).unwrap();
        prop_assert_eq!(vcpu, saved());
        let kvm = FakeKvm::new(0);
        restore_vcpu(&kvm, &vcpu).unwrap();
        let in_order = FakeKvm::new(0);
        restore_vcpu(&in_order, &saved()).unwrap();
        prop_assert_eq!(&*kvm.writes.borrow(), &*in_order.writes.borrow());
    }
}
