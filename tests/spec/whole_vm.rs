//! GET_VM and SET_VM (SPEC.md, "Operations"): the whole VM at one instant.

use vhost_user_timer_kit::contract::{
    ARM, ARM64, CNT, CTL, CVAL, PCNT, PCTL, PCVAL, VM, Vcpu, op, phase, range_body, request,
    restore, status,
};

use crate::world::{HZ, World, vm_body};

scenarios! {
    both {
        get_vm_is_both_counts_and_the_six_registers_of_each_vcpu_at_one_instant:
            "5.6" "5.27" "5.28" "5.42" "5.43" "2.16";
        get_vm_takes_any_range_within_the_vm_and_no_other: "5.6" "5.26";
        the_largest_vm_is_got_and_set_in_one_request: "5.6" "5.7";
        set_vm_stages_what_set_regs_stages: "5.7" "7.7";
        set_vm_sets_only_what_is_present: "5.44" "7.8" "2.36";
        set_vm_of_an_unknown_vcpu_or_present_bit_is_einval_with_the_index_and_sets_nothing:
            "6.17" "2.35" "2.52";
        set_vm_with_a_vcpu_that_is_done_is_ebusy_and_sets_nothing: "6.14" "2.34" "2.52";
        set_vm_of_a_u32_register_with_more_than_32_bits_is_einval: "6.5" "2.52";
        get_vm_in_a_restore_reads_what_each_vcpu_brought: "6.11";
        no_count_goes_back_over_a_restore_of_what_was_saved: "7.12" "7.21";
    }
}

fn get_vm_is_both_counts_and_the_six_registers_of_each_vcpu_at_one_instant(on: World) {
    let mut vm = on.paused(5);
    for vcpu in 0..5 {
        let cval = 1_000 + u64::from(vcpu);
        vm.set(
            vcpu,
            &[(CVAL, cval), (CTL, 1), (PCVAL, cval + 1), (PCTL, 3)],
        );
    }
    vm.resume();
    vm.pass(1_001);
    for (first, count) in [(0, 5), (1, 3), (4, 1), (5, 0)] {
        let before = vm.info();
        let state = vm.state_of(first, count);
        let after = vm.info();
        assert_eq!((state.first, state.count), (first, count));
        assert_eq!(state.frequency, HZ);
        assert!((before.host_count..=after.host_count).contains(&state.host_count));
        assert_eq!(state.virt_count, state.host_count - before.cntvoff);
        assert_eq!(state.phys_count, state.host_count);
        let expected: Vec<_> = (first..first + count)
            .map(|vcpu| {
                let cval = 1_000 + u64::from(vcpu);
                let istatus = u64::from(state.virt_count >= cval) << 2;
                let values = [
                    1 | istatus,
                    state.virt_count,
                    cval,
                    7,
                    state.phys_count,
                    cval + 1,
                ];
                Vcpu::with(vcpu, values)
            })
            .collect();
        assert_eq!(state.vcpus, expected);
        if vm.model().is_some() {
            assert_eq!(state.virt_count, 1_001);
        }
    }
}

fn get_vm_takes_any_range_within_the_vm_and_no_other(on: World) {
    let mut vm = on.paused(4);
    for first in 0..6 {
        for count in 0..6 {
            let answer = vm.vm(op::GET_VM, &range_body(first, count));
            if first + count <= 4 {
                answer.ok(40 + 56 * count as usize);
                let state = vm.state_of(first, count);
                let named: Vec<u32> = state.vcpus.iter().map(|vcpu| vcpu.vcpu).collect();
                assert_eq!(named, (first..first + count).collect::<Vec<_>>());
            } else {
                assert_eq!(answer.outcome(), (status::EINVAL, 0), "{first}+{count}");
            }
        }
    }
    for (first, count) in [(u32::MAX, 1), (1, u32::MAX), (u32::MAX, u32::MAX)] {
        let outcome = vm.refused(op::GET_VM, VM, &range_body(first, count));
        assert_eq!(outcome, (status::EINVAL, 0));
    }
}

fn the_largest_vm_is_got_and_set_in_one_request(on: World) {
    let mut vm = on.paused(4096);
    let vcpus = vm.state().vcpus;
    vm.restore_begin(4096, 0);
    let set = request(op::SET_VM, VM, 0, &vm_body(&vcpus));
    assert!(set.len() <= 256 * 1024);
    vm.raw(&set, 16).ok(0);
    for vcpu in 0..4096 {
        assert_eq!(vm.restore_done(vcpu), 4095 - vcpu);
    }
    assert_eq!(vm.phase(), phase::PAUSED);
}

fn set_vm_stages_what_set_regs_stages(on: World) {
    let entries = [0, 1, 2].map(|vcpu| {
        let n = u64::from(vcpu);
        Vcpu::with(vcpu, [1, 100 + n, 200 + n, 3, 300 + n, 400 + n])
    });
    let mut by_regs = on.restoring(3, 0);
    for entry in entries {
        let registers: Vec<_> = ARM64.into_iter().zip(entry.registers).collect();
        by_regs.set(entry.vcpu, &registers);
    }
    let staged = by_regs.snapshot();
    // All at once, and in pieces, in any order.
    let all: &[&[usize]] = &[&[2, 0, 1]];
    for pieces in [all, &[&[0, 1, 2]], &[&[2], &[0], &[1]], &[&[1, 2], &[0]]] {
        let mut vm = on.restoring(3, 0);
        for piece in pieces {
            let piece: Vec<_> = piece.iter().map(|n| entries[*n]).collect();
            vm.set_vm(&piece);
        }
        if vm.model().is_some() {
            assert_eq!(vm.snapshot(), staged);
        }
        for vcpu in 0..3 {
            vm.restore_done(vcpu);
        }
        for vcpu in 0..3 {
            let n = u64::from(vcpu);
            assert_eq!(vm.get_all(vcpu), [1, 102, 200 + n, 3, 302, 400 + n]);
        }
    }
}

fn set_vm_sets_only_what_is_present(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(CTL, 2), (CVAL, 9), (PCVAL, 6)]);
    vm.restore_begin(1, 0);
    let mut entry = Vcpu::with(0, [1, 50, 70, 1, 80, 90]);
    entry.present = 0b00_0010;
    vm.set_vm(&[entry]);
    assert_eq!(vm.get(0, &[CTL, CNT, CVAL]), [2, 50, 9]);
    assert_eq!(
        vm.refused(op::RESTORE_DONE, 0, &[]),
        (status::ENODATA, 0b101)
    );
    (entry.present, entry.registers[2]) = (0b00_0100, 8);
    vm.set_vm(&[entry]);
    assert_eq!(
        vm.refused(op::RESTORE_DONE, 0, &[]),
        (status::ENODATA, 0b001)
    );
    (entry.present, entry.registers) = (1, [2, 0, 0, 0, 0, 0]);
    vm.set_vm(&[entry]);
    vm.restore_done(0);
    assert_eq!(vm.get(0, &[CTL, CNT, CVAL, PCVAL]), [2, 50, 8, 6]);
    assert_eq!(vm.info().flags, 0, "no physical count was present");
}

fn set_vm_of_an_unknown_vcpu_or_present_bit_is_einval_with_the_index_and_sets_nothing(on: World) {
    let good = |vcpu| Vcpu::with(vcpu, [1, 2, 3, 1, 5, 6]);
    let unknown_bit = |bit: u32| Vcpu {
        present: 0x3f | 1 << bit,
        ..good(1)
    };
    let only_unknown = Vcpu {
        present: 0x40,
        ..good(1)
    };
    let mut vm = on.restoring(3, 0);
    let before = vm.snapshot();
    for bad in [
        good(3),
        good(u32::MAX),
        unknown_bit(6),
        unknown_bit(31),
        only_unknown,
        good(0),
    ] {
        let outcome = vm.refused(op::SET_VM, VM, &vm_body(&[good(0), bad]));
        assert_eq!(outcome, (status::EINVAL, 1), "{bad:?}");
        let outcome = vm.refused(op::SET_VM, VM, &vm_body(&[good(0), good(2), bad]));
        assert_eq!(outcome, (status::EINVAL, 2), "{bad:?}");
    }
    // A vCPU named twice is refused even where both entries say the same, or nothing.
    let nothing = Vcpu {
        present: 0,
        ..Vcpu::with(0, [0; 6])
    };
    let outcome = vm.refused(op::SET_VM, VM, &vm_body(&[nothing, good(1), nothing]));
    assert_eq!(outcome, (status::EINVAL, 2));
    assert_eq!(vm.snapshot(), before);
    assert_eq!(vm.refused(op::RESTORE_DONE, 0, &[]), (status::ENODATA, 7));
}

fn set_vm_with_a_vcpu_that_is_done_is_ebusy_and_sets_nothing(on: World) {
    let mut vm = on.restoring(3, 0);
    vm.restored(1, 5);
    let before = vm.snapshot();
    let entries = [0, 1, 2].map(|vcpu| Vcpu::with(vcpu, [1; 6]));
    for body in [vm_body(&entries), vm_body(&[entries[2], entries[1]])] {
        assert_eq!(vm.refused(op::SET_VM, VM, &body), (status::EBUSY, 2));
    }
    assert_eq!(vm.snapshot(), before);
    assert_eq!(vm.refused(op::RESTORE_DONE, 0, &[]), (status::ENODATA, 7));
    vm.set_vm(&[entries[0], entries[2]]);
}

fn set_vm_of_a_u32_register_with_more_than_32_bits_is_einval(on: World) {
    let mut vm = on.paused_arm(2);
    vm.restore_begin(2, 0);
    let good = Vcpu::with(0, [3, 1 << 40, 1 << 40, 3, 1 << 40, 1 << 40]);
    for registers in [[1 << 32, 0, 0, 0, 0, 0], [0, 0, 0, 1 << 32, 0, 0]] {
        let mut bad = Vcpu::with(1, registers);
        let outcome = vm.refused(op::SET_VM, VM, &vm_body(&[good, bad]));
        assert_eq!(outcome, (status::EINVAL, 1));
        bad.present = 0b00_0100;
        vm.set_vm(&[bad]);
    }
    vm.set_vm(&[good]);
    assert_eq!(vm.get_one(0, ARM[0]), 7);
}

fn get_vm_in_a_restore_reads_what_each_vcpu_brought(on: World) {
    let mut vm = on.running(2);
    vm.pass(40);
    let paused = vm.pause();
    vm.restore_begin(2, 0);
    vm.set(0, &[(CNT, 7), (PCNT, 8)]);
    let [virt, phys] = vm.counts();
    assert_eq!(virt, paused.virt_count);
    vm.pass(10);
    let state = vm.state();
    assert_eq!([state.virt_count, state.phys_count], [virt, phys]);
    let counts: Vec<_> = state
        .vcpus
        .iter()
        .map(|v| [v.registers[1], v.registers[4]])
        .collect();
    assert_eq!(counts, [[7, 8], [virt, phys]]);
}

fn no_count_goes_back_over_a_restore_of_what_was_saved(on: World) {
    let mut vm = on.running(2);
    let mut last = 0;
    for _ in 0..20 {
        vm.pass(1);
        vm.pause();
        let saved = vm.state();
        assert!(saved.virt_count > last);
        last = saved.virt_count;
        vm.restore_begin(2, restore::AUTORUN);
        vm.set_vm(&saved.vcpus);
        vm.restore_done(1);
        let waiter = vm.wait(0);
        let (_, released) = vm.releasing((op::RESTORE_DONE, 0, &[]), &[waiter]);
        let run = vhost_user_timer_kit::contract::Run::of(released[0].ok(40));
        assert_eq!(run.virt_count, last);
    }
}
