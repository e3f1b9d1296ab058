//! A vCPU's registers, on every kernel.

use kvm_ioctls::Cap;

use super::{kvm, vm_of};
use crate::kvm::{OneReg, restore_vcpu, save_vcpu, timer_register, timers_among};
use crate::{RegValue, SavedVcpu};
use vhost_user_timer_protocol::Register;

#[test]
fn what_is_read_of_a_vcpu_is_what_was_written_back_but_for_counts_and_istatus() {
    let Some(kvm) = kvm() else { return };
    let (_vm, [vcpu, _]) = vm_of(&kvm);
    let fresh = save_vcpu(&vcpu, 0).unwrap();
    let has_physical = fresh.get(Register::PtimerCtl).is_some();
    assert_eq!(has_physical, kvm.check_extension(Cap::CounterOffset));
    let mut saved = SavedVcpu::new(0)
        .with(Register::TimerCtl, 0x1)
        .with(Register::TimerCval, 1 << 62);
    if has_physical {
        saved.set(Register::PtimerCtl, 0x3);
        saved.set(Register::PtimerCval, u64::MAX);
    }
    restore_vcpu(&vcpu, &saved).unwrap();
    let first = save_vcpu(&vcpu, 0).unwrap();
    restore_vcpu(&vcpu, &first).unwrap();
    let second = save_vcpu(&vcpu, 0).unwrap();
    for register in Register::ALL {
        let [first, second] = [first, second].map(|vcpu| vcpu.get(register));
        match register {
            Register::TimerCnt | Register::PtimerCnt => assert!(second >= first, "{register}"),
            Register::TimerCtl | Register::PtimerCtl => {
                let stored = |value: Option<u64>| value.map(|value| value & 0x3);
                assert_eq!(stored(first), saved.get(register), "{register}");
                assert_eq!(stored(second), saved.get(register), "{register}");
            }
            _ => {
                assert_eq!(first, saved.get(register), "{register}");
                assert_eq!(second, saved.get(register), "{register}");
            }
        }
    }
}

#[test]
fn the_timers_among_all_registers_that_kvm_lists_are_those_that_are_read_one_by_one() {
    let Some(kvm) = kvm() else { return };
    let (_vm, [vcpu, _]) = vm_of(&kvm);
    let mut list = kvm_bindings::RegList::new(500).unwrap();
    vcpu.get_reg_list(&mut list).unwrap();
    let ids = list.as_slice();
    let regs = ids.iter().filter_map(|&id| {
        let value = OneReg::get_one_reg(&vcpu, id).ok()?;
        Some(RegValue::new(id, value))
    });
    let listed = timers_among(regs, 0).unwrap();
    let read = save_vcpu(&vcpu, 0).unwrap();
    for register in Register::ALL {
        assert_eq!(listed.get(register).is_some(), read.get(register).is_some());
    }
    let order: Vec<_> = ids.iter().filter_map(|&id| timer_register(id)).collect();
    println!("KVM_GET_REG_LIST: {order:?}");
}
