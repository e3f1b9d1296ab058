//! What every armed VM has in common, and what is so of one that RESUME has armed.

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, PCNT, PCTL, PCVAL, PHASE_CHANGED, Run, VM, configure, configure_with, op,
    pause_body, phase, regs_body, restore, restore_body, status, words,
};

use crate::world::{Clock, HZ, World};

scenarios! {
    both {
        resume_arms_a_vm_with_confirm_and_confirm_run_lets_it_run: "3.14" "3.16" "5.45" "5.48";
        in_armed_both_clocks_count_and_nothing_is_released: "3.20" "3.21";
        without_confirm_no_vm_is_ever_armed: "3.22";
        a_resume_after_a_pause_that_froze_nothing_arms_again: "3.23";
        resume_in_armed_changes_nothing: "3.24" "5.11";
        pause_in_armed_freezes_and_waiters_wait_on: "3.17" "3.25" "3.26" "5.10";
        keep_counting_in_armed_freezes_nothing: "3.25" "5.37";
        the_offsets_of_an_armed_vm_cannot_be_set: "3.28";
        a_reset_leads_from_armed_to_new: "3.29" "1.18";
        armed_by_resume_there_is_no_restore_to_be_done_or_aborted: "3.35" "7.38";
        restore_begin_takes_an_armed_vm_as_pause_would_leave_it: "3.19" "3.37";
        confirm_and_one_offset_are_flags_of_configure_vm_and_info_has_them: "5.40" "5.46" "5.47";
        other_offsets_are_einval_and_change_nothing: "5.49";
        confirm_run_in_running_changes_nothing_in_any_vm: "5.50";
        confirm_run_answers_with_the_run_of_the_waiters: "5.51" "7.20" "7.21";
        registers_are_read_and_written_in_armed_as_in_running: "6.25";
        a_line_that_rises_in_armed_is_reported_when_the_vm_runs: "8.9" "8.19";
        a_line_that_falls_in_armed_is_not_reported: "8.19";
        armed_is_a_phase_that_is_reported: "8.8";
    }
    model {
        armed_by_resume_there_is_no_time_out: "3.36";
    }
}

fn resume_arms_a_vm_with_confirm_and_confirm_run_lets_it_run(on: World) {
    let mut vm = on.configured(2, configure::CONFIRM);
    let resumed = vm.resume();
    assert_eq!(vm.phase(), phase::ARMED);
    let confirmed = vm.confirm_offsets(resumed.cntvoff, resumed.cntpoff);
    let run = Run::of(confirmed.ok(40));
    assert_eq!((run.cntvoff, run.cntpoff), (resumed.cntvoff, 0));
    assert_eq!(vm.phase(), phase::RUNNING);
    assert_eq!(vm.offsets(), [resumed.cntvoff, 0]);
}

fn in_armed_both_clocks_count_and_nothing_is_released(on: World) {
    let mut vm = on.armed(2);
    let offsets = vm.offsets();
    let [virt, phys] = vm.counts();
    let waiters = [vm.wait_on(1, 0), vm.wait_on(2, 1)];
    vm.pass(HZ / 1_000);
    assert_eq!(vm.offsets(), offsets);
    assert!(vm.virt() > virt && vm.phys() > phys);
    vm.no_answer(1);
    vm.no_answer(2);
    let (confirmed, released) = vm.releasing((op::CONFIRM_RUN, VM, &words(&offsets)), &waiters);
    confirmed.ok(40);
    for answer in released {
        answer.ok(40);
    }
}

fn without_confirm_no_vm_is_ever_armed(on: World) {
    for flags in [0, configure::ONE_OFFSET] {
        let mut vm = on.configured(1, flags);
        vm.resume();
        assert_eq!(vm.phase(), phase::RUNNING);
        vm.pause();
        vm.restore_begin(1, restore::AUTORUN);
        vm.restored(0, 5);
        assert_eq!(vm.phase(), phase::RUNNING);
    }
}

fn a_resume_after_a_pause_that_froze_nothing_arms_again(on: World) {
    let mut vm = on.armed(1);
    let offsets = vm.offsets();
    vm.confirm();
    vm.pause_counting();
    vm.resume();
    assert_eq!((vm.phase(), vm.offsets()), (phase::ARMED, offsets));
    vm.confirm();
    vm.pause();
    vm.pass(HZ / 1_000);
    vm.resume();
    assert_eq!(vm.phase(), phase::ARMED);
    assert_ne!(vm.offsets(), offsets);
}

fn resume_in_armed_changes_nothing(on: World) {
    let mut vm = on.configured(1, configure::CONFIRM);
    let first = vm.resume();
    vm.pass(HZ / 1_000);
    let before = vm.snapshot();
    let second = vm.resume();
    assert_eq!(vm.snapshot(), before);
    assert_eq!((second.cntvoff, second.cntpoff), (first.cntvoff, 0));
    assert!(second.host_count > first.host_count, "its own instant");
}

fn pause_in_armed_freezes_and_waiters_wait_on(on: World) {
    let mut vm = on.armed(1);
    let waiter = vm.wait(0);
    vm.pass(HZ / 1_000);
    let paused = vm.pause();
    assert_eq!(vm.phase(), phase::PAUSED);
    vm.pass(HZ / 1_000);
    assert_eq!(vm.virt(), paused.virt_count);
    vm.no_answer(1);
    let armed = vm.resume();
    assert_eq!(armed.virt_count, paused.virt_count);
    vm.no_answer(1);
    let offsets = words(&[armed.cntvoff, armed.cntpoff]);
    let (_, released) = vm.releasing((op::CONFIRM_RUN, VM, &offsets), &[waiter]);
    released[0].ok(40);
}

fn keep_counting_in_armed_freezes_nothing(on: World) {
    let mut vm = on.armed(1);
    let offsets = vm.offsets();
    vm.pause_counting();
    vm.pass(HZ / 1_000);
    assert_eq!((vm.phase(), vm.offsets()), (phase::PAUSED, offsets));
}

fn the_offsets_of_an_armed_vm_cannot_be_set(on: World) {
    for mut vm in [on.armed(1), on.armed_by_restore(1, 5)] {
        let before = vm.snapshot();
        let busy = (status::EBUSY, phase::ARMED);
        let set = vm.refused(op::SET_COUNTER_OFFSET, VM, &words(&[1, 0]));
        let anchor = vm.refused(op::SET_COUNTER_ANCHOR, VM, &words(&[1, 1]));
        assert_eq!((set, anchor), (busy, busy));
        assert_eq!(vm.snapshot(), before);
    }
}

fn a_reset_leads_from_armed_to_new(on: World) {
    for mut vm in [on.armed(1), on.armed_by_restore(1, 5)] {
        vm.driver.reset();
        assert_eq!(vm.info().flags, 0);
        assert_eq!(vm.phase(), phase::NEW);
    }
}

fn armed_by_resume_there_is_no_restore_to_be_done_or_aborted(on: World) {
    let mut vm = on.armed(2);
    let before = vm.snapshot();
    let busy = (status::EBUSY, phase::ARMED);
    assert_eq!(vm.refused(op::RESTORE_DONE, 0, &[]), busy);
    assert_eq!(vm.refused(op::RESTORE_ABORT, VM, &[]), busy);
    assert_eq!(vm.refused(op::SET_VM, VM, &[]), busy);
    assert_eq!(vm.ask_done(op::SET_VM, VM, &[]).outcome(), busy);
    assert_eq!(vm.ask_done(op::SET_REGS, 0, &[]).outcome(), busy);
    assert_eq!(vm.snapshot(), before);
}

fn restore_begin_takes_an_armed_vm_as_pause_would_leave_it(on: World) {
    let mut vm = on.armed(1);
    let waiter = vm.wait(0);
    vm.pass(HZ / 1_000);
    let armed = vm.virt();
    let begin = restore_body(1, 0, 0, 0);
    let (begun, released) = vm.releasing((op::RESTORE_BEGIN, VM, &begin), &[waiter]);
    begun.ok(0);
    assert_eq!(released[0].outcome(), (status::ESTALE, 0));
    assert_eq!((vm.phase(), vm.epoch()), (phase::RESTORING, 2));
    let frozen = vm.virt();
    assert!(frozen >= armed);
    vm.bring(0, 3);
    vm.pass(HZ / 1_000);
    vm.abort();
    for _ in 0..2 {
        assert_eq!((vm.phase(), vm.virt()), (phase::PAUSED, frozen));
        vm.pass(HZ / 1_000);
    }
}

fn confirm_and_one_offset_are_flags_of_configure_vm_and_info_has_them(on: World) {
    // In `info` CONFIRM is bit 3 and ONE_OFFSET bit 4, beside PHYS_VIRTUALISED in bit 2.
    for (flags, shown) in [(0, 0), (1, 8), (2, 16 | 4), (3, 8 | 16 | 4)] {
        let mut vm = on.configured(2, flags);
        assert_eq!(vm.info().flags, shown);
        for other in 0..4 {
            let again = vm.vm(op::CONFIGURE_VM, &configure_with(2, 0, other, 0));
            let expected = match other == flags {
                true => (status::OK, 0),
                false => (status::EBUSY, phase::PAUSED),
            };
            assert_eq!(again.outcome(), expected, "{flags} {other}");
        }
    }
}

fn other_offsets_are_einval_and_change_nothing(on: World) {
    let mut vm = on.armed(1);
    for wanted in [phase::ARMED, phase::RUNNING] {
        let [virt, phys] = vm.offsets();
        let before = vm.snapshot();
        for offsets in [[virt + 1, phys], [virt, phys + 1], [phys, virt], [0, 0]] {
            let answer = vm.confirm_offsets(offsets[0], offsets[1]);
            assert_eq!(answer.outcome(), (status::EINVAL, 0), "{offsets:?}");
        }
        assert_eq!(vm.snapshot(), before);
        assert_eq!(vm.phase(), wanted);
        vm.confirm();
    }
}

fn confirm_run_in_running_changes_nothing_in_any_vm(on: World) {
    for flags in [0, configure::CONFIRM] {
        let mut vm = on.configured(1, flags);
        vm.resume();
        vm.confirm();
        vm.events();
        let before = vm.snapshot();
        let offsets = vm.offsets();
        let run = vm.confirm();
        assert_eq!([run.cntvoff, run.cntpoff], offsets);
        assert_eq!(vm.snapshot(), before);
        vm.no_event();
    }
}

fn confirm_run_answers_with_the_run_of_the_waiters(on: World) {
    let mut vm = on.armed(3);
    let waiters = [vm.wait_on(1, 0), vm.wait_on(2, 1), vm.wait_on(1, 2)];
    vm.pass(HZ / 1_000);
    let offsets = words(&vm.offsets());
    let (confirmed, released) = vm.releasing((op::CONFIRM_RUN, VM, &offsets), &waiters);
    let run = confirmed.ok(40);
    for answer in released {
        assert_eq!(answer.ok(40), run);
    }
}

fn registers_are_read_and_written_in_armed_as_in_running(on: World) {
    for mut vm in [on.armed(2), on.armed_by_restore(2, 1_000)] {
        vm.reads_now(Clock::Virtual, |vm| vm.get_one(1, CNT));
        vm.reads_now(Clock::Physical, |vm| vm.get_one(1, PCNT));
        let (lines, ignored) = vm.set(1, &[(CTL, 1), (CVAL, 0), (PCTL, 3), (PCVAL, 9)]);
        assert_eq!((lines, ignored), (1, 0));
        let [ctl, _, cval, pctl, _, pcval] = vm.get_all(1);
        assert_eq!([ctl, cval, pctl, pcval], [5, 0, 7, 9]);
        let before = vm.snapshot();
        for count in [CNT, PCNT] {
            let outcome = vm.set_refused(1, &[(CTL, 0), (count, 1)]);
            assert_eq!(outcome, (status::EBUSY, phase::ARMED));
        }
        assert_eq!(vm.snapshot(), before);
    }
}

fn a_line_that_rises_in_armed_is_reported_when_the_vm_runs(on: World) {
    let mut vm = on.armed(2);
    let soon = vm.virt() + HZ / 1_000;
    vm.arm(1, Clock::Virtual, 1, soon);
    vm.until(|vm| vm.virt() > soon);
    assert_eq!(vm.fired(), []);
    vm.confirm();
    assert_eq!(vm.fired(), [(1, 0)]);
    assert_eq!(vm.fired(), [], "once");
}

fn a_line_that_falls_in_armed_is_not_reported(on: World) {
    let mut vm = on.armed(1);
    vm.arm(0, Clock::Virtual, 1, 0);
    vm.arm(0, Clock::Virtual, 1, u64::MAX);
    vm.confirm();
    assert_eq!(vm.fired(), []);
}

fn armed_is_a_phase_that_is_reported(on: World) {
    let mut vm = on.configured(1, configure::CONFIRM);
    vm.events();
    vm.post_event_buffer();
    vm.resume();
    let event = vm.event();
    assert_eq!(event.what(), (PHASE_CHANGED, 0, phase::ARMED));
    assert_eq!(event.cval, 0);
    vm.post_event_buffer();
    vm.confirm();
    assert_eq!(vm.event().what(), (PHASE_CHANGED, 0, phase::RUNNING));
}

fn armed_by_resume_there_is_no_time_out(on: World) {
    // Also if there was a restore with a time-out before.
    let mut vm = on.configured(1, configure::CONFIRM);
    vm.begin(1, 0, 0, 1_000);
    vm.restored(0, 5);
    vm.resume();
    let waiter = vm.wait(0);
    vm.pass(10 * HZ);
    vm.no_answer(1);
    vm.vm(op::PAUSE, &pause_body(0)).ok(40);
    let begin = restore_body(1, 0, 0, 0);
    let (_, released) = vm.releasing((op::RESTORE_BEGIN, VM, &begin), &[waiter]);
    assert_eq!(released[0].outcome(), (status::ESTALE, 0));
    assert_eq!(vm.set_refused(0, &[(1, 1)]), (status::ENOENT, 0));
    vm.vcpu(op::SET_REGS, 0, &regs_body(&[(CTL, 0)])).ok(8);
}
