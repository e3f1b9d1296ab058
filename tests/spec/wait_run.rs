//! SPEC.md, "Restore": who is answered when, that all get the same, and the time-out.

use std::collections::HashMap;

use vhost_user_timer_kit::clock_driver::{MONOTONIC, host};
use vhost_user_timer_kit::contract::{
    Answer, Client, Run, VM, Vcpu, op, phase, request, restore, restore_body, status,
};
use vhost_user_timer_kit::raw_driver::{Layout, Rig};
use vhost_user_timer_model::vm::Notice;

use crate::world::{HZ, World};

scenarios! {
    both {
        in_running_wait_run_is_answered_at_once_with_one_instant: "5.14" "7.20" "7.22" "5.41";
        waiters_of_all_queues_and_vcpus_are_answered_with_one_and_the_same_run:
            "7.20" "7.21" "7.22" "7.12";
        a_wait_in_paused_is_answered_by_resume: "5.14" "7.20" "7.21";
        without_autorun_waiters_wait_on_until_resume: "3.5" "7.20";
        a_waiter_is_answered_once: "7.20";
        restore_begin_answers_older_waiters_estale_in_the_new_epoch: "7.27" "2.40" "2.9";
        restore_abort_answers_waiters_ecanceled: "7.28" "2.41";
        stopping_a_queue_cancels_the_waiters_of_that_queue_alone: "1.20" "2.41";
        a_disconnect_drops_the_waiters_and_changes_nothing_else: "1.5" "1.6";
        a_reset_drops_the_waiters: "1.18" "1.6";
        a_time_out_of_0_or_of_centuries_never_passes: "7.26";
    }
    model {
        when_the_time_out_passes_waiters_are_answered_etimedout_and_the_missing_logged:
            "2.39" "7.23" "7.24";
        after_the_time_out_the_restore_stays_open_and_later_waits_wait_on: "7.25";
        a_restore_begun_again_has_its_own_time_out: "3.7" "7.23";
        without_a_time_out_waiters_wait_forever: "7.26";
        the_longest_time_out_has_not_passed_at_once: "7.23";
        a_time_out_shorter_than_a_tick_has_not_passed_at_once: "7.23";
        the_last_restore_done_after_the_time_out_still_completes_the_restore: "7.23" "7.25";
    }
    binary {
        when_the_time_out_passes_the_log_names_the_missing_vcpus_and_the_restore_goes_on:
            "2.39" "7.23" "7.24" "7.25";
        the_time_out_comes_without_any_request: "2.39" "7.23";
    }
}

const RESUME: (u16, u32, &[u8]) = (op::RESUME, VM, &[]);

/// RESTORE_DONE of a vCPU.
fn done(vcpu: u32) -> (u16, u32, &'static [u8]) {
    (op::RESTORE_DONE, vcpu, &[])
}

fn in_running_wait_run_is_answered_at_once_with_one_instant(on: World) {
    let mut vm = on.paused(2);
    let resumed = vm.resume();
    vm.pass(10);
    let before = vm.info().host_count;
    let run = Run::of(vm.vcpu(op::WAIT_RUN, 1, &[]).ok(40));
    let after = vm.info();
    assert!((before..=after.host_count).contains(&run.host_count));
    assert_eq!([run.cntvoff, run.cntpoff], [after.cntvoff, 0]);
    assert_eq!(run.virt_count, run.host_count - resumed.cntvoff);
}

fn waiters_of_all_queues_and_vcpus_are_answered_with_one_and_the_same_run(on: World) {
    let vcpus = 30;
    let mut vm = on.restoring(vcpus, restore::AUTORUN);
    let mut waiters = Vec::new();
    for vcpu in 0..vcpus {
        for queue in 1..3 {
            waiters.push(vm.wait_on(queue, vcpu));
        }
        vm.pass(7);
    }
    for vcpu in 0..vcpus {
        vm.bring(vcpu, 100 + u64::from(vcpu));
        if vcpu != vcpus - 1 {
            vm.restore_done(vcpu);
        }
        for queue in 1..3 {
            vm.no_answer(queue);
        }
    }
    let before = vm.info().host_count;
    let (own, released) = vm.releasing(done(vcpus - 1), &waiters);
    assert_eq!(own.ok(8), [0; 8]);
    let after = vm.info();
    assert_eq!(released.len(), 60);
    assert!(released.iter().all(|answer| *answer == released[0]));
    assert_eq!(released[0].epoch, after.epoch);
    let run = Run::of(released[0].ok(40));
    assert_eq!(run.virt_count, 100 + 29);
    assert!((before..=after.host_count).contains(&run.host_count));
    // And that is how the VM runs.
    assert_eq!([after.cntvoff, after.cntpoff], [run.cntvoff, run.cntpoff]);
    // A later one is answered at once, with a later instant of the same offsets.
    vm.pass(50);
    let late = Run::of(vm.vcpu(op::WAIT_RUN, 7, &[]).ok(40));
    assert_eq!([late.cntvoff, late.cntpoff], [run.cntvoff, run.cntpoff]);
    assert!(late.virt_count >= run.virt_count + 50);
}

fn a_wait_in_paused_is_answered_by_resume(on: World) {
    let mut vm = on.paused(2);
    let waiters = [vm.wait(0), vm.wait(1), vm.wait(1)];
    vm.pass(5);
    let (own, released) = vm.releasing(RESUME, &waiters);
    own.ok(40);
    assert!(released.iter().all(|answer| *answer == own));
    vm.vcpu(op::WAIT_RUN, 1, &[]).ok(40);
}

fn without_autorun_waiters_wait_on_until_resume(on: World) {
    let mut vm = on.restoring(1, 0);
    let waiter = vm.wait(0);
    vm.restored(0, 3);
    vm.no_answer(1);
    let (own, released) = vm.releasing(RESUME, &[waiter]);
    assert_eq!(released[0], own);
    assert_eq!(Run::of(released[0].ok(40)).virt_count, 3);
}

fn a_waiter_is_answered_once(on: World) {
    let mut vm = on.paused(1);
    let waiter = vm.wait(0);
    vm.releasing(RESUME, &[waiter]).1[0].ok(40);
    vm.pause();
    vm.resume();
    vm.no_answer(1);
}

fn restore_begin_answers_older_waiters_estale_in_the_new_epoch(on: World) {
    for wanted in [phase::PAUSED, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 2);
        let epoch = vm.epoch();
        let waiters = [vm.wait(0), vm.wait_on(2, 1)];
        let body = restore_body(2, 0, 0, 0);
        let (own, released) = vm.releasing((op::RESTORE_BEGIN, VM, &body), &waiters);
        own.ok(0);
        for answer in released {
            assert_eq!(answer.outcome(), (status::ESTALE, 0));
            assert_eq!(answer.epoch, epoch + 1, "the new epoch is current by then");
        }
    }
}

fn restore_abort_answers_waiters_ecanceled(on: World) {
    let mut vm = on.restoring(2, restore::AUTORUN);
    let waiters = [vm.wait(1), vm.wait(0)];
    let (own, released) = vm.releasing((op::RESTORE_ABORT, VM, &[]), &waiters);
    own.ok(0);
    for answer in released {
        assert_eq!(
            (answer.outcome(), answer.epoch),
            ((status::ECANCELED, 0), own.epoch)
        );
    }
}

fn stopping_a_queue_cancels_the_waiters_of_that_queue_alone(on: World) {
    for wanted in [phase::PAUSED, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 3);
        let epoch = vm.epoch();
        let mut on_one = vec![vm.wait(0), vm.wait(1)];
        let on_two = vm.wait_on(2, 2);
        on_one.push(vm.wait(2));
        vm.driver.stop(3);
        for queue in [1, 2] {
            assert_eq!(
                vm.driver.used_already(queue),
                None,
                "nobody waits on queue 3"
            );
        }
        vm.driver.start(3);
        vm.driver.stop(1);
        for answer in vm.answers(&on_one) {
            assert_eq!(
                (answer.outcome(), answer.epoch),
                ((status::ECANCELED, 0), epoch)
            );
        }
        vm.driver.start(1);
        vm.driver.stop(1);
        assert_eq!(vm.driver.used_already(1), None, "once each");
        vm.driver.start(1);
        let body = restore_body(3, 0, 0, 0);
        let (_, released) = vm.releasing((op::RESTORE_BEGIN, VM, &body), &[on_two]);
        assert_eq!(released[0].outcome(), (status::ESTALE, 0));
    }
}

fn a_disconnect_drops_the_waiters_and_changes_nothing_else(on: World) {
    for wanted in [phase::PAUSED, phase::RESTORING] {
        let mut vm = on.in_phase(wanted, 2);
        let before = vm.snapshot();
        vm.wait(0);
        vm.driver.reconnect();
        assert_eq!(vm.snapshot(), before);
        vm.driver.stop(1);
        assert_eq!(vm.driver.used_already(1), None);
    }
}

fn a_reset_drops_the_waiters(on: World) {
    let mut vm = on.paused(1);
    vm.wait(0);
    vm.driver.reset();
    vm.configure(1);
    vm.resume();
    vm.no_answer(1);
}

fn a_time_out_of_0_or_of_centuries_never_passes(on: World) {
    for timeout_ns in [0, u64::MAX] {
        let mut vm = on.paused(1);
        vm.begin(1, restore::AUTORUN, 0, timeout_ns);
        let waiter = vm.wait(0);
        vm.bring(0, 1);
        vm.pass(HZ / 1_000);
        vm.no_answer(1);
        vm.releasing(done(0), &[waiter]).1[0].ok(40);
    }
}

fn when_the_time_out_passes_waiters_are_answered_etimedout_and_the_missing_logged(on: World) {
    let mut vm = on.paused(4);
    vm.begin(4, restore::AUTORUN, 0, 2 * HZ);
    vm.exact().notices();
    let waiters = [vm.wait(0), vm.wait(3)];
    vm.restored(2, 5);
    assert_eq!(vm.exact().ticks_to_next(), Some(2 * HZ));
    vm.pass(2 * HZ - 1);
    assert_eq!(vm.exact().ticks_to_next(), Some(1));
    vm.no_answer(1);
    assert_eq!(vm.exact().notices(), []);
    let epoch = vm.exact().vm.epoch();
    vm.pass(1);
    for answer in vm.answers(&waiters) {
        assert_eq!(
            (answer.outcome(), answer.epoch),
            ((status::ETIMEDOUT, 3), epoch)
        );
    }
    let notice = Notice::RestoreTimedOut {
        missing: vec![0, 1, 3],
        vcpus: 4,
    };
    assert_eq!(vm.exact().notices(), [notice]);
}

fn after_the_time_out_the_restore_stays_open_and_later_waits_wait_on(on: World) {
    let mut vm = on.paused(1);
    vm.begin(1, restore::AUTORUN, 0, HZ);
    vm.pass(5 * HZ);
    assert_eq!(vm.phase(), phase::RESTORING);
    let waiter = vm.wait(0);
    vm.pass(500 * HZ);
    vm.no_answer(1);
    assert_eq!(vm.exact().ticks_to_next(), None);
    vm.bring(0, 5);
    let (_, released) = vm.releasing(done(0), &[waiter]);
    assert_eq!(Run::of(released[0].ok(40)).virt_count, 5);
}

fn a_restore_begun_again_has_its_own_time_out(on: World) {
    let mut vm = on.paused(1);
    vm.begin(1, 0, 0, HZ);
    vm.pass(HZ - 1);
    vm.begin(1, 0, 0, HZ);
    let waiter = vm.wait(0);
    vm.pass(HZ - 1);
    vm.no_answer(1);
    vm.pass(1);
    assert_eq!(vm.answers(&[waiter])[0].outcome(), (status::ETIMEDOUT, 1));
}

fn without_a_time_out_waiters_wait_forever(on: World) {
    let mut vm = on.restoring(1, 0);
    vm.wait(0);
    assert_eq!(vm.exact().ticks_to_next(), None);
    vm.pass(u64::MAX / 2);
    vm.no_answer(1);
}

fn the_longest_time_out_has_not_passed_at_once(on: World) {
    let mut vm = on.fresh();
    vm.configure_as(1, 0, 10_000_000_000);
    vm.begin(1, 0, 0, u64::MAX);
    vm.wait(0);
    vm.pass(u64::MAX / 2);
    vm.no_answer(1);
}

fn a_time_out_shorter_than_a_tick_has_not_passed_at_once(on: World) {
    let mut vm = on.fresh();
    vm.configure_as(1, 0, 1);
    vm.begin(1, 0, 0, HZ + 1);
    let waiter = vm.wait(0);
    vm.pass(1);
    // A second has passed, not a second and more.
    vm.no_answer(1);
    vm.pass(1);
    assert_eq!(vm.answers(&[waiter])[0].outcome(), (status::ETIMEDOUT, 1));
}

fn the_last_restore_done_after_the_time_out_still_completes_the_restore(on: World) {
    let mut vm = on.paused(1);
    vm.begin(1, restore::AUTORUN, 0, HZ);
    vm.bring(0, 5);
    let waiter = vm.wait(0);
    // The VM hears of the time only with this request.
    vm.exact().drift(2 * HZ);
    let (_, released) = vm.releasing(done(0), &[waiter]);
    assert_eq!(released[0].outcome(), (status::ETIMEDOUT, 1));
    assert_eq!(vm.phase(), phase::RUNNING);
}

/// A VM on a connection with rings of 1024 descriptors.
fn configured(rig: &Rig, vcpus: u32) -> Client {
    let mut client = rig.client().queue_size(1024).connect();
    client.configure(vcpus);
    client
}

/// The answers on queue 1, by head, once a time-out of so many nanoseconds has passed. It has begun
/// before the call. A WAIT_RUN that came after it waits on, and has no answer.
pub(crate) fn answers_by_the_time_out(
    rig: &Rig,
    client: &mut Client,
    timeout_ns: u64,
) -> HashMap<u16, Answer> {
    host::wait_until(MONOTONIC, host::boottime() + timeout_ns);
    assert!(rig.comes_to_rest());
    let used = std::iter::from_fn(|| client.driver.used_already(1));
    used.map(|used| (used.head, Answer::of(&used))).collect()
}

fn when_the_time_out_passes_the_log_names_the_missing_vcpus_and_the_restore_goes_on() {
    host::with_longer_spans(|span| {
        let timeout_ns = 5 * span;
        let rig = Rig::launch_release(&[]);
        let mut client = configured(&rig, 16);
        // All with one kick, so that it takes a stop of that long in the backend to spoil it.
        let begin = restore_body(16, restore::AUTORUN, 0, timeout_ns);
        let begin = request(op::RESTORE_BEGIN, VM, 0, &begin);
        let begin = client.driver.add(1, &begin, 16, &Layout::plain());
        let waiting = [0, 1, 2].map(|vcpu| {
            let wait = request(op::WAIT_RUN, vcpu, 0, &[]);
            client.driver.add(1, &wait, 56, &Layout::plain())
        });
        let there: Vec<u32> = (0..16).filter(|vcpu| ![7, 12, 13].contains(vcpu)).collect();
        let brought: Vec<u8> = there
            .iter()
            .flat_map(|vcpu| Vcpu::with(*vcpu, [0, 5, 0, 0, 0, 0]).to_bytes())
            .collect();
        let set_vm = request(op::SET_VM, VM, 0, &brought);
        let mut others = vec![client.driver.add(1, &set_vm, 16, &Layout::plain())];
        for vcpu in there {
            let done = request(op::RESTORE_DONE, vcpu, 0, &[]);
            others.push(client.driver.add(1, &done, 24, &Layout::plain()));
        }
        client.driver.rings[1].kick(&client.driver.memory);
        client.released(1, begin).ok(0);
        let answers = answers_by_the_time_out(&rig, &mut client, timeout_ns);
        for head in others {
            assert_eq!(answers[&head].status, status::OK);
        }
        // As many as were missing when it passed, the same for all; three unless this was slow.
        let waited = waiting.map(|head| answers.get(&head).map(Answer::outcome));
        if waited != [Some((status::ETIMEDOUT, 3)); 3] {
            let slow = |outcome| matches!(outcome, Some((status::ETIMEDOUT, 3..=16)) | None);
            assert!(waited.into_iter().all(slow), "{waited:?}");
            return false;
        }
        rig.log_with("7, 12-13");

        assert_eq!(client.info().phase, phase::RESTORING);
        assert_eq!(client.info().restored, 13);
        for vcpu in [7, 12, 13] {
            client.bring(vcpu, 6);
            client.restore_done(vcpu);
        }
        assert_eq!(client.info().phase, phase::RUNNING);
        true
    });
}

fn the_time_out_comes_without_any_request() {
    host::with_longer_spans(|span| {
        let rig = Rig::launch_release(&[]);
        let mut client = configured(&rig, 2);
        // Waiting already when the restore begins would be ESTALE: it is asked right after.
        let begin = restore_body(2, 0, 0, span);
        let begin = request(op::RESTORE_BEGIN, VM, 0, &begin);
        let begin = client.driver.add(1, &begin, 16, &Layout::plain());
        let wait = request(op::WAIT_RUN, 1, 0, &[]);
        let wait = client.driver.submit(1, &wait, 56, &Layout::plain());
        client.released(1, begin).ok(0);
        let answers = answers_by_the_time_out(&rig, &mut client, span);
        let Some(answer) = answers.get(&wait) else {
            return false;
        };
        assert_eq!(answer.outcome(), (status::ETIMEDOUT, 2));
        true
    });
}
