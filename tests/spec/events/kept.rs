//! A due timer is not lost, whatever comes between.

use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::contract::{CNT, CTL, CVAL, Client, TIMER_ASSERTED, phase, restore};
use vhost_user_timer_kit::raw_driver::Rig;

use super::{ASSERTED, CHANGED, asserted, configured, due, post, resume};
use crate::world::{Clock, HZ, MS, World};

scenarios! {
    both {
        a_due_timer_is_not_lost_over_pause_and_resume: "8.5" "8.14";
        a_line_unreported_at_a_pause_is_reported_at_the_resume_once: "8.6" "8.14";
        a_timer_that_falls_due_while_the_clocks_count_through_a_pause_is_reported_on_resume: "8.14";
        a_timer_restored_as_due_is_reported_with_autorun_and_after_resume_without: "8.15";
        a_due_timer_is_not_lost_over_a_reconnect: "8.16" "8.18";
        an_event_that_a_lost_frontend_may_not_have_read_is_reported_again: "8.18";
        a_due_timer_is_not_lost_over_a_stop_of_the_event_queue: "1.13" "8.11";
        after_reset_device_nothing_of_the_old_vm_is_reported: "1.18";
    }
    binary {
        a_due_timer_is_not_lost_over_a_restart_with_the_state_file: "8.17";
    }
}

fn a_due_timer_is_not_lost_over_pause_and_resume(on: World) {
    let mut vm = configured(on, 1);
    vm.set(0, &[(CNT, 0), (CTL, 1), (CVAL, 3 * MS)]);
    resume(&mut vm);
    for _ in 0..5 {
        vm.pause();
        vm.resume();
    }
    // The buffers come late: they report the newest phase first, or no phase at all.
    post(&mut vm, 3);
    assert_eq!(asserted(&mut vm).what(), ASSERTED(0, 0));
    // Reported before a pause and still high: it is high at the change to RUNNING.
    vm.pause();
    vm.resume();
    post(&mut vm, 3);
    assert_eq!(asserted(&mut vm).what(), ASSERTED(0, 0));
}

fn a_line_unreported_at_a_pause_is_reported_at_the_resume_once(on: World) {
    let mut vm = due(on, Clock::Virtual);
    vm.pause();
    assert_eq!(vm.fired(), []);
    vm.resume();
    assert_eq!(vm.fired(), [(0, 0)]);
    vm.pass(100);
    assert_eq!(vm.fired(), []);
}

fn a_timer_that_falls_due_while_the_clocks_count_through_a_pause_is_reported_on_resume(on: World) {
    let mut vm = configured(on, 1);
    vm.set(0, &[(CNT, 0), (CTL, 1), (CVAL, 2 * MS)]);
    resume(&mut vm);
    vm.pause_counting();
    vm.until(|vm| vm.get_one(0, CTL) == 5);
    vm.resume();
    post(&mut vm, 3);
    assert_eq!(asserted(&mut vm).what(), ASSERTED(0, 0));
}

fn a_timer_restored_as_due_is_reported_with_autorun_and_after_resume_without(on: World) {
    for flags in [restore::AUTORUN, 0] {
        let mut vm = on.restoring(2, flags);
        vm.set(0, &[(CTL, 1), (CVAL, 400), (CNT, 10)]);
        // Not due by what that vCPU brought; due by the count that is settled.
        vm.set(1, &[(CTL, 0), (CVAL, 0), (CNT, 500)]);
        vm.restore_done(0);
        vm.restore_done(1);
        if flags == 0 {
            assert_eq!(vm.fired(), []);
            vm.resume();
        }
        assert_eq!(vm.fired(), [(0, 0)]);
        assert_eq!(vm.fired(), []);
    }
}

fn a_due_timer_is_not_lost_over_a_reconnect(on: World) {
    let mut vm = configured(on, 2);
    vm.set(0, &[(CNT, 0), (CTL, 1), (CVAL, MS)]);
    vm.set(1, &[(CTL, 1), (CVAL, 40 * MS)]);
    resume(&mut vm);
    vm.until(|vm| vm.get_one(0, CTL) == 5);
    // One is due and was not reported; the other falls due for the next frontend.
    vm.driver.reconnect();
    vm.until(|vm| vm.get_one(1, CTL) == 5);
    post(&mut vm, 4);
    let mut reported = [asserted(&mut vm).what(), asserted(&mut vm).what()];
    reported.sort_unstable();
    assert_eq!(reported, [ASSERTED(0, 0), ASSERTED(0, 1)]);
}

fn an_event_that_a_lost_frontend_may_not_have_read_is_reported_again(on: World) {
    let mut vm = due(on, Clock::Virtual);
    vm.post_event_buffer();
    assert_eq!(vm.event().what(), ASSERTED(0, 0));
    vm.driver.reconnect();
    vm.post_event_buffer();
    assert_eq!(asserted(&mut vm).what(), ASSERTED(0, 0));
}

fn a_due_timer_is_not_lost_over_a_stop_of_the_event_queue(on: World) {
    let mut vm = configured(on, 1);
    vm.set(0, &[(CNT, 0), (CTL, 1), (CVAL, MS)]);
    resume(&mut vm);
    vm.driver.stop(0);
    vm.until(|vm| vm.get_one(0, CTL) == 5);
    vm.driver.start(0);
    vm.post_event_buffer();
    assert_eq!(vm.event().what(), ASSERTED(0, 0));
}

fn after_reset_device_nothing_of_the_old_vm_is_reported(on: World) {
    let mut vm = configured(on, 1);
    vm.set(0, &[(CTL, 1)]);
    vm.resume();
    vm.driver.reset();
    post(&mut vm, 2);
    vm.no_event();
    vm.configure(1);
    assert_eq!(vm.event().what(), CHANGED(phase::PAUSED));
    vm.no_event();
}

fn a_due_timer_is_not_lost_over_a_restart_with_the_state_file() {
    let rig = Rig::launch_devices_with_state(Devices::Timer, &[]);
    let mut client = Client::connect(&rig);
    client.configure(2);
    client.set(0, &[(CNT, 0), (CTL, 1), (CVAL, MS)]);
    client.set(1, &[(CTL, 1), (CVAL, HZ / 100)]);
    client.resume();
    while client.get_one(0, CTL) != 5 {}
    // One is due and was not reported; the other falls due with nobody there, or later.
    let rig = rig.die_and_go_on(|| drop(client), &[]);
    let mut client = Client::connect(&rig);
    for _ in 0..3 {
        client.post_event_buffer();
    }
    let mut reported: Vec<_> = std::iter::repeat_with(|| client.event())
        .filter(|event| event.kind == TIMER_ASSERTED)
        .take(2)
        .map(|event| event.what())
        .collect();
    reported.sort_unstable();
    assert_eq!(reported, [ASSERTED(0, 0), ASSERTED(0, 1)]);
}
