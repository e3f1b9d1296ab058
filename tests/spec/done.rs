//! SPEC.md, "DONE": registers and RESTORE_DONE in one request, all or nothing.

use vhost_user_timer_kit::contract::{
    ARM, ARM64, CNT, CTL, CVAL, DONE, PCNT, PCTL, PCVAL, Run, VM, Vcpu, configure, op, phase,
    regs_body, request_with, restore, status, words,
};

use crate::world::{MS, World, one_of_each, vm_body};

scenarios! {
    both {
        set_regs_with_done_is_restore_done_of_its_vcpu: "7.34" "7.36" "5.5";
        set_vm_with_done_is_restore_done_of_every_vcpu_named: "7.34" "7.36" "5.7";
        what_was_set_before_counts_towards_done: "7.34" "7.8";
        a_whole_vm_is_restored_by_two_requests: "7.34";
        done_with_what_is_pinned_needs_no_count: "7.9" "7.34" "7.40";
        a_refusal_stages_nothing_of_the_request: "7.35" "2.52";
        without_room_nothing_is_done: "7.35" "2.33" "2.50";
        enodata_and_then_stricts_einval_come_after_the_values: "2.36" "2.50" "7.13" "7.35";
        strict_settles_what_the_request_brings: "7.13" "7.34";
        lines_are_those_after_the_settlement: "7.37";
        done_outside_a_restore_is_ebusy: "7.38";
        done_of_another_operation_is_einval: "2.53";
        without_entries_done_is_restore_done: "7.39" "6.19";
        what_was_carried_out_can_be_sent_again: "7.40";
        what_a_done_vcpu_does_not_have_is_ebusy: "7.41";
        in_a_restores_armed_a_vcpu_has_what_it_brought_and_what_was_written_since:
            "7.40" "7.41" "5.7";
        some_of_set_vms_vcpus_may_be_done_already: "7.40" "7.41";
    }
}

/// What a vCPU must bring.
fn needed(count: u64) -> [(u64, u64); 3] {
    [(CTL, 1), (CNT, count), (CVAL, u64::MAX)]
}

/// A row of SET_VM with what a vCPU must bring.
fn row(vcpu: u32, count: u64) -> Vcpu {
    Vcpu {
        vcpu,
        present: 7,
        registers: [1, count, u64::MAX, 0, 0, 0],
    }
}

fn set_regs_with_done_is_restore_done_of_its_vcpu(on: World) {
    let mut vm = on.restoring(3, restore::AUTORUN);
    assert_eq!(vm.set_done(2, &needed(700)), (0, 0, 2));
    assert_eq!(vm.info().restored, 1);
    assert_eq!(vm.set_refused(2, &[(CTL, 0)]), (status::EBUSY, 2));
    assert_eq!(vm.set_done(0, &needed(900)), (0, 0, 1));
    let waiter = vm.wait(1);
    let bytes = request_with(op::SET_REGS, DONE, 1, 0, &regs_body(&needed(800)));
    let (answer, released) = vm.releasing_bytes(&bytes, &[waiter]);
    assert_eq!(answer.ok(12), [0; 12]);
    assert_eq!(Run::of(released[0].ok(40)).virt_count, 900);
    assert_eq!(vm.phase(), phase::RUNNING);
}

fn set_vm_with_done_is_restore_done_of_every_vcpu_named(on: World) {
    let mut vm = on.restoring(4, 0);
    assert_eq!(vm.set_vm_done(&[row(3, 10), row(1, 30)]), 2);
    assert_eq!(vm.info().restored, 2);
    assert_eq!(vm.set_vm_done(&[row(0, 20), row(2, 5)]), 0);
    assert_eq!((vm.phase(), vm.virt()), (phase::PAUSED, 30));
}

fn what_was_set_before_counts_towards_done(on: World) {
    let mut vm = on.restoring(2, 0);
    vm.set(0, &[(CTL, 1), (CNT, 4)]);
    assert_eq!(vm.set_done(0, &[(CVAL, 5)]), (0, 0, 1));
    vm.set_vm(&[row(1, 8)]);
    let later = Vcpu {
        present: 2,
        ..row(1, 7)
    };
    assert_eq!(vm.set_vm_done(&[later]), 0);
    assert_eq!(vm.virt(), 7, "the later count of vCPU 1");
}

fn a_whole_vm_is_restored_by_two_requests(on: World) {
    for (flags, ends) in [(0, phase::RUNNING), (configure::CONFIRM, phase::ARMED)] {
        let mut vm = on.configured(4_096, flags);
        vm.restore_begin(4_096, restore::AUTORUN);
        let rows: Vec<_> = (0..4_096).map(|vcpu| row(vcpu, 1_000)).collect();
        assert_eq!(vm.set_vm_done(&rows), 0);
        assert_eq!(vm.phase(), ends);
        assert!(vm.virt() >= 1_000);
    }
}

fn done_with_what_is_pinned_needs_no_count(on: World) {
    let mut vm = on.restoring(2, restore::STRICT);
    vm.set_offset(50);
    assert_eq!(vm.set_done(0, &[(CTL, 0), (CVAL, 1)]), (0, 0, 1));
    // Ignored counts are not compared.
    let again = [(CTL, 0), (CVAL, 1), (CNT, 9), (PCNT, 9)];
    assert_eq!(vm.set_done(0, &again), (0, 2, 1));
    assert_eq!(vm.set_done(1, &[(CTL, 0), (CVAL, 1), (CNT, 3)]).1, 1);
    assert_eq!((vm.phase(), vm.offsets()), (phase::PAUSED, [50, 50]));
}

fn a_refusal_stages_nothing_of_the_request(on: World) {
    let mut vm = on.restoring(3, restore::STRICT);
    vm.restored(0, 100);
    let before = vm.snapshot();
    let short = Vcpu {
        present: 3,
        ..row(2, 100)
    };
    let unknown = Vcpu {
        present: 0x40,
        ..row(2, 100)
    };
    for (rows, outcome) in [
        (vec![row(1, 100), short], (status::ENODATA, 4)),
        (vec![row(1, 100), unknown], (status::EINVAL, 1)),
        (vec![row(1, 100), row(3, 100)], (status::EINVAL, 1)),
        (vec![row(1, 100), row(1, 100)], (status::EINVAL, 1)),
        (vec![row(1, 100), row(2, 101)], (status::EINVAL, 0)),
        (vec![row(1, 100), row(0, 101)], (status::EBUSY, 2)),
    ] {
        let answer = vm.ask_done(op::SET_VM, VM, &vm_body(&rows));
        assert_eq!(answer.outcome(), outcome, "{rows:?}");
        assert_eq!(vm.snapshot(), before, "{rows:?}");
    }
    for (entries, outcome) in [
        (vec![(CTL, 1), (CNT, 100)], (status::ENODATA, 4)),
        (vec![(CTL, 1), (CNT, 100), (7, 0)], (status::ENOENT, 2)),
        (vec![(CTL, 1), (CTL, 2)], (status::EINVAL, 1)),
        (vec![(CTL, 1), (ARM[0], 2)], (status::EINVAL, 1)),
    ] {
        let answer = vm.ask_done(op::SET_REGS, 1, &regs_body(&entries));
        assert_eq!(answer.outcome(), outcome, "{entries:?}");
        assert_eq!(vm.snapshot(), before, "{entries:?}");
    }
    assert_eq!(vm.set_vm_done(&[row(1, 100), row(2, 100)]), 0);
}

fn without_room_nothing_is_done(on: World) {
    let mut vm = on.restoring(1, 0);
    let before = vm.snapshot();
    let set_regs = request_with(op::SET_REGS, DONE, 0, 0, &regs_body(&needed(5)));
    let set_vm = request_with(op::SET_VM, DONE, VM, 0, &vm_body(&[row(0, 5)]));
    for (bytes, needs) in [(&set_regs, 28), (&set_vm, 24)] {
        for room in 16..needs {
            let outcome = vm.raw(bytes, room as usize).outcome();
            assert_eq!(outcome, (status::E2BIG, needs));
        }
        assert_eq!(vm.snapshot(), before);
    }
    vm.raw(&set_vm, 24).ok(8);
    vm.restore_begin(1, 0);
    vm.raw(&set_regs, 28).ok(12);
}

fn enodata_and_then_stricts_einval_come_after_the_values(on: World) {
    let mut vm = on.restoring(3, restore::STRICT);
    vm.restored(0, 100);
    let done = |rows: &[Vcpu]| request_with(op::SET_VM, DONE, VM, 0, &vm_body(rows));
    let lacks = |vcpu, present| Vcpu {
        present,
        ..row(vcpu, 200)
    };
    // Each is wrong in all that comes after it, and there is no room.
    let unequal = row(2, 200);
    let wrong = lacks(2, 0x80);
    for (rows, outcome) in [
        ([row(0, 9), lacks(1, 1), wrong], (status::EBUSY, 2)),
        ([lacks(1, 1), unequal, wrong], (status::EINVAL, 2)),
    ] {
        assert_eq!(vm.raw(&done(&rows), 16).outcome(), outcome);
    }
    // ENODATA is of the first entry that lacks.
    for (rows, lack) in [
        ([lacks(1, 1), lacks(2, 3)], 6),
        ([lacks(2, 3), lacks(1, 1)], 4),
        ([row(1, 200), lacks(2, 0)], 7),
    ] {
        let outcome = vm.raw(&done(&rows), 16).outcome();
        assert_eq!(outcome, (status::ENODATA, lack));
    }
    let strict = done(&[row(1, 200), unequal]);
    assert_eq!(vm.raw(&strict, 16).outcome(), (status::EINVAL, 0));
    let last = done(&[row(1, 100), row(2, 100)]);
    assert_eq!(vm.raw(&last, 16).outcome(), (status::E2BIG, 24));
    vm.raw(&last, 24).ok(8);
}

fn strict_settles_what_the_request_brings(on: World) {
    let mut vm = on.restoring(2, restore::STRICT);
    // The count that vCPU 1 brought before is replaced by the request's.
    vm.set(1, &needed(9));
    vm.restored(0, 100);
    let answer = vm.ask_done(op::SET_REGS, 1, &regs_body(&[(CNT, 101)]));
    assert_eq!(answer.outcome(), (status::EINVAL, 0));
    assert_eq!(vm.get_one(1, CNT), 9);
    assert_eq!(vm.set_done(1, &[(CNT, 100)]), (0, 0, 0));
    assert_eq!((vm.phase(), vm.virt()), (phase::PAUSED, 100));
}

fn lines_are_those_after_the_settlement(on: World) {
    let mut vm = on.restoring(2, 0);
    // By its own count of 10 its line is low; the VM's count is 100.
    let brings = [(CTL, 1), (CNT, 10), (CVAL, 50)];
    vm.restored(1, 100);
    assert_eq!(vm.set_done(0, &brings), (1, 0, 0));
    // Not the last: by its own count.
    let mut vm = on.restoring(2, 0);
    vm.bring(1, 100);
    assert_eq!(vm.set_done(0, &brings), (0, 0, 1));
}

fn done_outside_a_restore_is_ebusy(on: World) {
    for wanted in [phase::NEW, phase::PAUSED, phase::RUNNING, phase::ARMED] {
        let mut vm = on.in_phase(wanted, 2);
        let before = vm.snapshot();
        let busy = (status::EBUSY, wanted);
        for (op, vcpu, body) in [
            (op::SET_REGS, 0, vec![]),
            (op::SET_REGS, 0, regs_body(&[(CTL, 1)])),
            (op::SET_REGS, 0, words(&[7, 7])),
            (op::SET_VM, VM, vec![]),
            (op::SET_VM, VM, vm_body(&[row(9, 9)])),
        ] {
            assert_eq!(vm.ask_done(op, vcpu, &body).outcome(), busy);
        }
        assert_eq!(vm.snapshot(), before);
    }
}

fn done_of_another_operation_is_einval(on: World) {
    let mut vm = on.restoring(2, 0);
    let before = vm.snapshot();
    for (op, vcpu, body) in one_of_each(2) {
        if ![op::SET_REGS, op::SET_VM].contains(&op) {
            let answer = vm.ask_done(op, vcpu, &body);
            assert_eq!(answer.outcome(), (status::EINVAL, 0), "{op:#x}");
        }
    }
    assert_eq!(vm.snapshot(), before);
}

fn without_entries_done_is_restore_done(on: World) {
    let mut vm = on.restoring(2, 0);
    assert_eq!(vm.set_vm_done(&[]), 2);
    let answer = vm.ask_done(op::SET_REGS, 0, &[]);
    assert_eq!(answer.outcome(), (status::ENODATA, 7));
    vm.bring(0, 5);
    assert_eq!(vm.set_done(0, &[]).2, 1);
    assert_eq!(vm.set_done(0, &[]).2, 1);
    // Without DONE it tells which vCPUs are done.
    assert_eq!(vm.set_refused(0, &[]), (status::EBUSY, 1));
    assert_eq!(vm.set_vm_done(&[]), 1);
    vm.bring(1, 6);
    assert_eq!(vm.set_done(1, &[]).2, 0);
    assert_eq!(vm.phase(), phase::PAUSED);
}

fn what_was_carried_out_can_be_sent_again(on: World) {
    let mut vm = on.restoring(2, 0);
    let all: Vec<_> = ARM64.into_iter().zip([0xfd, 40, 50, 3, 60, 70]).collect();
    let first = vm.set_done(0, &all);
    let before = vm.snapshot();
    assert_eq!(vm.set_done(0, &all), first);
    // Fewer entries, another order, and bits of a control that are not stored.
    assert_eq!(vm.set_done(0, &[(PCVAL, 70), (CTL, 1)]), first);
    assert_eq!(vm.set_done(0, &[(PCTL, 7), (CNT, 40), (CNT, 40)]), first);
    let again = Vcpu::with(0, [1, 40, 50, 7, 60, 70]);
    assert_eq!(vm.set_vm_done(&[again]), 1);
    assert_eq!(vm.snapshot(), before);
}

fn what_a_done_vcpu_does_not_have_is_ebusy(on: World) {
    let mut vm = on.restoring(2, 0);
    vm.set_done(0, &needed(40));
    let before = vm.snapshot();
    for entries in [
        vec![(CTL, 0)],
        vec![(CVAL, 1)],
        vec![(CNT, 41)],
        // It brought none.
        vec![(PCNT, 40)],
        vec![(CTL, 1), (CNT, 41)],
        // What is not valid either.
        vec![(CTL, 1), (7, 7)],
        vec![(ARM[0], 1)],
        vec![(CTL, 1), (CTL, 5)],
    ] {
        let answer = vm.ask_done(op::SET_REGS, 0, &regs_body(&entries));
        assert_eq!(answer.outcome(), (status::EBUSY, 1), "{entries:?}");
    }
    let unknown = Vcpu {
        present: 0x87,
        ..row(0, 40)
    };
    for row in [
        row(0, 41),
        unknown,
        Vcpu::with(0, [1, 40, u64::MAX, 0, 1, 0]),
    ] {
        let answer = vm.ask_done(op::SET_VM, VM, &row.to_bytes());
        assert_eq!(answer.outcome(), (status::EBUSY, 1), "{row:?}");
    }
    assert_eq!(vm.snapshot(), before);
}

fn in_a_restores_armed_a_vcpu_has_what_it_brought_and_what_was_written_since(on: World) {
    let mut vm = on.configured(2, configure::CONFIRM);
    vm.restore_begin(2, restore::AUTORUN);
    vm.set_done(1, &needed(1_000));
    vm.set_done(0, &needed(900));
    vm.pass(MS);
    assert_eq!(vm.set_done(0, &needed(900)), (0, 0, 0));
    assert_eq!(vm.set_vm_done(&[row(0, 900), row(1, 1_000)]), 0);
    let busy = (status::EBUSY, phase::ARMED);
    // The VM's count, which the vCPU reads, is not what it brought.
    let answer = vm.ask_done(op::SET_REGS, 0, &regs_body(&[(CNT, 1_000)]));
    assert_eq!(answer.outcome(), busy);
    assert_eq!(vm.refused(op::SET_VM, VM, &vm_body(&[row(0, 900)])), busy);
    vm.set(0, &[(CTL, 0)]);
    let answer = vm.ask_done(op::SET_REGS, 0, &regs_body(&needed(900)));
    assert_eq!(answer.outcome(), busy);
    assert_eq!(vm.set_done(0, &[(CTL, 0), (CNT, 900)]).2, 0);
}

fn some_of_set_vms_vcpus_may_be_done_already(on: World) {
    let mut vm = on.restoring(3, 0);
    vm.set_done(1, &needed(40));
    let before = vm.snapshot();
    let other = vm_body(&[row(0, 10), row(1, 41)]);
    let answer = vm.ask_done(op::SET_VM, VM, &other);
    assert_eq!(answer.outcome(), (status::EBUSY, 2));
    let without_done = vm_body(&[row(0, 10), row(1, 40)]);
    assert_eq!(
        vm.refused(op::SET_VM, VM, &without_done),
        (status::EBUSY, 2)
    );
    assert_eq!(vm.snapshot(), before);
    assert_eq!(vm.set_vm_done(&[row(0, 10), row(1, 40)]), 1);
    assert_eq!(vm.set_vm_done(&[row(0, 10), row(2, 20), row(1, 40)]), 0);
    assert_eq!(vm.virt(), 40);
}
