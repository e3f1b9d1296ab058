//! To the tick: when the next event is due, and what a wrap of a count does.

use vhost_user_timer_kit::contract::{CNT, CVAL, PCNT};

use crate::world::Clock::{self, Physical, Virtual};
use crate::world::{HZ, Vm, World};

scenarios! {
    model {
        a_line_that_rises_by_the_passing_of_time_is_reported_once: "8.4" "8.6";
        a_timer_switched_off_is_not_waited_for_and_leaves_no_event_when_it_is_back_on:
            "6.21" "8.10";
        one_event_per_vcpu_and_timer_waits_at_most: "8.11";
        each_rise_is_reported_where_the_frontend_reads_between: "8.6";
        many_timers_due_at_once_or_one_after_another_are_all_reported: "8.4" "8.6";
        only_running_reports_timers_and_what_is_due_then_is_reported_at_the_change_to_running:
            "8.5" "8.9";
        a_timer_that_was_not_due_at_the_pause_fires_as_long_after_it_as_it_had_left: "4.8" "8.14";
        after_a_disconnect_every_line_that_stands_high_is_reported_again: "8.18";
        at_a_wrap_lines_fall_and_rise_again_and_each_rise_is_reported: "4.2" "8.4" "8.6";
        a_line_that_is_always_high_does_not_rise_at_a_wrap: "8.6";
        an_event_unreported_at_a_wrap_is_dropped_with_its_line_for_good: "8.12";
        an_event_is_dropped_if_the_line_fell_by_a_wrap_of_which_the_vm_has_not_heard_yet: "8.12";
        an_event_unreported_at_a_wrap_over_which_its_line_stayed_high_is_reported_once: "8.6";
        a_timer_passed_over_by_a_jump_beyond_the_wrap_leaves_no_event: "8.12";
        a_sleeper_that_wakes_at_each_alarm_sees_every_event_at_its_tick: "4.2" "8.4";
        a_line_reported_before_a_pause_is_reported_again_at_the_resume: "8.5";
    }
}

/// A VM of 4 vCPUs that runs with both clocks at zero.
fn from_zero(on: World) -> Vm {
    before_the_wrap(on, 0)
}

/// A VM of 4 vCPUs that runs with both clocks `left` ticks before they wrap.
fn before_the_wrap(on: World, left: u64) -> Vm {
    let mut vm = on.paused(4);
    let count = 0_u64.wrapping_sub(left);
    vm.set(0, &[(CNT, count), (PCNT, count)]);
    vm.resume();
    vm.events();
    vm
}

fn a_line_that_rises_by_the_passing_of_time_is_reported_once(on: World) {
    for clock in Clock::BOTH {
        let mut vm = from_zero(on);
        assert_eq!(vm.arm(1, clock, 1, 10), 0);
        assert_eq!(vm.exact().ticks_to_next(), Some(10));
        vm.pass(9);
        assert_eq!(vm.fired(), []);
        vm.pass(1);
        assert!(vm.exact().vm.has_event());
        assert_eq!(vm.fired(), [(1, clock.code())]);
        assert!(!vm.exact().vm.has_event());
        vm.pass(1_000);
        assert_eq!(vm.fired(), []);
    }
}

fn a_timer_switched_off_is_not_waited_for_and_leaves_no_event_when_it_is_back_on(on: World) {
    for clock in Clock::BOTH {
        for off in [0, 2, 3] {
            let [ctl, ..] = clock.registers();
            let mut vm = from_zero(on);
            vm.arm(0, clock, 1, 10);
            vm.set(0, &[(ctl, off)]);
            assert!(vm.exact().ticks_to_next() > Some(HZ));
            vm.pass(10);
            assert!(!vm.exact().vm.has_event());
            assert_ne!(vm.set(0, &[(ctl, 1)]).0, 0);
            assert_eq!(vm.fired(), []);
        }
    }
}

fn one_event_per_vcpu_and_timer_waits_at_most(on: World) {
    let mut vm = from_zero(on);
    for n in 1..100 {
        // Due, not read, and armed again.
        vm.arm(2, Virtual, 1, n * 10);
        vm.arm(2, Physical, 1, n * 10);
        vm.pass(10);
    }
    assert_eq!(vm.fired(), [(2, 0), (2, 1)]);
}

fn each_rise_is_reported_where_the_frontend_reads_between(on: World) {
    let mut vm = from_zero(on);
    for n in 1..100 {
        assert_eq!(vm.arm(2, Virtual, 1, n * 10), 0);
        vm.pass(10);
        assert_eq!(vm.fired(), [(2, 0)]);
    }
}

fn many_timers_due_at_once_or_one_after_another_are_all_reported(on: World) {
    let mut vm = on.paused(300);
    vm.set(0, &[(PCNT, 0)]);
    vm.resume();
    vm.events();
    let mut expected = Vec::new();
    for vcpu in 0..300 {
        let cval = 1 + u64::from(vcpu * 7919 % 300);
        for clock in Clock::BOTH {
            vm.arm(vcpu, clock, 1, cval);
            expected.push((vcpu, clock.code()));
        }
    }
    let mut at_once = vm.twin();
    at_once.pass(300);
    assert_eq!(at_once.fired(), expected);

    let mut fired = Vec::new();
    for _ in 0..300 {
        let ticks = vm.exact().ticks_to_next().unwrap();
        vm.pass(ticks);
        let now = vm.fired();
        assert_eq!(now.len(), 2, "vCPUs fall due one by one");
        fired.extend(now);
    }
    fired.sort_unstable();
    assert_eq!(fired, expected);
}

fn only_running_reports_timers_and_what_is_due_then_is_reported_at_the_change_to_running(
    on: World,
) {
    let mut vm = from_zero(on);
    vm.arm(0, Virtual, 1, 10);
    vm.arm(1, Physical, 1, 20);
    vm.arm(2, Virtual, 3, 10);
    vm.pause_counting();
    vm.pass(500);
    assert_eq!(vm.fired(), []);
    assert_eq!(vm.exact().ticks_to_next(), None);
    vm.resume();
    assert_eq!(vm.fired(), [(0, 0), (1, 1)]);
    vm.pass(500);
    assert_eq!(vm.fired(), []);
}

fn a_timer_that_was_not_due_at_the_pause_fires_as_long_after_it_as_it_had_left(on: World) {
    let mut vm = from_zero(on);
    vm.arm(0, Virtual, 1, 100);
    vm.pass(40);
    vm.pause();
    vm.pass(HZ);
    vm.resume();
    assert_eq!(vm.exact().ticks_to_next(), Some(60));
    vm.pass(59);
    assert_eq!(vm.fired(), []);
    vm.pass(1);
    assert_eq!(vm.fired(), [(0, 0)]);
}

fn after_a_disconnect_every_line_that_stands_high_is_reported_again(on: World) {
    let mut vm = from_zero(on);
    vm.arm(0, Virtual, 1, 10);
    vm.pass(10);
    assert_eq!(vm.fired(), [(0, 0)]);
    assert_eq!(vm.arm(1, Physical, 1, 0), 2);
    vm.arm(2, Virtual, 3, 0);
    vm.arm(3, Virtual, 1, 11);
    vm.arm(3, Physical, 1, 100);
    // One more falls due with nobody there.
    vm.exact().drift(1);
    vm.driver.reconnect();
    let expected = [(0, 0), (1, 1), (3, 0)];
    assert_eq!(vm.fired(), expected);
    vm.pass(99);
    assert_eq!(vm.fired(), [(3, 1)]);
}

fn at_a_wrap_lines_fall_and_rise_again_and_each_rise_is_reported(on: World) {
    for clock in Clock::BOTH {
        let mut vm = before_the_wrap(on, 10);
        assert_ne!(vm.arm(0, clock, 1, 5), 0, "high by the write");
        vm.pass(10);
        assert_eq!(vm.fired(), []);
        assert_eq!(vm.exact().ticks_to_next(), Some(5));
        vm.pass(5);
        assert_eq!(vm.fired(), [(0, clock.code())]);
    }
}

fn a_line_that_is_always_high_does_not_rise_at_a_wrap(on: World) {
    for clock in Clock::BOTH {
        for jump in [10, 11, 500] {
            let mut vm = before_the_wrap(on, 10);
            assert_ne!(vm.arm(0, clock, 1, 0), 0);
            vm.pass(jump);
            assert_eq!(vm.fired(), [], "CVAL 0 is met by every count");
        }
    }
}

fn an_event_unreported_at_a_wrap_is_dropped_with_its_line_for_good(on: World) {
    let mut vm = before_the_wrap(on, 10);
    vm.arm(0, Virtual, 1, 0_u64.wrapping_sub(5));
    vm.pass(5);
    vm.pass(5);
    // Fell by the wrap. A write that raises it now speaks for itself.
    assert_eq!(vm.set(0, &[(CVAL, 0)]).0, 1);
    assert_eq!(vm.fired(), []);
}

fn an_event_is_dropped_if_the_line_fell_by_a_wrap_of_which_the_vm_has_not_heard_yet(on: World) {
    let mut vm = before_the_wrap(on, 10);
    vm.arm(0, Virtual, 1, 0_u64.wrapping_sub(5));
    vm.pass(5);
    vm.exact().drift(5);
    assert_eq!(vm.fired(), []);
    vm.pass(0);
    assert_eq!(vm.fired(), []);
}

fn an_event_unreported_at_a_wrap_over_which_its_line_stayed_high_is_reported_once(on: World) {
    let mut vm = before_the_wrap(on, 10);
    vm.pause();
    vm.arm(0, Virtual, 1, 0);
    vm.resume();
    vm.pass(10);
    assert_eq!(vm.fired(), [(0, 0)]);
    vm.pass(10);
    assert_eq!(vm.fired(), []);
}

fn a_timer_passed_over_by_a_jump_beyond_the_wrap_leaves_no_event(on: World) {
    let mut vm = before_the_wrap(on, 10);
    vm.arm(0, Virtual, 1, 0_u64.wrapping_sub(5));
    vm.pass(20);
    assert_eq!(vm.fired(), [], "the line rose and fell");
}

fn a_sleeper_that_wakes_at_each_alarm_sees_every_event_at_its_tick(on: World) {
    // Deadlines far apart and close together, over a wrap of both clocks.
    let mut vm = before_the_wrap(on, 50);
    for (vcpu, cval) in (0..).zip([0_u64.wrapping_sub(20), 7, 7, 1_000_000_000_000]) {
        vm.arm(vcpu, Virtual, 1, cval);
        vm.arm(vcpu, Physical, 1, cval.wrapping_add(1));
    }
    let mut seen = Vec::new();
    for _ in 0..20 {
        let ticks = vm.exact().ticks_to_next().unwrap();
        let mut early = vm.twin();
        early.pass(ticks - 1);
        assert_eq!(early.fired(), [], "nothing before the alarm");
        vm.pass(ticks);
        for (vcpu, clock) in vm.fired() {
            seen.push((vm.virt(), vcpu, clock));
        }
        if seen.len() == 8 {
            break;
        }
    }
    let expected = [
        (0_u64.wrapping_sub(20), 0, 0),
        (0_u64.wrapping_sub(19), 0, 1),
        (7, 1, 0),
        (7, 2, 0),
        (8, 1, 1),
        (8, 2, 1),
        (1_000_000_000_000, 3, 0),
        (1_000_000_000_001, 3, 1),
    ];
    assert_eq!(seen, expected);
}

fn a_line_reported_before_a_pause_is_reported_again_at_the_resume(on: World) {
    let mut vm = from_zero(on);
    vm.arm(0, Virtual, 1, 10);
    vm.pass(10);
    assert_eq!(vm.fired(), [(0, 0)]);
    vm.pause();
    vm.resume();
    assert_eq!(vm.fired(), [(0, 0)]);
}
