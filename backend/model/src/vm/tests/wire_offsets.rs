//! SPEC.md, "Offsets": SET_COUNTER_OFFSET and SET_COUNTER_ANCHOR.

use vhost_user_timer_protocol::wire::info_flags;
use vhost_user_timer_protocol::{Phase, Register};

use super::rig::{Ask, HZ, Rig};
use crate::vm::{Anchor, Timeline};

fn offsets(rig: &mut Rig) -> [u64; 2] {
    Timeline::ALL.map(|clock| rig.offset(clock))
}

#[test]
fn setting_the_offset_sets_both_exactly_and_makes_both_clocks_count() {
    for offset in [0, 12_345, 1 << 63, u64::MAX, 10_u64.wrapping_neg()] {
        let mut rig = Rig::paused(2);
        rig.set(0, &[(Register::TimerCnt, 1), (Register::PtimerCnt, 2)]);
        rig.done(&Ask::set_offset(offset));
        for _ in 0..3 {
            rig.pass(1_000);
            assert_eq!(offsets(&mut rig), [offset; 2]);
            let count = rig.now.host.wrapping_sub(offset);
            assert_eq!(rig.get(1, Register::TimerCnt), count);
            assert_eq!(rig.get(1, Register::PtimerCnt), count);
        }
        let flags = info_flags::OFFSET_PINNED | info_flags::PHYS_VIRTUALISED;
        assert_eq!(rig.info().flags, flags);
    }
}

#[test]
fn resume_keeps_the_pinned_offset_if_nothing_froze_the_clocks_in_between() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::set_offset(777));
    rig.pass(1_000);
    rig.resume();
    assert_eq!(offsets(&mut rig), [777; 2]);
    rig.pause_counting();
    rig.pass(1_000);
    rig.resume();
    assert_eq!(offsets(&mut rig), [777; 2]);
    rig.pause();
    rig.pass(1_000);
    rig.resume();
    assert_eq!(offsets(&mut rig), [1_777; 2], "the pause froze both");
}

#[test]
fn the_offset_can_be_set_again_and_the_last_one_holds() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::set_offset(1));
    rig.done(&Ask::set_offset(2));
    assert_eq!(offsets(&mut rig), [2; 2]);
}

#[test]
fn restore_begin_unpins() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::set_offset(777));
    let count = rig.now.host - 777;
    rig.done(&Ask::begin(1, 0));
    rig.pass(50);
    assert_eq!(rig.info().flags, info_flags::PHYS_VIRTUALISED);
    assert_eq!((rig.virt(), rig.phys()), (count, count), "and freezes both");
    let result = rig.set(0, &[(Register::TimerCnt, 5)]);
    assert_eq!(result.ignored.get(), 0);
}

#[test]
fn an_offset_pinned_in_a_restore_holds_to_its_end_whatever_counts_were_brought() {
    for pin_first in [true, false] {
        let mut rig = Rig::restoring(2, 0);
        if pin_first {
            rig.done(&Ask::set_offset(777));
        }
        rig.bring(0, 1_000);
        rig.restored(0);
        if !pin_first {
            rig.done(&Ask::set_offset(777));
        }
        rig.set(1, &[(Register::TimerCtl, 0), (Register::TimerCval, 0)]);
        assert_eq!(rig.restored(1), 0);
        rig.pass(99);
        assert_eq!(offsets(&mut rig), [777; 2]);
        rig.resume();
        assert_eq!(offsets(&mut rig), [777; 2]);
        assert_ne!(rig.info().flags & info_flags::OFFSET_PINNED, 0);
    }
}

#[test]
fn in_a_restore_a_pinned_clock_reads_by_its_offset_not_by_what_was_brought() {
    let mut rig = Rig::restoring(1, 0);
    rig.set(0, &[(Register::TimerCnt, 5), (Register::PtimerCnt, 6)]);
    rig.done(&Ask::set_offset(777));
    let count = rig.now.host - 777;
    assert_eq!(rig.get(0, Register::TimerCnt), count);
    assert_eq!(rig.get(0, Register::PtimerCnt), count);
}

#[test]
fn counts_that_differ_do_not_matter_to_strict_where_the_offset_is_pinned() {
    use vhost_user_timer_protocol::wire::restore_flags::{AUTORUN, STRICT};
    let mut rig = Rig::restoring(2, STRICT | AUTORUN);
    rig.bring(0, 1);
    rig.bring(1, 2);
    rig.done(&Ask::set_offset(3));
    rig.restored(0);
    rig.restored(1);
    assert_eq!(rig.vm.phase(), Phase::Running);
    assert_eq!(offsets(&mut rig), [3; 2]);
}

#[test]
fn an_aborted_restore_brings_the_pin_back() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::set_offset(777));
    rig.done(&Ask::begin(1, 0));
    rig.bring(0, 5);
    rig.pass(50);
    rig.done(&Ask::abort());
    rig.pass(50);
    assert_eq!(offsets(&mut rig), [777; 2]);
    assert_ne!(rig.info().flags & info_flags::OFFSET_PINNED, 0);
    // And the other way round: a pin of the restore goes with it.
    let mut rig = Rig::restoring(1, 0);
    rig.done(&Ask::set_offset(777));
    rig.done(&Ask::abort());
    assert_eq!(rig.info().flags, 0);
    assert_eq!((rig.virt(), rig.phys()), (0, rig.now.host));
}

#[test]
fn an_anchor_is_kept_for_the_shell_and_shown() {
    let mut rig = Rig::paused(1);
    assert_eq!(rig.vm.anchor(), None);
    rig.done(&Ask::set_anchor(5, 6));
    let anchor = Anchor {
        monotonic_ns: 5,
        count: 6,
    };
    assert_eq!(rig.vm.anchor(), Some(anchor));
    assert_eq!(rig.info().flags, info_flags::ANCHORED);
    // H = count + (CLOCK_MONOTONIC − monotonic_ns) × frequency / 10⁹.
    assert_eq!(anchor.host(5 + 3 * HZ, 24_000_000), 6 + 3 * 24_000_000);
    rig.reset();
    assert_eq!(rig.vm.anchor(), None);
}

#[test]
fn a_frozen_count_stays_when_an_anchor_moves_the_host_counter() {
    let mut rig = Rig::running(1);
    rig.pass(40);
    rig.pause();
    rig.done(&Ask::set_anchor(5, 6));
    rig.now.host = 6;
    assert_eq!((rig.virt(), rig.phys()), (40, 6));
    rig.resume();
    rig.pass(2);
    assert_eq!((rig.virt(), rig.phys()), (42, 8));
}

#[test]
fn a_count_told_of_the_host_counter_before_an_anchor_is_not_known_after_it() {
    let readers: [Ask; 3] = [
        Ask::get_regs(0, &[Register::TimerCnt]),
        Ask::get_vm(0, 1),
        Ask::get_vm(1, 0),
    ];
    for read in readers {
        let mut rig = Rig::running(1);
        rig.pass(40);
        rig.pause_counting();
        rig.done(&read);
        rig.done(&Ask::set_anchor(5, 6));
        rig.now.host = 6;
        rig.set(0, &[(Register::TimerCnt, 40)]);
        assert_eq!(rig.virt(), 40, "{read:?}");
    }
}
