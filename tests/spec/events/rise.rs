//! When a line that rises is reported, in which order, and what a buffer gets.

use vhost_user_timer_kit::clock_driver::host::with_longer_spans;
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, Event, PCNT, PCTL, PCVAL, PHASE_CHANGED, TIMER_ASSERTED, phase,
};
use vhost_user_timer_kit::raw_driver::{Cut, Layout, Rig};

use super::{ASSERTED, CHANGED, asserted, configured, due, post, resume};
use crate::world::{Clock, MS, Vm, World};

scenarios! {
    both {
        an_event_names_timer_vcpu_compare_value_count_and_epoch: "8.1" "8.3" "8.4" "8.7";
        a_timer_that_falls_due_is_reported_once_with_a_count_at_or_past_its_cval: "8.4" "8.6" "8.7";
        timers_are_reported_in_the_order_in_which_they_fall_due: "8.4";
        thousands_of_timers_due_at_once_are_all_reported: "8.4" "8.5" "8.6";
        a_line_that_a_write_raises_is_in_its_lines_and_in_no_event: "8.10" "6.20";
        a_masked_or_disabled_timer_never_fires: "6.21" "8.4" "8.10";
        a_timer_can_be_armed_again_and_again_and_is_reported_once_each_time: "8.6";
        a_reprogrammed_timer_fires_at_the_second_value_alone: "8.4";
        a_line_that_is_high_at_the_change_to_running_is_reported: "8.5" "8.6";
        the_change_to_running_is_reported_before_the_timers: "8.5" "8.8";
        of_many_phase_changes_the_last_is_reported: "8.13";
        only_running_reports_timers_and_what_is_due_then_is_reported_at_the_change_to_running:
            "8.5" "8.9";
        with_no_buffer_posted_an_event_waits_one_per_vcpu_and_timer: "8.11";
        a_waiting_event_is_dropped_if_the_line_fell_meanwhile: "8.12";
        a_line_that_fell_and_was_raised_again_by_a_write_leaves_no_event: "8.10" "8.12";
        a_line_that_stays_high_over_a_write_is_still_reported: "8.6" "8.12";
    }
    binary {
        a_buffer_under_32_bytes_comes_back_empty_and_the_event_waits_for_the_next: "8.1" "8.2";
        an_event_takes_32_bytes_of_a_larger_buffer_cut_anywhere: "2.5" "8.1" "8.3";
    }
}

/// A VM that runs with both clocks from zero, and whose events so far have been read.
fn from_zero(on: World, vcpus: u32) -> Vm {
    let mut vm = on.paused(vcpus);
    vm.set(0, &[(CNT, 0), (PCNT, 0)]);
    vm.resume();
    vm.events();
    vm
}

/// Arms vCPU 0's virtual timer so many ticks ahead; its line does not rise by the write. Returns
/// the compare value.
fn arm_ahead(vm: &mut Vm, ticks: u64) -> u64 {
    loop {
        let cval = vm.get_one(0, CNT) + ticks;
        if vm.set(0, &[(CTL, 1), (CVAL, cval)]) == (0, 0) {
            return cval;
        }
        vm.set(0, &[(CTL, 0)]);
    }
}

fn an_event_names_timer_vcpu_compare_value_count_and_epoch(on: World) {
    for clock in Clock::BOTH {
        let mut vm = on.paused(4);
        vm.set(0, &[(CNT, 0), (PCNT, 0)]);
        vm.arm(3, clock, 1, 10);
        vm.resume();
        vm.pass(12);
        vm.post_event_buffer();
        vm.event();
        // Without a buffer it waits, and the count is that of the writing.
        vm.pass(5);
        let mut event = None;
        let count = vm.reads_now(clock, |vm| {
            vm.post_event_buffer();
            event.insert(vm.event()).count
        });
        let expected = Event {
            kind: TIMER_ASSERTED,
            timer: clock.code(),
            vcpu: 3,
            cval: 10,
            count,
            epoch: 1,
        };
        assert_eq!(event, Some(expected));
        if vm.model().is_some() {
            assert_eq!(count, 17);
        }
    }
}

fn a_timer_that_falls_due_is_reported_once_with_a_count_at_or_past_its_cval(on: World) {
    let mut vm = configured(on, 2);
    vm.set(0, &[(CNT, 0), (PCNT, 0)]);
    vm.set(1, &[(CTL, 1), (CVAL, 5 * MS)]);
    vm.set(0, &[(PCTL, 1), (PCVAL, 10 * MS)]);
    post(&mut vm, 6);
    vm.resume();
    for (what, cval) in [(ASSERTED(0, 1), 5 * MS), (ASSERTED(1, 0), 10 * MS)] {
        let event = asserted(&mut vm);
        assert_eq!((event.what(), event.cval, event.epoch), (what, cval, 1));
        assert!(event.count >= cval);
    }
    vm.pass(MS);
    vm.no_event();
    assert_eq!(vm.get_one(1, CTL), 5);
}

fn timers_are_reported_in_the_order_in_which_they_fall_due(on: World) {
    let mut vm = configured(on, 20);
    vm.set(0, &[(CNT, 0)]);
    for vcpu in 0..20 {
        vm.arm(vcpu, Clock::Virtual, 1, (20 - u64::from(vcpu)) * MS);
    }
    resume(&mut vm);
    post(&mut vm, 20);
    for vcpu in (0..20).rev() {
        assert_eq!(vm.event().what(), ASSERTED(0, vcpu));
    }
    vm.no_event();
}

fn thousands_of_timers_due_at_once_are_all_reported(on: World) {
    let mut vm = on.paused(4096);
    for vcpu in 0..4096 {
        vm.set(vcpu, &[(CTL, 1)]);
    }
    vm.resume();
    let mut reported = vec![0; 4096];
    let mut phases = 0;
    while reported.iter().sum::<u32>() < 4096 {
        vm.post_event_buffer();
        let event = vm.event();
        match event.kind {
            TIMER_ASSERTED => reported[event.vcpu as usize] += 1,
            _ => phases += 1,
        }
    }
    assert!(reported.iter().all(|n| *n == 1) && phases == 1);
    vm.post_event_buffer();
    vm.no_event();
}

fn a_line_that_a_write_raises_is_in_its_lines_and_in_no_event(on: World) {
    for clock in Clock::BOTH {
        let [ctl, _, cval] = clock.registers();
        let line = clock.line();
        let mut vm = from_zero(on, 4);
        vm.pass(100);
        assert_eq!(vm.arm(0, clock, 1, 100), line);
        assert_eq!(vm.set(0, &[(ctl, 3)]).0, 0);
        assert_eq!(vm.set(0, &[(ctl, 1)]).0, line);
        assert_eq!(vm.set(0, &[(cval, 1 << 40)]).0, 0);
        assert_eq!(vm.set(0, &[(cval, 50)]).0, line);
        vm.pass(1_000);
        assert_eq!(vm.fired(), []);
    }
}

fn a_masked_or_disabled_timer_never_fires(on: World) {
    let mut vm = configured(on, 2);
    vm.set(0, &[(CNT, 0), (CTL, 3), (CVAL, MS)]);
    vm.set(1, &[(CTL, 2), (CVAL, MS)]);
    resume(&mut vm);
    post(&mut vm, 4);
    vm.pass(2 * MS);
    vm.no_event();
    // The line rises by the write, not by the passing of time: its answer says so.
    assert_eq!(vm.set(0, &[(CTL, 1)]), (1, 0));
    vm.no_event();
}

fn a_timer_can_be_armed_again_and_again_and_is_reported_once_each_time(on: World) {
    let mut vm = configured(on, 1);
    resume(&mut vm);
    for _ in 0..20 {
        vm.post_event_buffer();
        let cval = arm_ahead(&mut vm, MS);
        let event = vm.event();
        assert_eq!((event.what(), event.cval), (ASSERTED(0, 0), cval));
        // As a guest's handler would.
        vm.set(0, &[(CTL, 3)]);
    }
    vm.post_event_buffer();
    vm.no_event();
}

fn a_reprogrammed_timer_fires_at_the_second_value_alone(on: World) {
    // Later and then earlier, and the reverse.
    for (first, second) in [(10_000, 10), (200, 250)] {
        let mut vm = configured(on, 1);
        vm.set(0, &[(CNT, 0)]);
        resume(&mut vm);
        post(&mut vm, 40);
        loop {
            let first_due = arm_ahead(&mut vm, first * MS);
            let cval = arm_ahead(&mut vm, second * MS);
            if vm.get_one(0, CNT) < first_due {
                // In time, so only the second counts.
                assert_eq!(vm.event().cval, cval);
                vm.no_event();
                break;
            }
            vm.set(0, &[(CTL, 0)]);
            vm.settle();
            while vm.driver.used_already(0).is_some() {}
        }
    }
}

fn a_line_that_is_high_at_the_change_to_running_is_reported(on: World) {
    let mut vm = configured(on, 3);
    vm.set(0, &[(CNT, 100), (PCNT, 100), (CTL, 1), (CVAL, 100)]);
    vm.set(1, &[(PCTL, 1), (PCVAL, 0)]);
    // Not this one's: masked; nor this: disabled.
    vm.set(2, &[(CTL, 3), (CVAL, 0), (PCTL, 0), (PCVAL, 0)]);
    post(&mut vm, 8);
    vm.no_event();
    vm.resume();
    assert_eq!(vm.event().what(), CHANGED(phase::RUNNING));
    let mut reported = [vm.event().what(), vm.event().what()];
    reported.sort_unstable();
    assert_eq!(reported, [ASSERTED(0, 0), ASSERTED(1, 1)]);
    vm.pass(100);
    vm.no_event();
}

fn the_change_to_running_is_reported_before_the_timers(on: World) {
    let mut vm = on.paused(1);
    vm.arm(0, Clock::Virtual, 1, 0);
    vm.resume();
    let kinds: Vec<_> = vm.events().iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [PHASE_CHANGED, TIMER_ASSERTED]);
}

fn of_many_phase_changes_the_last_is_reported(on: World) {
    let mut vm = on.paused(1);
    vm.resume();
    vm.pause();
    vm.resume();
    let phases: Vec<_> = vm.events().iter().map(|event| event.vcpu).collect();
    assert_eq!(phases, [phase::RUNNING]);
}

fn only_running_reports_timers_and_what_is_due_then_is_reported_at_the_change_to_running(
    on: World,
) {
    with_longer_spans(|span| {
        let mut vm = configured(on, 3);
        vm.set(0, &[(CNT, 0), (PCNT, 0)]);
        vm.resume();
        vm.events();
        vm.pause_counting();
        vm.events();
        let due = vm.virt() + span;
        // The lines are low yet, where these requests are in time.
        let lines = vm.arm(0, Clock::Virtual, 1, due) | vm.arm(1, Clock::Physical, 1, due);
        vm.arm(2, Clock::Virtual, 3, due);
        vm.pass(span + 5 * MS);
        assert_eq!(vm.events(), []);
        if let Some(model) = vm.model() {
            assert_eq!(model.ticks_to_next(), None);
        }
        vm.resume();
        assert_eq!(vm.fired(), [(0, 0), (1, 1)]);
        vm.pass(500);
        assert_eq!(vm.fired(), []);
        lines == 0
    });
    // PAUSED with pinned clocks that count past the compare value, and RESTORING.
    let mut vm = configured(on, 1);
    vm.set_offset(0);
    let now = vm.info().host_count;
    vm.set(0, &[(CTL, 1), (CVAL, now + MS)]);
    vm.pass(2 * MS);
    assert_eq!(vm.events(), []);
    vm.restore_begin(1, 0);
    let events = vm.events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].what(), CHANGED(phase::RESTORING));
}

fn with_no_buffer_posted_an_event_waits_one_per_vcpu_and_timer(on: World) {
    let mut vm = configured(on, 2);
    vm.set(0, &[(CNT, 0), (PCNT, 0)]);
    resume(&mut vm);
    for _ in 0..3 {
        vm.pause();
        // The previous rise is over before the next one.
        let due = vm.get_one(0, CNT) + MS;
        for vcpu in 0..2 {
            vm.set(vcpu, &[(CTL, 1), (CVAL, due), (PCTL, 1), (PCVAL, 2 * due)]);
        }
        vm.resume();
        for vcpu in 0..2 {
            vm.until(|vm| vm.get(vcpu, &[CTL, PCTL]) == [5, 5]);
        }
        vm.settle();
    }
    vm.post_event_buffer();
    assert_eq!(vm.event().what(), CHANGED(phase::RUNNING));
    post(&mut vm, 5);
    let mut reported: Vec<_> = (0..4).map(|_| vm.event().what()).collect();
    reported.sort_unstable();
    let wanted = [
        ASSERTED(0, 0),
        ASSERTED(0, 1),
        ASSERTED(1, 0),
        ASSERTED(1, 1),
    ];
    assert_eq!(reported, wanted);
    vm.no_event();
}

fn a_waiting_event_is_dropped_if_the_line_fell_meanwhile(on: World) {
    for clock in Clock::BOTH {
        let [ctl, _, cval] = clock.registers();
        for fall in [
            (ctl, 0),
            (ctl, 2),
            (ctl, 3),
            (cval, 1 << 40),
            (cval, u64::MAX),
        ] {
            let mut vm = due(on, clock);
            vm.set(0, &[fall]);
            vm.post_event_buffer();
            vm.no_event();
        }
    }
}

fn a_line_that_fell_and_was_raised_again_by_a_write_leaves_no_event(on: World) {
    let mut vm = due(on, Clock::Virtual);
    vm.set(0, &[(CTL, 3)]);
    assert_eq!(vm.set(0, &[(CTL, 1)]).0, 1);
    assert_eq!(vm.fired(), []);
}

fn a_line_that_stays_high_over_a_write_is_still_reported(on: World) {
    let mut vm = due(on, Clock::Virtual);
    assert_eq!(vm.set(0, &[(CVAL, 5)]).0, 1);
    let events = vm.events();
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].what(), events[0].cval), (ASSERTED(0, 0), 5));
    vm.pass(100);
    assert_eq!(vm.fired(), []);
}

/// A VM over its socket, whose change of phase has been read.
fn over_its_socket(rig: &Rig) -> Client {
    let mut client = Client::connect(rig);
    client.configure(1);
    client.post_event_buffer();
    assert_eq!(client.event().what(), CHANGED(phase::PAUSED));
    client
}

fn a_buffer_under_32_bytes_comes_back_empty_and_the_event_waits_for_the_next() {
    let rig = Rig::launch_release(&[]);
    let mut client = over_its_socket(&rig);
    for room in [0, 1, 31] {
        client.resume();
        let head = client.driver.submit(0, &[0; 4], room, &Layout::plain());
        let used = client.driver.used(0);
        assert_eq!((used.head, used.len), (head, 0));
        client.post_event_buffer();
        assert_eq!(client.event().what(), CHANGED(phase::RUNNING));
        client.post_event_buffer();
        client.pause();
        assert_eq!(client.event().what(), CHANGED(phase::PAUSED));
    }
}

fn an_event_takes_32_bytes_of_a_larger_buffer_cut_anywhere() {
    let rig = Rig::launch_release(&[]);
    let mut client = over_its_socket(&rig);
    for layout in [
        Layout::plain(),
        Layout::cut(Cut::every(1)),
        Layout::cut(Cut::at(&[3, 0, 7])).indirect(),
    ] {
        client.driver.submit(0, &[], 64, &layout);
        client.resume();
        let used = client.driver.used(0);
        assert_eq!(used.len, 32);
        assert_eq!(Event::of(&used).what(), CHANGED(phase::RUNNING));
        client.driver.submit(0, &[], 64, &layout);
        client.pause();
        assert_eq!(client.event().what(), CHANGED(phase::PAUSED));
    }
}
