//! SPEC.md, "Registers": reading and then writing the same values changes nothing, ever.

use vhost_user_timer_kit::contract::{
    ARM64, CNT, CTL, CVAL, PCNT, PCTL, PCVAL, Run, op, phase, restore, words,
};

use crate::world::{Clock, Vm, World};

scenarios! {
    both {
        reading_a_vm_and_writing_it_back_changes_nothing_a_thousand_times: "6.22";
        reading_a_frozen_clock_changes_nothing_at_all: "6.22";
        a_count_written_back_to_a_counting_clock_moves_nothing: "6.23" "6.22";
        a_count_read_while_running_can_be_written_back_where_the_pause_kept_counting: "6.23";
        writing_the_passed_through_physical_count_back_does_not_virtualise_it: "6.23" "4.10";
        a_count_read_before_the_clock_was_frozen_is_a_new_count_after: "6.23" "6.9";
        a_count_that_was_read_from_another_vcpu_only_is_a_new_count: "6.23" "6.24";
        only_the_last_count_read_is_known: "6.23";
        a_count_read_by_get_vm_is_known_of_every_vcpu: "6.24";
        a_vm_read_in_parts_can_be_written_back_vcpu_by_vcpu: "6.22" "6.24";
        what_was_read_from_a_vcpu_and_what_from_all_are_both_known: "6.23" "6.24";
        a_count_read_in_a_restore_that_was_aborted_does_not_hide_the_last_of_a_counting_clock:
            "6.23" "7.29";
        what_was_read_is_forgotten_once_the_clock_is_set: "6.23";
        reading_and_writing_back_in_a_restore_loses_no_time: "6.22" "7.12";
    }
}

/// A VM whose clocks count in PAUSED, the physical one its own.
fn counting(on: World, vcpus: u32) -> Vm {
    let mut vm = on.paused(vcpus);
    vm.set(0, &[(CNT, 1_000), (PCNT, 2_000)]);
    vm.resume();
    vm.pass(10);
    vm.pause_counting();
    vm
}

fn reading_a_vm_and_writing_it_back_changes_nothing_a_thousand_times(on: World) {
    let mut vm = on.paused(2);
    vm.set(
        0,
        &[
            (CNT, 5),
            (CTL, 1),
            (CVAL, 9),
            (PCNT, 6),
            (PCTL, 3),
            (PCVAL, 1),
        ],
    );
    let before = vm.snapshot();
    for n in 0..1_000 {
        let values = vm.get_all(n % 2);
        let entries: Vec<_> = ARM64.into_iter().zip(values).collect();
        vm.set(n % 2, &entries);
    }
    assert_eq!(vm.snapshot(), before);
}

fn reading_a_frozen_clock_changes_nothing_at_all(on: World) {
    let mut vm = on.paused(2);
    vm.set(0, &[(CNT, 4), (PCNT, 5)]);
    let before = vm.snapshot();
    let values = vm.get_all(1);
    vm.state();
    vm.vcpu(op::GET_REG_LIST, 0, &[]).ok(48);
    vm.info();
    assert_eq!(vm.snapshot(), before);
    let entries: Vec<_> = ARM64.into_iter().zip(values).collect();
    vm.set(1, &entries);
    assert_eq!(vm.snapshot(), before);
}

fn a_count_written_back_to_a_counting_clock_moves_nothing(on: World) {
    for register in [CNT, PCNT] {
        let mut vm = counting(on, 2);
        let offsets = vm.offsets();
        let read = vm.get_one(1, register);
        for _ in 0..2 {
            vm.pass(500);
            vm.set(1, &[(register, read)]);
            assert_eq!(vm.offsets(), offsets, "{register:#x}");
        }
    }
    // All of them read at one instant by GET_VM, and each written back, twice over.
    let mut vm = on.running(2);
    let run = vm.pause_counting();
    for _ in 0..2 {
        for vcpu in vm.state().vcpus {
            let entries: Vec<_> = ARM64.into_iter().zip(vcpu.registers).collect();
            vm.set(vcpu.vcpu, &entries);
            let info = vm.info();
            assert_eq!(
                (info.cntvoff, info.cntpoff, info.flags),
                (run.cntvoff, 0, 0)
            );
        }
    }
}

fn a_count_read_while_running_can_be_written_back_where_the_pause_kept_counting(on: World) {
    let mut vm = on.running(1);
    vm.pass(10);
    let offsets = vm.offsets();
    let read = vm.get_one(0, CNT);
    vm.pass(10);
    vm.pause_counting();
    vm.set(0, &[(CNT, read)]);
    vm.pass(10);
    assert_eq!(vm.offsets(), offsets);
}

fn writing_the_passed_through_physical_count_back_does_not_virtualise_it(on: World) {
    for wanted in [phase::PAUSED, phase::RUNNING] {
        let mut vm = on.in_phase(wanted, 1);
        let read = vm.get_one(0, PCNT);
        vm.pass(10);
        if wanted == phase::RUNNING {
            vm.pause();
        }
        vm.pass(10);
        vm.set(0, &[(PCNT, read)]);
        let info = vm.info();
        assert_eq!((info.flags, info.cntpoff), (0, 0));
        vm.set(0, &[(PCNT, read + 1)]);
        assert_eq!(vm.info().flags, 4);
        assert_eq!(vm.phys(), read + 1);
    }
}

fn a_count_read_before_the_clock_was_frozen_is_a_new_count_after(on: World) {
    let mut vm = on.running(1);
    vm.pass(10);
    let read = vm.get_one(0, CNT);
    vm.pass(10);
    let paused = vm.pause();
    assert!(paused.virt_count > read);
    vm.set(0, &[(CNT, read)]);
    assert_eq!(vm.virt(), read, "the VMM itself writes a smaller count");
}

/// The virtual clock is frozen at this count.
#[track_caller]
fn frozen_at(vm: &mut Vm, count: u64) {
    vm.pass(5);
    assert_eq!(vm.virt(), count);
}

fn a_count_that_was_read_from_another_vcpu_only_is_a_new_count(on: World) {
    let mut vm = counting(on, 2);
    let read = vm.get_one(0, CNT);
    vm.pass(500);
    vm.set(1, &[(CNT, read)]);
    frozen_at(&mut vm, read);
}

fn only_the_last_count_read_is_known(on: World) {
    let mut vm = counting(on, 1);
    let first = vm.get_one(0, CNT);
    vm.pass(500);
    vm.get_one(0, CNT);
    vm.set(0, &[(CNT, first)]);
    frozen_at(&mut vm, first);
}

fn a_count_read_by_get_vm_is_known_of_every_vcpu(on: World) {
    for (first, count) in [(0, 3), (1, 1), (0, 0)] {
        let mut vm = counting(on, 3);
        let offsets = vm.offsets();
        let read = vm.state_of(first, count).virt_count;
        for vcpu in 0..3 {
            vm.pass(500);
            vm.set(vcpu, &[(CNT, read)]);
        }
        assert_eq!(vm.offsets(), offsets);
    }
}

fn a_vm_read_in_parts_can_be_written_back_vcpu_by_vcpu(on: World) {
    let mut vm = counting(on, 4);
    let mut entries = Vec::new();
    for first in 0..4 {
        entries.extend(vm.state_of(first, 1).vcpus);
        vm.pass(100);
    }
    let offsets = vm.offsets();
    for vcpu in entries {
        let values: Vec<_> = ARM64.into_iter().zip(vcpu.registers).collect();
        vm.set(vcpu.vcpu, &values);
        vm.pass(100);
    }
    assert_eq!(vm.offsets(), offsets);
}

fn what_was_read_from_a_vcpu_and_what_from_all_are_both_known(on: World) {
    let mut vm = counting(on, 1);
    let offsets = vm.offsets();
    let own = vm.get_one(0, CNT);
    vm.pass(500);
    let all = vm.state_of(0, 1).virt_count;
    vm.pass(500);
    vm.set(0, &[(CNT, own)]);
    vm.set(0, &[(CNT, all)]);
    assert_eq!(vm.offsets(), offsets);
}

fn a_count_read_in_a_restore_that_was_aborted_does_not_hide_the_last_of_a_counting_clock(
    on: World,
) {
    let mut vm = counting(on, 1);
    let offsets = vm.offsets();
    let read = vm.get_one(0, CNT);
    vm.pass(100);
    vm.restore_begin(1, 0);
    vm.get_one(0, CNT);
    vm.abort();
    vm.set(0, &[(CNT, read)]);
    assert_eq!(vm.offsets(), offsets);
}

fn what_was_read_is_forgotten_once_the_clock_is_set(on: World) {
    let mut vm = counting(on, 1);
    let read = vm.get_one(0, CNT);
    vm.set(0, &[(CNT, 5_000)]);
    vm.set(0, &[(CNT, read)]);
    vm.pass(100);
    frozen_at(&mut vm, read);
}

fn reading_and_writing_back_in_a_restore_loses_no_time(on: World) {
    let mut vm = on.running(2);
    let paused = vm.pause();
    for n in 0..100 {
        let last = n == 99;
        vm.restore_begin(2, if last { restore::AUTORUN } else { 0 });
        for vcpu in [n % 2, 1 - n % 2] {
            let values = vm.get(vcpu, &[CTL, CNT, CVAL]);
            vm.set(
                vcpu,
                &[(CTL, values[0]), (CNT, values[1]), (CVAL, values[2])],
            );
            if !last || vcpu == n % 2 {
                vm.restore_done(vcpu);
            }
        }
        if !last {
            assert_eq!(vm.get_one(0, CNT), paused.virt_count);
        }
    }
    let waiter = vm.wait(0);
    let (_, released) = vm.releasing((op::RESTORE_DONE, 0, &words(&[])), &[waiter]);
    let run = Run::of(released[0].ok(40));
    assert_eq!(run.virt_count, paused.virt_count);
    vm.reads_now(Clock::Virtual, |vm| vm.get_one(1, CNT));
}
