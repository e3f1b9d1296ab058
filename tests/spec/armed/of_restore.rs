//! A VM that the last RESTORE_DONE has armed is still in that restore.

use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::clock_driver::host::with_longer_spans;
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PCNT, VM, configure, op, phase, restore, restore_body, status, words,
};
use vhost_user_timer_kit::raw_driver::Rig;
use vhost_user_timer_model::vm::Notice;

use crate::wait_run::answers_by_the_time_out;
use crate::world::{Clock, HZ, MS, Vm, World};

scenarios! {
    both {
        the_last_restore_done_of_an_autorun_restore_arms_a_vm_with_confirm: "3.15" "3.16";
        without_autorun_a_restore_ends_in_paused_whatever_confirm_says: "3.5" "3.15";
        restore_done_in_a_restores_armed_is_fine: "3.30" "5.13" "7.11";
        an_abort_in_armed_brings_back_the_vm_from_before: "3.18" "3.31" "5.15";
        restore_begin_in_armed_begins_again_from_the_vm_before: "3.19" "3.32" "5.12";
        a_pause_in_armed_ends_the_restore: "3.27";
        a_confirmation_ends_the_restore: "3.27" "3.16";
        the_time_out_counts_on_in_armed: "2.39" "3.33" "3.34";
    }
    model {
        the_log_says_that_the_vmm_has_not_confirmed: "3.33";
    }
    binary {
        the_backends_log_says_that_the_vmm_has_not_confirmed: "3.33";
        a_backend_killed_in_armed_comes_back_armed_with_the_same_offsets: "3.38";
        a_restores_armed_comes_back_with_what_each_vcpu_brought: "3.39" "7.40";
    }
}

fn the_last_restore_done_of_an_autorun_restore_arms_a_vm_with_confirm(on: World) {
    let mut vm = on.configured(2, configure::CONFIRM);
    vm.restore_begin(2, restore::AUTORUN);
    vm.restored(1, 900);
    assert_eq!(vm.phase(), phase::RESTORING);
    vm.restored(0, 1_000);
    let info = vm.info();
    assert_eq!((info.phase, info.restored), (phase::ARMED, 2));
    assert!(vm.virt() >= 1_000);
    let offsets = vm.offsets();
    let waiters = [vm.wait(0), vm.wait(1)];
    vm.pass(MS);
    let (confirmed, released) = vm.releasing((op::CONFIRM_RUN, VM, &words(&offsets)), &waiters);
    let run = confirmed.ok(40);
    assert_eq!(run[..16], words(&offsets));
    for answer in released {
        assert_eq!(answer.ok(40), run);
    }
    assert_eq!(vm.phase(), phase::RUNNING);
}

fn without_autorun_a_restore_ends_in_paused_whatever_confirm_says(on: World) {
    let mut vm = on.configured(1, configure::CONFIRM);
    vm.restore_begin(1, 0);
    vm.restored(0, 1_000);
    assert_eq!((vm.phase(), vm.virt()), (phase::PAUSED, 1_000));
    assert_eq!(vm.resume().virt_count, 1_000);
    assert_eq!(vm.phase(), phase::ARMED);
}

fn restore_done_in_a_restores_armed_is_fine(on: World) {
    let mut vm = on.armed_by_restore(3, 1_000);
    let before = vm.snapshot();
    for vcpu in [0, 2, 1, 1] {
        assert_eq!(vm.restore_done(vcpu), 0);
    }
    assert_eq!(vm.snapshot(), before);
}

fn an_abort_in_armed_brings_back_the_vm_from_before(on: World) {
    let mut vm = on.configured(2, configure::CONFIRM);
    vm.set(0, &[(CNT, 7_000), (CTL, 3), (CVAL, 9)]);
    let before = vm.seen();
    vm.restore_begin(2, restore::AUTORUN);
    for vcpu in 0..2 {
        vm.set(vcpu, &[(PCNT, 5)]);
        vm.restored(vcpu, 1_000_000);
    }
    // Also what was written while the VM was armed.
    vm.arm(1, Clock::Physical, 1, 0);
    let waiter = vm.wait(0);
    let (aborted, released) = vm.releasing((op::RESTORE_ABORT, VM, &[]), &[waiter]);
    aborted.ok(0);
    assert_eq!(released[0].outcome(), (status::ECANCELED, 0));
    let mut after = vm.seen();
    assert_eq!(after.info.epoch, before.info.epoch + 1);
    after.info.epoch = before.info.epoch;
    assert_eq!(after, before);
    let busy = (status::EBUSY, phase::PAUSED);
    assert_eq!(vm.refused(op::RESTORE_ABORT, VM, &[]), busy);
}

fn restore_begin_in_armed_begins_again_from_the_vm_before(on: World) {
    let mut vm = on.configured(2, configure::CONFIRM);
    vm.set(0, &[(CNT, 7_000), (CTL, 3), (CVAL, 9)]);
    let before = vm.get_all(0);
    vm.restore_begin(2, restore::AUTORUN);
    for vcpu in 0..2 {
        vm.restored(vcpu, 1_000_000);
    }
    let waiter = vm.wait(0);
    let begin = restore_body(2, 0, 0, 0);
    let (begun, released) = vm.releasing((op::RESTORE_BEGIN, VM, &begin), &[waiter]);
    begun.ok(0);
    assert_eq!(released[0].outcome(), (status::ESTALE, 0));
    let info = vm.info();
    assert_eq!(
        (info.phase, info.epoch, info.restored),
        (phase::RESTORING, 3, 0)
    );
    let [ctl, cnt, cval, ..] = vm.get_all(0);
    assert_eq!([ctl, cnt, cval], before[..3]);
    assert_eq!(vm.refused(op::RESTORE_DONE, 0, &[]), (status::ENODATA, 7));
}

fn a_pause_in_armed_ends_the_restore(on: World) {
    let mut vm = on.armed_by_restore(1, 1_000);
    let paused = vm.pause();
    assert!(paused.virt_count >= 1_000);
    let busy = (status::EBUSY, phase::PAUSED);
    assert_eq!(vm.refused(op::RESTORE_ABORT, VM, &[]), busy);
    assert_eq!(vm.refused(op::RESTORE_DONE, 0, &[]), busy);
    vm.resume();
    let busy = (status::EBUSY, phase::ARMED);
    assert_eq!(vm.refused(op::RESTORE_ABORT, VM, &[]), busy);
}

fn a_confirmation_ends_the_restore(on: World) {
    let mut vm = on.armed_by_restore(1, 1_000);
    vm.confirm();
    let busy = (status::EBUSY, phase::RUNNING);
    assert_eq!(vm.refused(op::RESTORE_ABORT, VM, &[]), busy);
    assert_eq!(vm.refused(op::RESTORE_DONE, 0, &[]), busy);
}

/// A VM that a restore with a time-out of so many nanoseconds has armed, and CLOCK_MONOTONIC, ns,
/// before that restore began.
fn armed_with_time_out(on: World, timeout_ns: u64) -> (Vm, u64) {
    let mut vm = on.configured(2, configure::CONFIRM);
    let began = vm.driver.monotonic();
    vm.begin(2, restore::AUTORUN, 0, timeout_ns);
    vm.restored(0, 5);
    vm.restored(1, 5);
    (vm, began)
}

fn the_time_out_counts_on_in_armed(on: World) {
    with_longer_spans(|span| {
        let (mut vm, began) = armed_with_time_out(on, span);
        let offsets = vm.offsets();
        let waiters = [(1, vm.wait_run(1, 1)), (2, vm.wait_run(2, 0))];
        vm.settle();
        if vm.driver.monotonic() - began >= span {
            // Who asks after the time-out waits on.
            return false;
        }
        vm.pass(span);
        for answer in vm.answers(&waiters) {
            assert_eq!(answer.outcome(), (status::ETIMEDOUT, 0));
        }
        assert_eq!((vm.phase(), vm.offsets()), (phase::ARMED, offsets));
        let waiter = vm.wait(0);
        vm.pass(span);
        vm.no_answer(1);
        let (_, released) = vm.releasing((op::CONFIRM_RUN, VM, &words(&offsets)), &[waiter]);
        released[0].ok(40);
        true
    });
}

fn the_log_says_that_the_vmm_has_not_confirmed(on: World) {
    let (mut vm, _) = armed_with_time_out(on, HZ);
    vm.pass(HZ - 1);
    vm.exact().notices();
    assert_eq!(vm.exact().ticks_to_next(), Some(1));
    vm.pass(1);
    let missing = Vec::new();
    let notice = Notice::RestoreTimedOut { missing, vcpus: 2 };
    assert_eq!(vm.exact().notices(), [notice]);
    assert_eq!(vm.exact().ticks_to_next(), None);
}

fn the_backends_log_says_that_the_vmm_has_not_confirmed() {
    with_longer_spans(|span| {
        let rig = Rig::launch_release(&[]);
        let mut client = Client::connect(&rig);
        client.configure_with(1, configure::CONFIRM);
        let body = restore_body(1, restore::AUTORUN, 0, span);
        client.vm(op::RESTORE_BEGIN, &body).ok(0);
        client.set_done(0, &[(CTL, 0), (CNT, 5), (CVAL, 0)]);
        let waiter = client.wait_run(1, 0);
        let answers = answers_by_the_time_out(&rig, &mut client, span);
        let Some(answer) = answers.get(&waiter) else {
            return false;
        };
        assert_eq!(answer.outcome(), (status::ETIMEDOUT, 0));
        rig.log_with("all 1 vCPUs are restored, and CONFIRM_RUN is missing; the VM stays ARMED");
        true
    });
}

fn a_backend_killed_in_armed_comes_back_armed_with_the_same_offsets() {
    let rig = Rig::launch_devices_with_state(Devices::Timer, &[]);
    let mut client = Client::connect(&rig);
    client.configure_with(2, configure::CONFIRM);
    let armed = client.resume();
    drop(client);
    let rig = rig.die_and_go_on(|| (), &[]);
    let mut client = Client::connect(&rig);
    let info = client.info();
    assert_eq!((info.phase, info.flags), (phase::ARMED, 8));
    assert_eq!((info.cntvoff, info.cntpoff), (armed.cntvoff, armed.cntpoff));
    let busy = (status::EBUSY, phase::ARMED);
    assert_eq!(client.vm(op::RESTORE_ABORT, &[]).outcome(), busy);
    client.confirm();
    assert_eq!(client.info().phase, phase::RUNNING);
}

fn a_restores_armed_comes_back_with_what_each_vcpu_brought() {
    let rig = Rig::launch_devices_with_state(Devices::Timer, &[]);
    let mut client = Client::connect(&rig);
    client.configure_with(2, configure::CONFIRM);
    client.set(0, &[(CNT, 77)]);
    client.restore_begin(2, restore::AUTORUN);
    let brought = [(CTL, 1), (CNT, 1_000), (CVAL, u64::MAX)];
    assert_eq!(client.set_done(0, &brought), (0, 0, 1));
    client.set_done(1, &[(CTL, 0), (CNT, 2_000), (CVAL, 0)]);
    let armed = client.info();
    drop(client);
    let rig = rig.die_and_go_on(|| (), &[]);
    let mut client = Client::connect(&rig);
    let info = client.info();
    assert_eq!(
        (info.phase, info.epoch, info.cntvoff),
        (phase::ARMED, armed.epoch, armed.cntvoff)
    );
    // What was carried out can be sent again, and nothing else.
    assert_eq!(client.set_done(0, &brought), (0, 0, 0));
    let other = client.ask_done(op::SET_REGS, 0, &words(&[CNT, 1_001]));
    assert_eq!(other.outcome(), (status::EBUSY, phase::ARMED));
    client.vm(op::RESTORE_ABORT, &[]).ok(0);
    assert_eq!(client.info().phase, phase::PAUSED);
    assert_eq!(client.get_one(1, CNT), 77);
}
