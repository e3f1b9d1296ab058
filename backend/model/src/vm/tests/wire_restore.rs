//! SPEC.md, "Restore": what a vCPU must bring, how the counts are settled, and giving up.

use vhost_user_timer_protocol::wire::info_flags::PHYS_VIRTUALISED;
use vhost_user_timer_protocol::wire::present;
use vhost_user_timer_protocol::wire::restore_flags::{AUTORUN, ELAPSED, STRICT};
use vhost_user_timer_protocol::{Phase, Register, Status};

use super::rig::{Ask, HZ, ON, PHASES, Rig, START_REALTIME, whole_vcpu};
use crate::vm::{Notice, Timeline};
use Register::{PtimerCnt, PtimerCtl, PtimerCval, TimerCnt, TimerCtl, TimerCval};

/// Restores a VM whose vCPUs bring these virtual counts.
fn restored_from(counts: &[u64], flags: u32) -> Rig {
    let mut rig = Rig::restoring(counts.len() as u32, flags);
    for (vcpu, &count) in (0..).zip(counts) {
        rig.bring(vcpu, count);
        rig.restored(vcpu);
    }
    rig
}

#[test]
fn restore_begin_must_name_the_configured_number_of_vcpus() {
    for phase in [Phase::Paused, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 3);
        let before = rig.vm.clone();
        for vcpus in [0, 2, 4, u32::MAX] {
            let verdict = rig.refused(&Ask::begin(vcpus, 0));
            assert_eq!(verdict, (Status::Invalid, 0));
        }
        assert_eq!(rig.vm, before);
    }
}

#[test]
fn an_unknown_restore_flag_is_einval_in_every_phase() {
    for phase in PHASES {
        for bit in 3..32 {
            let mut rig = Rig::in_phase(phase, 3);
            let verdict = rig.refused(&Ask::begin(3, 1 << bit));
            assert_eq!(verdict, (Status::Invalid, 0));
        }
    }
}

#[test]
fn while_restoring_both_clocks_stand_still() {
    let mut rig = Rig::running(1);
    rig.pass(40);
    rig.pause_counting();
    rig.pass(2);
    rig.done(&Ask::begin(1, 0));
    let host = rig.now.host;
    for _ in 0..3 {
        rig.pass(HZ);
        assert_eq!((rig.virt(), rig.phys()), (42, host));
        assert_eq!(rig.get(0, TimerCnt), 42);
        assert_eq!(rig.get(0, PtimerCnt), host);
    }
}

#[test]
fn restore_done_needs_control_compare_value_and_count_and_says_which_are_missing() {
    let registers = [
        (TimerCtl, present::CTL),
        (TimerCnt, present::CNT),
        (TimerCval, present::CVAL),
    ];
    let needed = present::CTL | present::CNT | present::CVAL;
    for brought in 0..8 {
        let mut rig = Rig::restoring(1, 0);
        let mut missing = needed;
        for (n, (register, bit)) in registers.into_iter().enumerate() {
            if brought >> n & 1 != 0 {
                rig.set(0, &[(register, 0)]);
                missing &= !bit;
            }
        }
        // The physical timer's are not needed, nor do they help.
        rig.set(0, &[(PtimerCtl, 0), (PtimerCnt, 0), (PtimerCval, 0)]);
        let before = rig.vm.clone();
        let reply = rig.send(&Ask::restore_done(0));
        if missing == 0 {
            assert_eq!(reply.verdict(), (Status::Ok, 0));
        } else {
            assert_eq!(reply.verdict(), (Status::Incomplete, missing));
            assert_eq!(rig.vm, before);
        }
    }
}

#[test]
fn the_count_is_not_needed_where_the_offset_is_pinned() {
    let mut rig = Rig::restoring(1, 0);
    rig.done(&Ask::set_offset(5));
    let missing = present::CTL | present::CVAL;
    let verdict = rig.refused(&Ask::restore_done(0));
    assert_eq!(verdict, (Status::Incomplete, missing));
    rig.set(0, &[(TimerCtl, 0), (TimerCval, 0)]);
    rig.restored(0);
}

#[test]
fn what_a_vcpu_set_before_restore_begin_does_not_count() {
    let mut rig = Rig::paused(1);
    rig.bring(0, 5);
    rig.done(&Ask::begin(1, 0));
    let all = present::CTL | present::CNT | present::CVAL;
    let verdict = rig.refused(&Ask::restore_done(0));
    assert_eq!(verdict, (Status::Incomplete, all));
    rig.bring(0, 5);
    rig.done(&Ask::begin(1, 0));
    let verdict = rig.refused(&Ask::restore_done(0));
    assert_eq!(verdict, (Status::Incomplete, all), "nor of the old epoch");
}

#[test]
fn repeating_restore_done_is_fine_and_changes_nothing() {
    let mut rig = Rig::restoring(2, 0);
    rig.bring(1, 5);
    assert_eq!(rig.restored(1), 1);
    let before = rig.vm.clone();
    assert_eq!(rig.restored(1), 1);
    assert_eq!(rig.restored(1), 1);
    assert_eq!(rig.vm, before);
}

#[test]
fn the_count_is_settled_once_at_the_largest_that_any_vcpu_brought() {
    for counts in [[5, 9, 7], [9, 5, 7], [5, 7, 9], [9, 9, 9], [0, 0, 0]] {
        let mut rig = restored_from(&counts, 0);
        let largest = counts.into_iter().max().unwrap();
        rig.pass(HZ);
        assert_eq!(rig.virt(), largest, "frozen until RESUME");
        for vcpu in 0..3 {
            assert_eq!(rig.get(vcpu, TimerCnt), largest);
        }
        rig.resume();
        rig.pass(1);
        assert_eq!(rig.virt(), largest + 1);
    }
}

#[test]
fn largest_is_by_unsigned_value() {
    let mut rig = restored_from(&[1, u64::MAX, 1 << 63], 0);
    assert_eq!(rig.virt(), u64::MAX);
}

#[test]
fn a_late_vcpu_leaves_the_count_alone() {
    let mut rig = Rig::restoring(3, AUTORUN);
    rig.bring(0, 1_000);
    rig.bring(1, 1_000);
    rig.restored(0);
    rig.restored(1);
    rig.pass(50 * HZ);
    rig.bring(2, 0);
    rig.restored(2);
    assert_eq!(rig.virt(), 1_000);
}

#[test]
fn each_vcpu_reads_the_count_that_it_brought_until_the_restore_is_complete() {
    let mut rig = Rig::running(3);
    rig.pass(40);
    rig.pause();
    rig.done(&Ask::begin(3, 0));
    let host = rig.now.host;
    rig.pass(9);
    rig.bring(0, 7);
    rig.set(1, &[(PtimerCnt, 8)]);
    let read = |rig: &mut Rig, vcpu| (rig.get(vcpu, TimerCnt), rig.get(vcpu, PtimerCnt));
    assert_eq!(read(&mut rig, 0), (7, host));
    assert_eq!(read(&mut rig, 1), (40, 8));
    assert_eq!(read(&mut rig, 2), (40, host));
    rig.restored(0);
    assert_eq!(read(&mut rig, 0), (7, host), "done or not");
}

#[test]
fn lines_and_istatus_in_a_restore_are_those_of_the_count_brought() {
    let mut rig = Rig::restoring(2, 0);
    let values = [(TimerCtl, ON), (TimerCval, 10)];
    assert_eq!(rig.set(0, &values).lines.get(), 0);
    assert_eq!(rig.set(0, &[(TimerCnt, 10)]).lines.get(), 1);
    assert_eq!(rig.get(0, TimerCtl), 5);
    assert_eq!(rig.set(1, &values).lines.get(), 0);
    assert_eq!(rig.get(1, TimerCtl), 1);
}

#[test]
fn strict_refuses_the_last_restore_done_where_counts_differ_and_the_restore_stays_open() {
    let mut rig = Rig::restoring(3, STRICT | AUTORUN);
    for (vcpu, count) in [(0, 5), (1, 5), (2, 6)] {
        rig.bring(vcpu, count);
    }
    assert_eq!(rig.restored(0), 2);
    assert_eq!(rig.restored(1), 1);
    let before = rig.vm.clone();
    for _ in 0..2 {
        assert_eq!(rig.refused(&Ask::restore_done(2)), (Status::Invalid, 0));
    }
    assert_eq!(rig.vm, before);
    assert_eq!(rig.restored(0), 1, "the others stay done");
    // It is not done: it may set the right count, and then it is.
    rig.set(2, &[(TimerCnt, 5)]);
    assert_eq!(rig.restored(2), 0);
    assert_eq!((rig.vm.phase(), rig.virt()), (Phase::Running, 5));
}

#[test]
fn strict_takes_physical_counts_alike() {
    let mut rig = Rig::restoring(3, STRICT);
    for vcpu in 0..3 {
        rig.bring(vcpu, 5);
    }
    rig.set(0, &[(PtimerCnt, 1)]);
    rig.set(2, &[(PtimerCnt, 2)]);
    rig.restored(0);
    rig.restored(1);
    assert_eq!(rig.refused(&Ask::restore_done(2)), (Status::Invalid, 0));
    rig.set(2, &[(PtimerCnt, 1)]);
    rig.restored(2);
    assert_eq!(rig.phys(), 1, "a vCPU that brought none does not matter");
}

#[test]
fn the_physical_count_is_settled_alike_where_any_vcpu_set_it() {
    let mut rig = Rig::restoring(3, AUTORUN);
    for (vcpu, count) in [(0, 9), (1, 3), (2, 1)] {
        rig.bring(vcpu, count);
    }
    rig.set(1, &[(PtimerCnt, 70)]);
    rig.set(2, &[(PtimerCnt, 60)]);
    for vcpu in 0..3 {
        rig.restored(vcpu);
    }
    assert_eq!((rig.virt(), rig.phys()), (9, 70));
    assert_eq!(rig.info().flags, PHYS_VIRTUALISED);
    rig.pass(5);
    assert_eq!((rig.virt(), rig.phys()), (14, 75));
}

#[test]
fn the_physical_clock_is_passed_through_again_where_no_vcpu_set_it() {
    for flags in [0, AUTORUN, ELAPSED] {
        let mut rig = restored_from(&[1, 2], flags);
        assert_eq!(rig.info().flags, 0);
        rig.pass(5);
        assert_eq!(rig.phys(), rig.now.host);
    }
}

#[test]
fn a_virtualised_physical_clock_goes_on_from_its_count_where_no_vcpu_set_it() {
    let mut rig = Rig::paused(1);
    rig.set(0, &[(PtimerCnt, 30)]);
    rig.done(&Ask::begin(1, AUTORUN));
    rig.pass(500);
    rig.bring(0, 1);
    rig.restored(0);
    rig.pass(2);
    assert_eq!((rig.virt(), rig.phys()), (3, 32));
}

#[test]
fn elapsed_adds_the_wall_clock_time_since_the_save_to_both_counts() {
    let mut rig = Rig::paused(2);
    let saved = START_REALTIME - 7 * HZ;
    rig.done(&Ask::begin_with(2, ELAPSED, saved, 0));
    assert!(rig.vm.wants_realtime());
    rig.pass(3 * HZ);
    for vcpu in 0..2 {
        rig.bring(vcpu, 100);
        rig.set(vcpu, &[(PtimerCnt, 200)]);
    }
    rig.restored(1);
    rig.pass(HZ);
    rig.restored(0);
    // The time of the settling itself, not of the beginning.
    let elapsed = (7 + 3 + 1) * HZ;
    assert_eq!((rig.virt(), rig.phys()), (100 + elapsed, 200 + elapsed));
    assert!(!rig.vm.wants_realtime());
}

#[test]
fn elapsed_is_in_ticks_of_the_vms_frequency() {
    let mut rig = Rig::new();
    rig.done(&Ask::configure(1, 0, 24_000_000));
    let saved = START_REALTIME - 1_000_000_041;
    rig.done(&Ask::begin_with(1, ELAPSED, saved, 0));
    rig.bring(0, 0);
    rig.restored(0);
    assert_eq!(rig.virt(), 24_000_000);
}

#[test]
fn a_save_from_the_future_adds_nothing_and_is_logged() {
    let mut rig = Rig::paused(1);
    let saved = START_REALTIME + 5;
    rig.done(&Ask::begin_with(1, ELAPSED, saved, 0));
    rig.notices();
    rig.bring(0, 100);
    rig.restored(0);
    assert_eq!(rig.virt(), 100);
    let logged = rig.notices();
    assert!(logged.contains(&Notice::RealtimeWentBack { ns: 5 }));
}

#[test]
fn without_elapsed_the_wall_clock_does_not_matter() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::begin_with(1, 0, 1, 0));
    assert!(!rig.vm.wants_realtime());
    rig.bring(0, 100);
    rig.restored(0);
    assert_eq!(rig.virt(), 100);
}

#[test]
fn elapsed_never_moves_a_pinned_offset() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::begin_with(1, ELAPSED, 1, 0));
    rig.done(&Ask::set_offset(40));
    rig.set(0, &[(TimerCtl, 0), (TimerCval, 0)]);
    rig.restored(0);
    for clock in Timeline::ALL {
        assert_eq!(rig.offset(clock), 40);
    }
}

#[test]
fn elapsed_never_moves_a_physical_clock_that_is_passed_through() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::begin_with(1, ELAPSED, 1, 0));
    rig.bring(0, 0);
    rig.restored(0);
    assert_eq!(rig.offset(Timeline::Physical), 0);
}

#[test]
fn registers_that_a_vcpu_does_not_set_keep_their_values() {
    let mut rig = Rig::paused(1);
    let values = [(PtimerCtl, 3), (PtimerCval, 44), (TimerCval, 9)];
    rig.set(0, &values);
    rig.done(&Ask::begin(1, 0));
    rig.bring(0, 5);
    rig.restored(0);
    assert_eq!(rig.get(0, PtimerCtl), 7);
    assert_eq!(rig.get(0, PtimerCval), 44);
    assert_eq!(rig.get(0, TimerCval), 0);
}

/// VMs with a past: each clock counting, frozen, pinned, passed through or virtualised.
fn vms_with_a_past() -> Vec<Rig> {
    let mut armed = Rig::running(2);
    armed.arm(1, Timeline::Virtual, ON, 1_000);
    armed.arm(0, Timeline::Physical, 3, 2_000);
    armed.pass(400);
    let mut frozen = armed.clone();
    frozen.pause();
    let mut counting = armed;
    counting.pause_counting();
    let mut virtualised = counting.clone();
    virtualised.set(0, &[(PtimerCnt, 3)]);
    let mut pinned = frozen.clone();
    pinned.done(&Ask::set_offset(33));
    vec![frozen, counting, virtualised, pinned]
}

/// What a restore may do before it is given up.
fn meddle(rig: &mut Rig) {
    let offset = rig.now.host;
    rig.done(&Ask::set_vm(&[whole_vcpu(0, [1, 2, 3, 1, 5, 6])]));
    rig.bring(1, 77);
    rig.restored(1);
    rig.pass(50);
    rig.done(&Ask::set_offset(offset));
}

#[test]
fn an_abort_leads_to_paused_with_the_state_from_before_in_a_new_epoch() {
    for past in vms_with_a_past() {
        for begins in 1..3 {
            let mut rig = past.clone();
            for _ in 0..begins {
                rig.done(&Ask::begin(2, STRICT));
                meddle(&mut rig);
            }
            rig.done(&Ask::abort());
            let epoch = past.vm.epoch() + begins;
            assert_eq!(rig.vm.epoch(), epoch);
            // Whatever differs now must be the epoch and what the frontend has yet to hear.
            let mut expected = past.vm.clone();
            expected.epoch = epoch;
            expected.untold_phase = rig.vm.untold_phase;
            assert_eq!(rig.vm, expected);
        }
    }
}

#[test]
fn restore_begin_again_keeps_nothing_of_the_old_epoch() {
    for past in vms_with_a_past() {
        let mut once = past.clone();
        once.pass(50);
        let mut twice = past.clone();
        twice.done(&Ask::begin(2, STRICT | ELAPSED | AUTORUN));
        meddle(&mut twice);
        once.done(&Ask::begin(2, AUTORUN));
        twice.done(&Ask::begin(2, AUTORUN));
        assert_eq!(twice.vm.epoch(), once.vm.epoch() + 1);
        once.vm.epoch += 1;
        assert_eq!(twice.vm, once.vm);
    }
}

#[test]
fn a_request_of_the_old_epoch_is_estale_and_stages_nothing() {
    let mut rig = Rig::restoring(1, 0);
    let old = rig.vm.epoch();
    rig.done(&Ask::begin(1, 0));
    let before = rig.vm.clone();
    for ask in [
        Ask::set_regs(0, &[(TimerCnt, 5)]),
        Ask::set_vm(&[whole_vcpu(0, [1; 6])]),
        Ask::restore_done(0),
        Ask::abort(),
        Ask::begin(1, 0),
        Ask::wait_run(0),
    ] {
        let verdict = rig.refused(&ask.in_epoch(old));
        assert_eq!(verdict, (Status::Stale, 0));
    }
    assert_eq!(rig.vm, before);
}

#[test]
fn nothing_runs_before_the_last_vcpu_is_done() {
    let mut rig = Rig::restoring(64, AUTORUN);
    for vcpu in 0..64 {
        rig.bring(vcpu, 1_000);
        rig.arm(vcpu, Timeline::Virtual, ON, 0);
    }
    for vcpu in (0..64).rev() {
        assert_eq!(rig.vm.phase(), Phase::Restoring);
        rig.pass(HZ);
        assert_eq!(rig.fired(), []);
        assert_eq!(rig.restored(vcpu), vcpu);
    }
    assert_eq!(rig.vm.phase(), Phase::Running);
    assert_eq!(rig.fired().len(), 64);
}
