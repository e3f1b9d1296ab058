//! SPEC.md, SET_COUNTER_OFFSET and SET_COUNTER_ANCHOR.

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, PCNT, TIMER_ASSERTED, VM, op, phase, range_body, restore, status, words,
};
use vhost_user_timer_model::vm::Anchor;

use crate::world::{Clock, HZ, World};

scenarios! {
    both {
        setting_the_offset_sets_both_exactly_and_makes_both_clocks_count:
            "5.8" "5.29" "5.30" "5.31" "4.10";
        the_reserved_half_of_set_counter_offset_must_be_zero: "2.3";
        resume_keeps_a_pinned_offset_if_nothing_froze_the_clocks_in_between: "5.32" "5.37";
        the_offset_can_be_set_again_and_the_last_one_holds: "5.29";
        with_the_offset_pinned_count_writes_are_ignored_and_counted_in_every_phase: "5.31" "6.12";
        a_count_named_twice_with_the_offset_pinned_is_counted_once: "6.12" "6.16";
        restore_begin_unpins_and_freezes_both_clocks: "5.33" "7.1";
        an_offset_set_while_restoring_pins_again_and_no_count_is_needed: "5.8" "5.31" "7.9" "6.12";
        an_offset_pinned_in_a_restore_holds_to_its_end_whatever_counts_were_brought: "5.31" "7.9";
        in_a_restore_a_pinned_clock_reads_by_its_offset_not_by_what_was_brought: "5.30";
        counts_that_differ_do_not_matter_to_strict_where_the_offset_is_pinned: "5.31" "7.5";
        an_aborted_restore_brings_the_pin_back: "7.29";
        an_anchor_says_what_the_host_counter_is: "5.9" "5.34" "4.1";
        a_frozen_count_stays_when_an_anchor_moves_the_host_counter: "5.35";
        a_counting_clock_keeps_its_offset_over_an_anchor: "5.36";
        a_count_read_before_an_anchor_is_a_new_count_after_it: "6.23";
        timers_fire_by_the_anchored_counter: "5.34" "8.4";
    }
    model {
        an_anchor_is_kept_for_the_shell_and_a_reset_forgets_it: "5.34" "1.18";
    }
}

/// OFFSET_PINNED and PHYS_VIRTUALISED in `info`'s flags.
const PINNED: u8 = 1;
const PHYS_VIRTUALISED: u8 = 4;

fn setting_the_offset_sets_both_exactly_and_makes_both_clocks_count(on: World) {
    for offset in [0, 1, 12_345, 1 << 63, 0xf333_8991_2222_3333, u64::MAX, !9] {
        let mut vm = on.paused(2);
        vm.set(0, &[(CNT, 1), (PCNT, 2)]);
        vm.set_offset(offset);
        for _ in 0..3 {
            vm.pass(1_000);
            assert_eq!(vm.offsets(), [offset; 2]);
            for clock in Clock::BOTH {
                let [_, count, _] = clock.registers();
                let first = vm.reads_now(clock, |vm| vm.get_one(1, count));
                vm.pass(1);
                assert_ne!(vm.get_one(1, count), first);
            }
        }
        let info = vm.info();
        assert_eq!(info.flags, PINNED | PHYS_VIRTUALISED);
        assert_eq!(info.phase, phase::PAUSED);
        let state = vm.state();
        assert_eq!(state.virt_count, state.host_count.wrapping_sub(offset));
    }
}

fn the_reserved_half_of_set_counter_offset_must_be_zero(on: World) {
    let mut vm = on.paused(1);
    let before = vm.snapshot();
    for reserved in [1, 1 << 63] {
        let outcome = vm.refused(op::SET_COUNTER_OFFSET, VM, &words(&[0, reserved]));
        assert_eq!(outcome, (status::EINVAL, 0));
    }
    assert_eq!(vm.snapshot(), before);
}

fn resume_keeps_a_pinned_offset_if_nothing_froze_the_clocks_in_between(on: World) {
    let mut vm = on.paused(1);
    vm.set_offset(777);
    vm.pass(1_000);
    let run = vm.resume();
    assert_eq!([run.cntvoff, run.cntpoff], [777; 2]);
    // KEEP_COUNTING does not freeze.
    vm.pause_counting();
    vm.pass(1_000);
    vm.resume();
    assert_eq!(vm.offsets(), [777; 2]);
    // PAUSE freezes both as ever, and then the offset moves by the pause.
    let paused = vm.pause();
    vm.pass(1_000);
    let resumed = vm.resume();
    let pause = resumed.host_count - paused.host_count;
    assert_eq!([resumed.cntvoff, resumed.cntpoff], [777 + pause; 2]);
    assert_eq!(resumed.virt_count, paused.virt_count);
    assert_eq!(resumed.phys_count, paused.phys_count);
    vm.pause_counting();
    vm.pass(1_000);
    assert_eq!(vm.resume().cntvoff, resumed.cntvoff);
}

fn the_offset_can_be_set_again_and_the_last_one_holds(on: World) {
    let mut vm = on.paused(1);
    vm.set_offset(1);
    vm.set_offset(2);
    assert_eq!(vm.offsets(), [2; 2]);
}

fn with_the_offset_pinned_count_writes_are_ignored_and_counted_in_every_phase(on: World) {
    for wanted in [phase::PAUSED, phase::RUNNING, phase::RESTORING] {
        let mut vm = on.paused(2);
        if wanted == phase::RESTORING {
            vm.restore_begin(2, 0);
        }
        vm.set_offset(1_000);
        if wanted == phase::RUNNING {
            vm.resume();
        }
        assert_eq!(vm.phase(), wanted);
        let entries = [(CNT, 1), (PCNT, 2), (CVAL, 3)];
        assert_eq!(vm.set(0, &entries).1, 2, "{wanted}");
        assert_eq!(vm.set(0, &[(CNT, 9)]).1, 1);
        assert_eq!(vm.set(0, &[(CNT, 1), (PCNT, 2), (CTL, 0)]).1, 2);
        assert_eq!(vm.set(0, &[(CTL, 0)]).1, 0);
        assert_eq!(vm.get_one(0, CVAL), 3, "the rest is not ignored");
        assert_eq!(vm.offsets(), [1_000; 2]);
        for vcpu in 0..2 {
            vm.reads_now(Clock::Virtual, |vm| vm.get_one(vcpu, CNT));
            vm.reads_now(Clock::Physical, |vm| vm.get_one(vcpu, PCNT));
        }
    }
}

fn a_count_named_twice_with_the_offset_pinned_is_counted_once(on: World) {
    let mut vm = on.paused(1);
    vm.set_offset(0);
    assert_eq!(vm.set(0, &[(CNT, 4), (CNT, 4)]).1, 1);
}

fn restore_begin_unpins_and_freezes_both_clocks(on: World) {
    let mut vm = on.paused(1);
    vm.set_offset(777);
    let before = vm.info().host_count - 777;
    vm.restore_begin(1, 0);
    assert_eq!(vm.info().flags, PHYS_VIRTUALISED);
    let counts = vm.counts();
    vm.pass(50);
    assert_eq!(vm.counts(), counts, "frozen");
    assert_eq!(counts[0], counts[1]);
    assert!((before..=vm.info().host_count - 777 - 50).contains(&counts[0]));
    assert_eq!(vm.set(0, &[(CNT, 5)]).1, 0);
}

fn an_offset_set_while_restoring_pins_again_and_no_count_is_needed(on: World) {
    let mut vm = on.paused(1);
    vm.set_offset(7);
    vm.restore_begin(1, 0);
    vm.set_offset(9);
    assert_eq!(vm.info().flags & PINNED, PINNED);
    // CTL and CVAL are needed.
    assert_eq!(
        vm.refused(op::RESTORE_DONE, 0, &[]),
        (status::ENODATA, 0b101)
    );
    // TIMER_CNT is ignored if it is brought.
    assert_eq!(vm.set(0, &[(CTL, 0), (CVAL, 0), (CNT, 55)]).1, 1);
    assert_eq!(vm.restore_done(0), 0);
    assert_eq!(vm.offsets(), [9, 9]);
    assert_eq!(vm.resume().cntvoff, 9);
}

fn an_offset_pinned_in_a_restore_holds_to_its_end_whatever_counts_were_brought(on: World) {
    for pin_first in [true, false] {
        let mut vm = on.restoring(2, 0);
        if pin_first {
            vm.set_offset(777);
        }
        vm.restored(0, 1_000);
        if !pin_first {
            vm.set_offset(777);
        }
        vm.set(1, &[(CTL, 0), (CVAL, 0)]);
        assert_eq!(vm.restore_done(1), 0);
        vm.pass(99);
        assert_eq!(vm.offsets(), [777; 2]);
        vm.resume();
        assert_eq!(vm.offsets(), [777; 2]);
        assert_eq!(vm.info().flags & PINNED, PINNED);
    }
}

fn in_a_restore_a_pinned_clock_reads_by_its_offset_not_by_what_was_brought(on: World) {
    let mut vm = on.restoring(1, 0);
    vm.set(0, &[(CNT, 5), (PCNT, 6)]);
    vm.set_offset(777);
    assert_eq!(vm.offsets(), [777; 2]);
    vm.reads_now(Clock::Virtual, |vm| vm.get_one(0, CNT));
    vm.reads_now(Clock::Physical, |vm| vm.get_one(0, PCNT));
}

fn counts_that_differ_do_not_matter_to_strict_where_the_offset_is_pinned(on: World) {
    let mut vm = on.restoring(2, restore::STRICT | restore::AUTORUN);
    vm.bring(0, 1);
    vm.bring(1, 2);
    vm.set_offset(3);
    vm.restore_done(0);
    vm.restore_done(1);
    assert_eq!(vm.phase(), phase::RUNNING);
    assert_eq!(vm.offsets(), [3; 2]);
}

fn an_aborted_restore_brings_the_pin_back(on: World) {
    let mut vm = on.paused(1);
    vm.set_offset(777);
    vm.restore_begin(1, 0);
    vm.bring(0, 5);
    vm.pass(50);
    vm.abort();
    vm.pass(50);
    assert_eq!(vm.offsets(), [777; 2]);
    assert_eq!(vm.info().flags & PINNED, PINNED);
    // And the other way round: a pin of the restore goes with it.
    let mut vm = on.restoring(1, 0);
    vm.set_offset(777);
    vm.abort();
    let info = vm.info();
    assert_eq!((info.flags, info.cntpoff), (0, 0));
    assert_eq!(vm.virt(), 0);
}

fn an_anchor_says_what_the_host_counter_is(on: World) {
    for frequency in [HZ, 62_500_000, 1_000] {
        let mut vm = on.fresh();
        vm.configure_as(1, 0, frequency);
        let expected = |anchor: u64, count: u64, ns: u64| {
            let passed = i128::from(ns) - i128::from(anchor);
            let ticks = (passed * i128::from(frequency)).div_euclid(i128::from(HZ));
            (i128::from(count) + ticks) as u64
        };
        let now = vm.driver.monotonic();
        for (anchor, count) in [
            (now, 5_000_000_000_000),
            (now, 0),
            (0, 77),
            (now + HZ, 1 << 63),
            (now, u64::MAX),
        ] {
            vm.set_anchor(anchor, count);
            vm.pass(1);
            let before = vm.driver.monotonic();
            let info = vm.info();
            let after = vm.driver.monotonic();
            assert_eq!(info.flags, 2);
            let low = expected(anchor, count, before);
            let high = expected(anchor, count, after);
            let past_low = info.host_count.wrapping_sub(low);
            assert!(past_low <= high.wrapping_sub(low), "{frequency} {count}");
        }
    }
}

fn an_anchor_is_kept_for_the_shell_and_a_reset_forgets_it(on: World) {
    let mut vm = on.paused(1);
    assert_eq!(vm.exact().vm.anchor(), None);
    vm.set_anchor(5, 6);
    let anchor = Anchor {
        monotonic_ns: 5,
        count: 6,
    };
    assert_eq!(vm.exact().vm.anchor(), Some(anchor));
    assert_eq!(anchor.host(5 + 3 * HZ, 24_000_000), 6 + 3 * 24_000_000);
    vm.driver.reset();
    assert_eq!(vm.exact().vm.anchor(), None);
}

fn a_frozen_count_stays_when_an_anchor_moves_the_host_counter(on: World) {
    let mut vm = on.running(1);
    vm.pass(40);
    let paused = vm.pause();
    let now = vm.driver.monotonic();
    vm.set_anchor(now, 1 << 40);
    assert_eq!(vm.get_one(0, CNT), paused.virt_count);
    vm.reads_now(Clock::Physical, |vm| vm.info().host_count);
    let resumed = vm.resume();
    assert_eq!(resumed.virt_count, paused.virt_count);
    assert_eq!(resumed.phys_count, resumed.host_count);
    assert!(resumed.host_count >= 1 << 40);
    vm.pass(2);
    assert_eq!(vm.offsets(), [resumed.cntvoff, 0]);
}

fn a_counting_clock_keeps_its_offset_over_an_anchor(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(PCNT, 9)]);
    let run = vm.resume();
    vm.pause_counting();
    let now = vm.driver.monotonic();
    vm.set_anchor(now, 1 << 40);
    vm.pass(10);
    assert_eq!(vm.offsets(), [run.cntvoff, run.cntpoff]);
}

fn a_count_read_before_an_anchor_is_a_new_count_after_it(on: World) {
    let readers = [
        (op::GET_REGS, 0, words(&[CNT])),
        (op::GET_VM, VM, range_body(0, 1)),
        (op::GET_VM, VM, range_body(1, 0)),
    ];
    for (op, vcpu, body) in readers {
        let mut vm = on.running(1);
        vm.pass(40);
        vm.pause_counting();
        let answer = vm.ask(op, vcpu, 0, &body);
        let at = if op == op::GET_REGS { 8 } else { 0 };
        let read = vhost_user_timer_kit::contract::u64_at(&answer.body, at);
        vm.set_anchor(5, 6);
        vm.set(0, &[(CNT, read)]);
        vm.pass(10);
        assert_eq!(vm.virt(), read, "frozen at it: {op:#x}");
    }
}

fn timers_fire_by_the_anchored_counter(on: World) {
    let mut vm = on.paused(1);
    let now = vm.driver.monotonic();
    vm.set_anchor(now, 0xf333_8991_2222_3333);
    vm.set(0, &[(CTL, 1), (CVAL, 2_000_000), (CNT, 0)]);
    for _ in 0..3 {
        vm.post_event_buffer();
    }
    vm.resume();
    let event = std::iter::repeat_with(|| vm.event()).find(|event| event.kind == TIMER_ASSERTED);
    assert!(event.expect("one of the two").count >= 2_000_000);
}
