//! SPEC.md, "Restore": what a vCPU must bring, what it reads until the end, and giving up.

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, PCNT, PCTL, PCVAL, VM, Vcpu, op, phase, regs_body, restore, restore_body,
    status, words,
};

use crate::world::{Clock, HZ, Motion, PHASES, Vm, World, vm_body};

scenarios! {
    both {
        restore_begin_must_name_the_configured_number_of_vcpus: "7.3" "2.52";
        an_unknown_restore_flag_is_einval_in_every_phase: "2.3";
        while_restoring_both_clocks_stand_still: "7.1";
        restore_done_needs_control_compare_value_and_count_and_says_which_are_missing:
            "7.8" "2.36" "2.52";
        what_a_vcpu_set_before_restore_begin_does_not_count: "7.8";
        repeating_restore_done_is_fine_and_changes_nothing: "7.11";
        registers_that_a_vcpu_does_not_set_keep_their_values: "7.10";
        a_count_write_in_a_restore_is_staged_and_leaves_the_vms_count_alone: "6.11" "7.29";
        each_vcpu_reads_the_count_that_it_brought_until_the_restore_is_complete: "6.11" "7.7";
        lines_and_istatus_in_a_restore_are_those_of_the_count_brought: "6.7" "6.11" "6.20";
        an_abort_leads_to_paused_with_the_state_from_before_in_the_same_epoch: "3.6" "7.29" "7.30";
        restore_begin_again_keeps_nothing_of_the_old_epoch: "3.7" "7.8";
        a_request_of_the_old_epoch_is_estale_and_stages_nothing: "2.40" "2.52";
        nothing_runs_before_the_last_vcpu_is_done: "7.2" "7.20" "8.9";
    }
}

fn restore_begin_must_name_the_configured_number_of_vcpus(on: World) {
    for wanted in [phase::PAUSED, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 3);
        let before = vm.snapshot();
        for vcpus in [0, 2, 4, u32::MAX] {
            let outcome = vm.refused(op::RESTORE_BEGIN, VM, &restore_body(vcpus, 0, 0, 0));
            assert_eq!(outcome, (status::EINVAL, 0));
        }
        assert_eq!(vm.snapshot(), before);
    }
}

fn an_unknown_restore_flag_is_einval_in_every_phase(on: World) {
    for wanted in PHASES {
        let mut vm = on.in_phase(wanted, 3);
        for bit in 3..32 {
            let outcome = vm.refused(op::RESTORE_BEGIN, VM, &restore_body(3, 1 << bit, 0, 0));
            assert_eq!(outcome, (status::EINVAL, 0));
        }
    }
}

fn while_restoring_both_clocks_stand_still(on: World) {
    let mut vm = on.running(1);
    vm.pass(40);
    let paused = vm.pause_counting();
    vm.pass(2);
    vm.restore_begin(1, 0);
    let counts = vm.counts();
    assert!(counts[0] >= paused.virt_count + 2 && counts[1] >= paused.phys_count + 2);
    for _ in 0..3 {
        vm.pass(HZ / 1_000);
        assert_eq!(vm.counts(), counts);
        assert_eq!(vm.get(0, &[CNT, PCNT]), counts);
        let state = vm.state();
        assert_eq!([state.virt_count, state.phys_count], counts);
    }
}

fn restore_done_needs_control_compare_value_and_count_and_says_which_are_missing(on: World) {
    let mut vm = on.paused(2);
    // Set before the restore: that was another epoch.
    vm.set(0, &[(CTL, 0), (CVAL, 0), (CNT, 0)]);
    for brought in 0..8u32 {
        vm.restore_begin(2, 0);
        for (id, bit) in [(CTL, 1), (CNT, 2), (CVAL, 4)] {
            if brought & bit != 0 {
                vm.set(0, &[(id, 1)]);
            }
        }
        // The physical timer's are not needed, nor do they help.
        vm.set(0, &[(PCTL, 0), (PCVAL, 0), (PCNT, 0)]);
        let before = vm.snapshot();
        let answer = vm.vcpu(op::RESTORE_DONE, 0, &[]);
        match 7 & !brought {
            0 => assert_eq!(answer.outcome(), (status::OK, 0)),
            missing => {
                assert_eq!(answer.outcome(), (status::ENODATA, missing));
                assert_eq!(vm.snapshot(), before);
            }
        }
        assert_eq!(vm.info().restored, u32::from(brought == 7));
    }
}

fn what_a_vcpu_set_before_restore_begin_does_not_count(on: World) {
    let mut vm = on.paused(1);
    vm.bring(0, 5);
    vm.restore_begin(1, 0);
    assert_eq!(vm.refused(op::RESTORE_DONE, 0, &[]), (status::ENODATA, 7));
    vm.bring(0, 5);
    vm.restore_begin(1, 0);
    let outcome = vm.refused(op::RESTORE_DONE, 0, &[]);
    assert_eq!(outcome, (status::ENODATA, 7), "nor of the old epoch");
}

fn repeating_restore_done_is_fine_and_changes_nothing(on: World) {
    let mut vm = on.restoring(2, 0);
    assert_eq!(vm.restored(1, 5), 1);
    let before = vm.snapshot();
    assert_eq!(vm.restore_done(1), 1);
    assert_eq!(vm.restore_done(1), 1);
    assert_eq!(vm.snapshot(), before);
    assert_eq!(vm.phase(), phase::RESTORING);
    assert_eq!(vm.restored(0, 5), 0);
}

fn registers_that_a_vcpu_does_not_set_keep_their_values(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(PCTL, 3), (PCVAL, 44), (CVAL, 9)]);
    vm.restore_begin(1, 0);
    vm.set(0, &[(CTL, 0), (CNT, 5), (CVAL, 0)]);
    vm.restore_done(0);
    assert_eq!(vm.get(0, &[PCTL, PCVAL, CVAL]), [7, 44, 0]);
}

fn a_count_write_in_a_restore_is_staged_and_leaves_the_vms_count_alone(on: World) {
    let mut vm = on.paused(2);
    vm.set(0, &[(CNT, 50)]);
    vm.restore_begin(2, 0);
    vm.set(0, &[(CNT, 70)]);
    assert_eq!(vm.state().virt_count, 50);
    assert_eq!(vm.virt(), 50);
    vm.abort();
    assert_eq!(vm.get_one(0, CNT), 50);
}

fn each_vcpu_reads_the_count_that_it_brought_until_the_restore_is_complete(on: World) {
    let mut vm = on.running(3);
    vm.pass(40);
    vm.pause();
    vm.restore_begin(3, 0);
    let [virt, phys] = vm.counts();
    vm.pass(9);
    vm.bring(0, 7);
    vm.set(1, &[(PCNT, 8)]);
    assert_eq!(vm.get(0, &[CNT, PCNT]), [7, phys]);
    assert_eq!(vm.get(1, &[CNT, PCNT]), [virt, 8]);
    assert_eq!(vm.get(2, &[CNT, PCNT]), [virt, phys]);
    vm.restore_done(0);
    assert_eq!(vm.get(0, &[CNT, PCNT]), [7, phys], "done or not");
}

fn lines_and_istatus_in_a_restore_are_those_of_the_count_brought(on: World) {
    let mut vm = on.restoring(2, 0);
    assert_eq!(vm.arm(0, Clock::Virtual, 1, 10), 0);
    assert_eq!(vm.set(0, &[(CNT, 10)]).0, 1);
    assert_eq!(vm.get_one(0, CTL), 5);
    assert_eq!(vm.arm(1, Clock::Virtual, 1, 10), 0);
    assert_eq!(vm.get_one(1, CTL), 1);
}

/// How many pasts there are.
const PASTS: usize = 5;

/// A VM with a past: its clocks frozen, counting, counting and frozen, pinned; or just set up.
fn with_a_past(on: World, which: usize) -> Vm {
    let mut vm = on.paused(2);
    if which == 4 {
        vm.set(0, &[(CTL, 1), (CVAL, 100), (CNT, 40)]);
        vm.set(1, &[(CTL, 2), (CVAL, 200)]);
        return vm;
    }
    vm.resume();
    vm.arm(1, Clock::Virtual, 1, 1 << 40);
    vm.arm(0, Clock::Physical, 3, 2_000);
    vm.pass(400);
    match which {
        0 | 3 => vm.pause(),
        _ => vm.pause_counting(),
    };
    match which {
        2 => drop(vm.set(0, &[(PCNT, 3)])),
        3 => vm.set_offset(33),
        _ => {}
    }
    vm
}

/// What a restore may do before it is given up.
fn meddle(vm: &mut Vm) {
    vm.set_vm(&[Vcpu::with(0, [1, 2, 3, 1, 5, 6])]);
    vm.restored(1, 77);
    vm.pass(50);
    let offset = vm.info().host_count;
    vm.set_offset(offset);
}

fn an_abort_leads_to_paused_with_the_state_from_before_in_the_same_epoch(on: World) {
    for which in 0..PASTS {
        for begins in 1..3 {
            let mut vm = with_a_past(on, which);
            let mut before = vm.seen();
            for n in 0..begins {
                let epoch = vm.restore_begin(2, [restore::STRICT, 0][n as usize]);
                assert_eq!(epoch, before.info.epoch + 1 + n);
                meddle(&mut vm);
            }
            vm.abort();
            // An abort after a second begin is an abort of both, and the epoch stays.
            before.info.epoch += begins;
            assert_eq!(vm.seen(), before, "past {which}");
            assert_eq!(before.info.phase, phase::PAUSED);
        }
    }
}

fn restore_begin_again_keeps_nothing_of_the_old_epoch(on: World) {
    for which in 0..PASTS {
        let mut vm = with_a_past(on, which);
        vm.begin(
            2,
            restore::STRICT | restore::ELAPSED | restore::AUTORUN,
            1,
            HZ,
        );
        let mut fresh = vm.seen();
        meddle(&mut vm);
        vm.restore_begin(2, 0);
        fresh.info.epoch += 1;
        let again = vm.seen();
        assert_eq!(again.info, fresh.info);
        for (vcpu, was) in again.vcpus.iter().zip(&fresh.vcpus) {
            // A clock that counted before has gone on until this restore's beginning.
            for n in [0, 2, 3, 5] {
                assert_eq!(vcpu.registers[n] & !4, was.registers[n] & !4);
            }
            let frozen = [again.clocks[0], again.clocks[1]];
            let counts = [vcpu.registers[1], vcpu.registers[4]];
            assert_eq!(
                frozen,
                counts.map(Motion::Frozen),
                "as the VM's, not as brought"
            );
        }
        if which == 4 {
            assert_eq!(again.clocks[0], Motion::Frozen(40));
        }
        assert_eq!(vm.info().restored, 0);
        for vcpu in 0..2 {
            // CTL, CNT and CVAL are missing once more.
            assert_eq!(
                vm.refused(op::RESTORE_DONE, vcpu, &[]),
                (status::ENODATA, 7)
            );
            vm.restored(vcpu, 3 + u64::from(vcpu));
        }
        // AUTORUN, STRICT and ELAPSED were the old one's.
        assert_eq!(vm.phase(), phase::PAUSED);
        assert_eq!(vm.get_one(0, CNT), 4);
    }
}

fn a_request_of_the_old_epoch_is_estale_and_stages_nothing(on: World) {
    let mut vm = on.paused(1);
    let old = vm.restore_begin(1, 0);
    vm.bring(0, 1);
    vm.restore_begin(1, 0);
    vm.bring(0, 2);
    let before = vm.snapshot();
    for (op, vcpu, body) in [
        (op::SET_REGS, 0, regs_body(&[(CNT, 5)])),
        (op::SET_VM, VM, vm_body(&[Vcpu::with(0, [1; 6])])),
        (op::SET_COUNTER_OFFSET, VM, words(&[5, 0])),
        (op::RESTORE_DONE, 0, vec![]),
        (op::RESTORE_ABORT, VM, vec![]),
        (op::RESTORE_BEGIN, VM, restore_body(1, 0, 0, 0)),
        (op::WAIT_RUN, 0, vec![]),
    ] {
        let answer = vm.ask(op, vcpu, old, &body);
        assert_eq!(answer.outcome(), (status::ESTALE, 0), "{op:#x}");
    }
    assert_eq!(vm.snapshot(), before);
    assert_eq!(vm.phase(), phase::RESTORING);
    assert_eq!(vm.restore_done(0), 0);
    assert_eq!(vm.get_one(0, CNT), 2);
}

fn nothing_runs_before_the_last_vcpu_is_done(on: World) {
    let mut vm = on.restoring(64, restore::AUTORUN);
    for vcpu in 0..64 {
        vm.bring(vcpu, 1_000);
        vm.arm(vcpu, Clock::Virtual, 1, 0);
    }
    let waiter = vm.wait(0);
    for vcpu in (1..64).rev() {
        assert_eq!(vm.restore_done(vcpu), vcpu);
        vm.pass(HZ / 10_000);
        assert_eq!(vm.fired(), []);
        assert_eq!(vm.phase(), phase::RESTORING);
        vm.no_answer(1);
    }
    let (done, released) = vm.releasing((op::RESTORE_DONE, 0, &[]), &[waiter]);
    assert_eq!(done.ok(8), [0; 8]);
    released[0].ok(40);
    assert_eq!(vm.phase(), phase::RUNNING);
    let all: Vec<_> = (0..64).map(|vcpu| (vcpu, 0)).collect();
    assert_eq!(vm.fired(), all);
}
