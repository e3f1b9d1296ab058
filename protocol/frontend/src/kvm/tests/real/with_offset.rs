//! A kernel with KVM_CAP_COUNTER_OFFSET, in whatever mode.

use std::time::{Duration, Instant};

use kvm_bindings::KVM_ARM_VCPU_POWER_OFF;
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{COUNT, Registers, ahead, armed_at, kvm_with_offset, small_vm, target, vcpu, vm_of};
use crate::Info;
use crate::kvm::{KvmError, apply, set_counts};
use vhost_user_timer_protocol::{Phase, Register};

/// A VM with two vCPUs whose offset is in KVM, and the offset.
fn vm_with_offset() -> Option<(VmFd, [VcpuFd; 2], u64)> {
    let (vm, vcpus) = vm_of(&kvm_with_offset(true)?);
    let info = armed_at(COUNT);
    apply(&vm, &vcpus[0], &info).unwrap();
    Some((vm, vcpus, info.cntvoff))
}

fn assert_in_effect(vcpu: &VcpuFd, register: Register, offset: u64) {
    let bracket = ahead(vcpu, register, offset);
    assert!(bracket.contains_zero(), "{register}: {bracket}");
}

#[test]
fn the_offset_is_in_effect_on_every_vcpu_and_the_next_one_replaces_it() {
    let Some(kvm) = kvm_with_offset(true) else {
        return;
    };
    let (vm, vcpus) = vm_of(&kvm);
    for count in [COUNT, 5, u64::MAX - 3] {
        let info = armed_at(count);
        let applied = apply(&vm, &vcpus[1], &info).unwrap();
        assert_eq!(applied.offset, info.cntvoff);
        println!("TIMER_CNT {}, PTIMER_CNT {}", applied.virt, applied.phys);
        for vcpu in &vcpus {
            for register in [Register::TimerCnt, Register::PtimerCnt] {
                assert_in_effect(vcpu, register, info.cntvoff);
            }
        }
    }
}

#[test]
fn after_the_offset_kvm_drops_counts_and_a_late_vcpu_keeps_them() {
    let Some((vm, vcpus, offset)) = vm_with_offset() else {
        return;
    };
    vcpus[0].set_one_reg_of(Register::TimerCnt, 0);
    vcpus[1].set_one_reg_of(Register::PtimerCnt, 0);
    let late = vcpu(&vm, 2, &[]);
    for vcpu in vcpus.iter().chain([&late]) {
        assert_in_effect(vcpu, Register::TimerCnt, offset);
    }
    // So a count that is written one by one is seen to be dropped.
    let paused = Info {
        phase: Phase::Paused,
        confirm: false,
        ..armed_at(0)
    };
    let error = set_counts(&vcpus[0], &paused).unwrap_err();
    assert!(matches!(error, KvmError::CountDropped { .. }), "{error}");
}

#[test]
fn a_vcpu_that_is_reset_loses_its_timers_and_keeps_the_offset() {
    let Some((vm, vcpus, offset)) = vm_with_offset() else {
        return;
    };
    vcpus[1].set_one_reg_of(Register::TimerCtl, 1);
    vcpus[1].vcpu_init(&target(&vm, &[])).unwrap();
    assert_eq!(vcpus[1].get_one_reg_of(Register::TimerCtl) & 1, 0);
    assert_in_effect(&vcpus[1], Register::TimerCnt, offset);
}

#[test]
fn an_offset_of_another_vm_than_the_vcpus_is_not_in_effect() {
    let Some(kvm) = kvm_with_offset(true) else {
        return;
    };
    let (vm, _) = vm_of(&kvm);
    let (_other, vcpus) = vm_of(&kvm);
    let error = apply(&vm, &vcpus[0], &armed_at(COUNT)).unwrap_err();
    assert!(matches!(error, KvmError::NotInEffect { .. }), "{error}");
}

#[test]
fn a_vcpu_in_kvm_run_even_powered_off_is_an_error_until_it_is_out() {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut std::ffi::c_void) {}
    const EINTR: i32 = 4;

    let Some(kvm) = kvm_with_offset(true) else {
        return;
    };
    let vm = small_vm(&kvm);
    let stopped = vcpu(&vm, 0, &[]);
    let mut off = vcpu(&vm, 1, &[KVM_ARM_VCPU_POWER_OFF]);
    register_signal_handler(SIGRTMIN(), nothing).unwrap();
    let in_kvm_run = std::thread::spawn(move || off.run().map(|_| ()));

    let deadline = Instant::now() + Duration::from_secs(60);
    let attempt = || {
        assert!(Instant::now() < deadline);
        apply(&vm, &stopped, &armed_at(COUNT))
    };
    let busy = loop {
        if let Err(error) = attempt() {
            break error;
        }
    };
    assert!(matches!(busy, KvmError::VcpuBusy), "{busy}");
    // A signal that comes just before KVM_RUN has no effect, so more than one may be needed.
    while !in_kvm_run.is_finished() {
        in_kvm_run.kill(SIGRTMIN()).unwrap();
        std::thread::yield_now();
    }
    assert_eq!(in_kvm_run.join().unwrap().unwrap_err().errno(), EINTR);
    attempt().unwrap();
}
