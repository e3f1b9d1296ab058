//! SPEC.md, "Events": once per rise, dropped with the line, never lost.

use vhost_user_timer_protocol::wire::restore_flags::AUTORUN;
use vhost_user_timer_protocol::{Phase, Register, wire};

use super::rig::{HZ, ON, Rig, registers_of};
use crate::vm::Timeline::{self, Physical, Virtual};

/// A VM of 4 vCPUs that runs with both clocks at zero.
fn from_zero() -> Rig {
    let mut rig = Rig::paused(4);
    rig.set(0, &[(Register::TimerCnt, 0), (Register::PtimerCnt, 0)]);
    rig.resume();
    rig.events();
    rig
}

#[test]
fn an_event_names_timer_vcpu_compare_value_count_and_epoch() {
    for (clock, code) in [
        (Virtual, wire::TIMER_VIRTUAL),
        (Physical, wire::TIMER_PHYSICAL),
    ] {
        let mut rig = from_zero();
        rig.arm(3, clock, ON, 10);
        rig.pass(12);
        // The count is that of the writing.
        rig.drift(5);
        let expected = wire::Event {
            kind: wire::EVENT_TIMER_ASSERTED.into(),
            timer: code.into(),
            vcpu: 3.into(),
            cval: 10.into(),
            count: 17.into(),
            epoch: 1.into(),
        };
        assert_eq!(rig.events(), [expected]);
    }
}

#[test]
fn a_line_that_rises_by_the_passing_of_time_is_told_once() {
    for clock in Timeline::ALL {
        let mut rig = from_zero();
        assert_eq!(rig.arm(1, clock, ON, 10), 0);
        assert_eq!(rig.vm.ticks_to_next(rig.now), Some(10));
        rig.pass(9);
        assert_eq!(rig.fired(), []);
        rig.pass(1);
        assert!(rig.vm.has_event());
        assert_eq!(rig.fired(), [(1, clock)]);
        assert!(!rig.vm.has_event());
        rig.pass(1_000);
        assert_eq!(rig.fired(), []);
    }
}

#[test]
fn a_line_that_a_write_raises_is_told_in_its_lines_and_by_no_event() {
    for clock in Timeline::ALL {
        let bit = [wire::LINE_VIRTUAL, wire::LINE_PHYSICAL][clock as usize];
        let [ctl, _, cval] = registers_of(clock);
        let mut rig = from_zero();
        rig.pass(100);
        assert_eq!(rig.arm(0, clock, ON, 100), bit);
        assert_eq!(rig.set(0, &[(ctl, 3)]).lines.get(), 0);
        assert_eq!(rig.set(0, &[(ctl, 1)]).lines.get(), bit);
        assert_eq!(rig.set(0, &[(cval, 200)]).lines.get(), 0);
        assert_eq!(rig.set(0, &[(cval, 50)]).lines.get(), bit);
        rig.pass(1_000);
        assert_eq!(rig.fired(), []);
    }
}

#[test]
fn an_event_is_dropped_if_the_line_fell_meanwhile() {
    for clock in Timeline::ALL {
        let [ctl, _, cval] = registers_of(clock);
        for fall in [
            (ctl, 0),
            (ctl, 2),
            (ctl, 3),
            (cval, 1_000),
            (cval, u64::MAX),
        ] {
            let mut rig = from_zero();
            rig.arm(0, clock, ON, 10);
            rig.pass(10);
            rig.set(0, &[fall]);
            assert_eq!(rig.fired(), [], "{fall:?}");
        }
    }
}

#[test]
fn a_line_that_fell_and_was_raised_again_by_a_write_leaves_no_event() {
    let mut rig = from_zero();
    rig.arm(0, Virtual, ON, 10);
    rig.pass(10);
    rig.set(0, &[(Register::TimerCtl, 3)]);
    assert_eq!(rig.set(0, &[(Register::TimerCtl, 1)]).lines.get(), 1);
    assert_eq!(rig.fired(), []);
}

#[test]
fn a_timer_switched_off_is_not_waited_for_and_leaves_no_event_when_it_is_back_on() {
    for clock in Timeline::ALL {
        for off in [0, 2, 3] {
            let [ctl, ..] = registers_of(clock);
            let mut rig = from_zero();
            rig.arm(0, clock, ON, 10);
            rig.set(0, &[(ctl, off)]);
            assert!(rig.vm.ticks_to_next(rig.now) > Some(HZ));
            rig.pass(10);
            assert!(!rig.vm.has_event());
            assert_ne!(rig.set(0, &[(ctl, ON)]).lines.get(), 0);
            assert_eq!(rig.fired(), []);
        }
    }
}

#[test]
fn a_line_that_stays_high_over_a_write_is_still_told() {
    let mut rig = from_zero();
    rig.arm(0, Virtual, ON, 10);
    rig.pass(10);
    assert_eq!(rig.set(0, &[(Register::TimerCval, 5)]).lines.get(), 1);
    let events = rig.events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].cval.get(), 5);
    rig.pass(100);
    assert_eq!(rig.fired(), []);
}

#[test]
fn one_event_per_vcpu_and_timer_waits_at_most() {
    let mut rig = from_zero();
    for n in 1..100 {
        // Due, not read, and armed anew.
        rig.arm(2, Virtual, ON, n * 10);
        rig.arm(2, Physical, ON, n * 10);
        rig.pass(10);
    }
    assert_eq!(rig.fired(), [(2, Virtual), (2, Physical)]);
}

#[test]
fn each_rise_is_told_where_the_frontend_reads_between() {
    let mut rig = from_zero();
    for n in 1..100 {
        assert_eq!(rig.arm(2, Virtual, ON, n * 10), 0);
        rig.pass(10);
        assert_eq!(rig.fired(), [(2, Virtual)]);
    }
}

#[test]
fn many_timers_due_at_once_or_one_after_another_are_all_told() {
    let mut rig = Rig::paused(300);
    rig.set(0, &[(Register::PtimerCnt, 0)]);
    rig.resume();
    rig.events();
    let mut expected = Vec::new();
    for vcpu in 0..300 {
        let cval = 1 + u64::from(vcpu * 7919 % 300);
        for clock in Timeline::ALL {
            rig.arm(vcpu, clock, ON, cval);
            expected.push((vcpu, clock));
        }
    }
    let mut at_once = rig.clone();
    at_once.pass(300);
    assert_eq!(at_once.fired(), expected);

    let mut fired = Vec::new();
    for _ in 0..300 {
        let ticks = rig.vm.ticks_to_next(rig.now).unwrap();
        rig.pass(ticks);
        let now = rig.fired();
        assert_eq!(now.len(), 2, "vCPUs fall due one by one");
        fired.extend(now);
    }
    fired.sort_unstable();
    assert_eq!(fired, expected);
}

#[test]
fn only_running_tells_of_timers_and_what_is_due_then_is_told_at_the_change_to_running() {
    let mut rig = from_zero();
    rig.arm(0, Virtual, ON, 10);
    rig.arm(1, Physical, ON, 20);
    rig.arm(2, Virtual, 3, 10);
    rig.pause_counting();
    rig.pass(500);
    assert_eq!(rig.fired(), []);
    assert_eq!(rig.vm.ticks_to_next(rig.now), None);
    rig.resume();
    assert_eq!(rig.fired(), [(0, Virtual), (1, Physical)]);
    rig.pass(500);
    assert_eq!(rig.fired(), []);
}

#[test]
fn a_line_told_before_a_pause_is_told_again_at_the_resume() {
    let mut rig = from_zero();
    rig.arm(0, Virtual, ON, 10);
    rig.pass(10);
    assert_eq!(rig.fired(), [(0, Virtual)]);
    rig.pause();
    rig.resume();
    assert_eq!(rig.fired(), [(0, Virtual)]);
}

#[test]
fn a_line_untold_at_a_pause_is_told_at_the_resume_once() {
    let mut rig = from_zero();
    rig.arm(0, Virtual, ON, 10);
    rig.pass(10);
    rig.pause();
    assert_eq!(rig.fired(), []);
    rig.resume();
    assert_eq!(rig.fired(), [(0, Virtual)]);
}

#[test]
fn a_timer_that_was_not_due_at_the_pause_fires_as_long_after_it_as_it_had_left() {
    let mut rig = from_zero();
    rig.arm(0, Virtual, ON, 100);
    rig.pass(40);
    rig.pause();
    rig.pass(HZ);
    rig.resume();
    assert_eq!(rig.vm.ticks_to_next(rig.now), Some(60));
    rig.pass(59);
    assert_eq!(rig.fired(), []);
    rig.pass(1);
    assert_eq!(rig.fired(), [(0, Virtual)]);
}

#[test]
fn a_timer_restored_as_due_is_told_with_autorun_and_after_resume_without() {
    for flags in [AUTORUN, 0] {
        let mut rig = Rig::restoring(2, flags);
        rig.bring(0, 10);
        rig.bring(1, 500);
        // Not due by what this vCPU brought; due by the count that is settled.
        rig.arm(0, Virtual, ON, 400);
        rig.restored(0);
        rig.restored(1);
        if rig.vm.phase() == Phase::Paused {
            assert_eq!(rig.fired(), []);
            rig.resume();
        }
        assert_eq!(rig.fired(), [(0, Virtual)]);
    }
}

#[test]
fn after_a_disconnect_every_line_that_stands_high_is_told_again() {
    let mut rig = from_zero();
    rig.arm(0, Virtual, ON, 10);
    rig.pass(10);
    assert_eq!(rig.fired(), [(0, Virtual)]);
    assert_eq!(rig.arm(1, Physical, ON, 0), 2);
    rig.arm(2, Virtual, 3, 0);
    rig.arm(3, Virtual, ON, 11);
    rig.arm(3, Physical, ON, 100);
    // One more falls due with nobody there.
    rig.drift(1);
    rig.vm.disconnect(rig.now);
    let expected = [(0, Virtual), (1, Physical), (3, Virtual)];
    assert_eq!(rig.fired(), expected);
    rig.pass(99);
    assert_eq!(rig.fired(), [(3, Physical)]);
}

#[test]
fn of_many_phase_changes_the_last_is_told() {
    let mut rig = Rig::paused(1);
    rig.resume();
    rig.pause();
    rig.resume();
    let phases: Vec<_> = rig.events().iter().map(|event| event.vcpu.get()).collect();
    assert_eq!(phases, [Phase::Running.code()]);
}

#[test]
fn the_change_to_running_is_told_before_the_timers() {
    let mut rig = Rig::paused(1);
    rig.arm(0, Virtual, ON, 0);
    rig.resume();
    let kinds: Vec<_> = rig.events().iter().map(|event| event.kind.get()).collect();
    assert_eq!(
        kinds,
        [wire::EVENT_PHASE_CHANGED, wire::EVENT_TIMER_ASSERTED]
    );
}

/// A VM that runs with both clocks `left` ticks before they wrap.
fn before_the_wrap(left: u64) -> Rig {
    let mut rig = Rig::paused(4);
    let count = 0_u64.wrapping_sub(left);
    rig.set(
        0,
        &[(Register::TimerCnt, count), (Register::PtimerCnt, count)],
    );
    rig.resume();
    rig.events();
    rig
}

#[test]
fn at_a_wrap_lines_fall_and_rise_again_and_each_rise_is_told() {
    for clock in Timeline::ALL {
        let mut rig = before_the_wrap(10);
        assert_ne!(rig.arm(0, clock, ON, 5), 0, "high by the write");
        rig.pass(10);
        assert_eq!(rig.fired(), []);
        assert_eq!(rig.vm.ticks_to_next(rig.now), Some(5));
        rig.pass(5);
        assert_eq!(rig.fired(), [(0, clock)]);
    }
}

#[test]
fn a_line_that_is_always_high_does_not_rise_at_a_wrap() {
    for clock in Timeline::ALL {
        for jump in [10, 11, 500] {
            let mut rig = before_the_wrap(10);
            assert_ne!(rig.arm(0, clock, ON, 0), 0);
            rig.pass(jump);
            assert_eq!(rig.fired(), [], "CVAL 0 is met by every count");
        }
    }
}

#[test]
fn an_event_untold_at_a_wrap_is_dropped_with_its_line_for_good() {
    let mut rig = before_the_wrap(10);
    rig.arm(0, Virtual, ON, 0_u64.wrapping_sub(5));
    rig.pass(5);
    rig.pass(5);
    // Fell by the wrap. A write that raises it now speaks for itself.
    assert_eq!(rig.set(0, &[(Register::TimerCval, 0)]).lines.get(), 1);
    assert_eq!(rig.fired(), []);
}

#[test]
fn an_event_is_dropped_if_the_line_fell_by_a_wrap_of_which_the_vm_has_not_heard_yet() {
    let mut rig = before_the_wrap(10);
    rig.arm(0, Virtual, ON, 0_u64.wrapping_sub(5));
    rig.pass(5);
    rig.drift(5);
    assert_eq!(rig.fired(), []);
    rig.pass(0);
    assert_eq!(rig.fired(), []);
}

#[test]
fn an_event_untold_at_a_wrap_over_which_its_line_stayed_high_is_told_once() {
    let mut rig = before_the_wrap(10);
    rig.pause();
    rig.arm(0, Virtual, ON, 0);
    rig.resume();
    rig.pass(10);
    assert_eq!(rig.fired(), [(0, Virtual)]);
    rig.pass(10);
    assert_eq!(rig.fired(), []);
}

#[test]
fn a_timer_passed_over_by_a_jump_beyond_the_wrap_leaves_no_event() {
    let mut rig = before_the_wrap(10);
    rig.arm(0, Virtual, ON, 0_u64.wrapping_sub(5));
    rig.pass(20);
    assert_eq!(rig.fired(), [], "the line rose and fell");
}

#[test]
fn a_sleeper_that_wakes_when_told_sees_every_event_at_its_tick() {
    // Deadlines far apart and close together, over a wrap of both clocks.
    let mut rig = before_the_wrap(50);
    for (vcpu, cval) in (0..).zip([0_u64.wrapping_sub(20), 7, 7, 1_000_000_000_000]) {
        rig.arm(vcpu, Virtual, ON, cval);
        rig.arm(vcpu, Physical, ON, cval.wrapping_add(1));
    }
    let mut seen = Vec::new();
    for _ in 0..20 {
        let ticks = rig.vm.ticks_to_next(rig.now).unwrap();
        let mut early = rig.clone();
        early.pass(ticks - 1);
        assert_eq!(early.fired(), [], "nothing before it is told to wake");
        rig.pass(ticks);
        for (vcpu, clock) in rig.fired() {
            seen.push((rig.virt(), vcpu, clock));
        }
        if seen.len() == 8 {
            break;
        }
    }
    let expected = [
        (0_u64.wrapping_sub(20), 0, Virtual),
        (0_u64.wrapping_sub(19), 0, Physical),
        (7, 1, Virtual),
        (7, 2, Virtual),
        (8, 1, Physical),
        (8, 2, Physical),
        (1_000_000_000_000, 3, Virtual),
        (1_000_000_000_001, 3, Physical),
    ];
    assert_eq!(seen, expected);
}
