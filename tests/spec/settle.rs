//! SPEC.md, "Restore": how the counts are settled, STRICT and ELAPSED.

use vhost_user_timer_kit::contract::{CNT, CTL, CVAL, PCNT, Run, op, phase, restore, status};
use vhost_user_timer_model::vm::Notice;

use crate::world::{Clock, HZ, Vm, World};

scenarios! {
    both {
        the_count_is_settled_once_at_the_largest_that_any_vcpu_brought_by_unsigned_value:
            "7.12" "7.15";
        a_late_vcpu_leaves_the_count_alone: "7.12";
        strict_refuses_the_last_restore_done_where_counts_differ_and_the_restore_stays_open:
            "7.5" "7.13" "2.52";
        strict_takes_physical_counts_alike: "7.5" "7.13";
        the_physical_count_is_settled_alike_where_any_vcpu_brought_one: "7.14" "4.10";
        the_physical_clock_is_passed_through_again_where_no_vcpu_brought_a_count: "7.15";
        a_physical_clock_of_the_vms_own_goes_on_from_its_count_where_no_vcpu_brought_one: "7.15";
        elapsed_adds_the_wall_clock_time_since_the_save_to_both_counts: "7.6" "7.17";
        elapsed_is_in_ticks_of_the_vms_frequency: "7.6";
        elapsed_from_the_future_adds_nothing_and_is_logged: "7.18";
        without_elapsed_the_wall_clock_does_not_matter: "7.6";
        elapsed_never_moves_a_pinned_offset: "7.19";
        elapsed_never_moves_a_physical_clock_that_is_passed_through: "7.15";
    }
}

const HOUR: u64 = 3_600 * HZ;

fn the_count_is_settled_once_at_the_largest_that_any_vcpu_brought_by_unsigned_value(on: World) {
    for (counts, settled) in [
        ([5, 9, 7], 9),
        ([9, 9, 9], 9),
        ([0, 0, 0], 0),
        ([1 << 63, (1 << 63) - 1, 0], 1 << 63),
        ([u64::MAX, 1, 2], u64::MAX),
        ([1, u64::MAX, 1 << 63], u64::MAX),
    ] {
        for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            let mut vm = on.restoring(3, 0);
            for vcpu in order {
                vm.restored(vcpu, counts[vcpu as usize]);
            }
            vm.pass(HZ / 1_000);
            assert_eq!(vm.virt(), settled, "frozen until RESUME");
            for vcpu in 0..3 {
                assert_eq!(vm.get_one(vcpu, CNT), settled);
            }
            assert_eq!(vm.info().flags, 0);
            let run = vm.resume();
            assert_eq!(run.virt_count, settled);
            vm.pass(1);
            assert_eq!(vm.offsets()[0], run.cntvoff);
        }
    }
}

fn a_late_vcpu_leaves_the_count_alone(on: World) {
    // The defect of KVM that this project answers: there the last vCPU sets the offset for all.
    let mut vm = on.restoring(4, restore::AUTORUN);
    for vcpu in 0..3 {
        vm.restored(vcpu, HZ);
    }
    let waiter = vm.wait(0);
    vm.pass(HZ / 100);
    vm.bring(3, HZ);
    // The last brings a smaller count.
    vm.set(3, &[(CNT, 5)]);
    let (_, released) = vm.releasing((op::RESTORE_DONE, 3, &[]), &[waiter]);
    let run = Run::of(released[0].ok(40));
    assert_eq!(run.virt_count, HZ);
    assert_eq!(vm.offsets()[0], run.cntvoff);
}

fn strict_refuses_the_last_restore_done_where_counts_differ_and_the_restore_stays_open(on: World) {
    let mut vm = on.restoring(3, restore::STRICT | restore::AUTORUN);
    for (vcpu, count) in [(0, 5), (1, 5), (2, 6)] {
        vm.bring(vcpu, count);
    }
    assert_eq!(vm.restore_done(0), 2);
    assert_eq!(vm.restore_done(1), 1);
    let before = vm.snapshot();
    for _ in 0..2 {
        assert_eq!(vm.refused(op::RESTORE_DONE, 2, &[]), (status::EINVAL, 0));
    }
    assert_eq!(vm.snapshot(), before);
    let info = vm.info();
    assert_eq!((info.phase, info.restored), (phase::RESTORING, 2));
    assert_eq!(vm.restore_done(0), 1, "the others stay done");
    // It is not done: it may set the right count, and then it is.
    vm.set(2, &[(CNT, 5)]);
    let waiter = vm.wait(0);
    let (done, released) = vm.releasing((op::RESTORE_DONE, 2, &[]), &[waiter]);
    assert_eq!(done.ok(8), [0; 8]);
    assert_eq!(Run::of(released[0].ok(40)).virt_count, 5);
    assert_eq!(vm.phase(), phase::RUNNING);
}

fn strict_takes_physical_counts_alike(on: World) {
    let mut vm = on.restoring(3, restore::STRICT);
    for vcpu in 0..3 {
        vm.bring(vcpu, 5);
    }
    vm.set(0, &[(PCNT, 1)]);
    vm.set(2, &[(PCNT, 2)]);
    vm.restore_done(0);
    vm.restore_done(1);
    assert_eq!(vm.refused(op::RESTORE_DONE, 2, &[]), (status::EINVAL, 0));
    vm.set(2, &[(PCNT, 1)]);
    assert_eq!(vm.restore_done(2), 0);
    assert_eq!(vm.phys(), 1, "a vCPU that brought none does not matter");
}

fn the_physical_count_is_settled_alike_where_any_vcpu_brought_one(on: World) {
    for flags in [0, restore::AUTORUN] {
        let mut vm = on.restoring(3, flags);
        for (vcpu, count) in [(0, 9), (1, 3), (2, 1)] {
            vm.bring(vcpu, count);
        }
        vm.set(1, &[(PCNT, 70)]);
        vm.set(2, &[(PCNT, 60)]);
        vm.restore_done(0);
        vm.restore_done(1);
        let waiter = vm.wait(0);
        let run = if flags == 0 {
            vm.no_answer(1);
            vm.releasing((op::RESTORE_DONE, 2, &[]), &[]);
            assert_eq!(vm.get(0, &[CNT, PCNT]), [9, 70]);
            vm.releasing((op::RESUME, u32::MAX, &[]), &[waiter]).1
        } else {
            vm.releasing((op::RESTORE_DONE, 2, &[]), &[waiter]).1
        };
        let run = Run::of(run[0].ok(40));
        assert_eq!((run.virt_count, run.phys_count), (9, 70));
        vm.pass(5);
        let info = vm.info();
        assert_eq!(info.flags, 4);
        assert_eq!([info.cntvoff, info.cntpoff], [run.cntvoff, run.cntpoff]);
    }
}

fn the_physical_clock_is_passed_through_again_where_no_vcpu_brought_a_count(on: World) {
    for flags in [0, restore::AUTORUN, restore::ELAPSED] {
        let mut vm = on.paused(2);
        vm.begin(2, flags, vm_realtime(on), 0);
        vm.restored(0, 1);
        vm.restored(1, 2);
        vm.pass(5);
        let info = vm.info();
        assert_eq!((info.flags, info.cntpoff), (0, 0));
        vm.reads_now(Clock::Physical, |vm| vm.info().host_count);
    }
}

/// A wall-clock time that both worlds have behind them.
fn vm_realtime(on: World) -> u64 {
    on.paused(1).driver.realtime() - HOUR
}

fn a_physical_clock_of_the_vms_own_goes_on_from_its_count_where_no_vcpu_brought_one(on: World) {
    let mut vm = on.paused(1);
    vm.set(0, &[(PCNT, 30)]);
    vm.restore_begin(1, restore::AUTORUN);
    vm.pass(500);
    vm.bring(0, 1);
    let waiter = vm.wait(0);
    let (_, released) = vm.releasing((op::RESTORE_DONE, 0, &[]), &[waiter]);
    let run = Run::of(released[0].ok(40));
    assert_eq!((run.virt_count, run.phys_count), (1, 30));
    vm.pass(2);
    assert_eq!(vm.offsets(), [run.cntvoff, run.cntpoff]);
}

fn elapsed_adds_the_wall_clock_time_since_the_save_to_both_counts(on: World) {
    for physical in [false, true] {
        let mut vm = on.paused(2);
        let saved = vm.driver.realtime() - HOUR;
        vm.begin(2, restore::ELAPSED, saved, 0);
        if let Some(model) = vm.model() {
            assert!(model.vm.wants_realtime());
        }
        vm.pass(3 * HZ / 1_000);
        for vcpu in 0..2 {
            vm.bring(vcpu, 1_000);
            if physical {
                vm.set(vcpu, &[(PCNT, 2_000)]);
            }
        }
        vm.restore_done(1);
        vm.pass(HZ / 1_000);
        // The time of the settling itself, not of the beginning.
        let before = vm.driver.realtime() - saved;
        vm.restore_done(0);
        let after = vm.driver.realtime() - saved;
        let [virt, phys] = vm.counts();
        assert!((before..=after).contains(&(virt - 1_000)));
        if physical {
            assert_eq!(phys - 2_000, virt - 1_000);
        }
        if let Some(model) = vm.model() {
            assert!(!model.vm.wants_realtime());
        }
    }
}

fn elapsed_is_in_ticks_of_the_vms_frequency(on: World) {
    const FREQUENCY: u64 = 24_000_000;
    let mut vm = on.fresh();
    vm.configure_as(1, 0, FREQUENCY);
    let saved = vm.driver.realtime() - 1_000_000_041;
    vm.begin(1, restore::ELAPSED, saved, 0);
    vm.bring(0, 0);
    let ticks = |ns: u64| (u128::from(ns) * u128::from(FREQUENCY) / u128::from(HZ)) as u64;
    let before = ticks(vm.driver.realtime() - saved);
    vm.restore_done(0);
    let after = ticks(vm.driver.realtime() - saved);
    let count = vm.virt();
    assert!((before..=after).contains(&count));
    if vm.model().is_some() {
        assert_eq!(count, FREQUENCY);
    }
}

fn elapsed_from_the_future_adds_nothing_and_is_logged(on: World) {
    let mut vm = on.paused(1);
    let ahead = if on == World::Model { 5 } else { 60 * HZ };
    let saved = vm.driver.realtime() + ahead;
    vm.begin(1, restore::ELAPSED, saved, 0);
    if let Some(model) = vm.model() {
        model.notices();
    }
    vm.restored(0, 1_000);
    assert_eq!(vm.get_one(0, CNT), 1_000);
    if let Some(model) = vm.model() {
        let logged = model.notices();
        assert!(logged.contains(&Notice::RealtimeWentBack { ns: 5 }));
    }
    if let Some(binary) = vm.binary() {
        binary.rig.log_with("ELAPSED");
    }
}

fn without_elapsed_the_wall_clock_does_not_matter(on: World) {
    let mut vm = on.paused(1);
    vm.begin(1, 0, 1, 0);
    if let Some(model) = vm.model() {
        assert!(!model.vm.wants_realtime());
    }
    vm.restored(0, 1_000);
    assert_eq!(vm.get_one(0, CNT), 1_000);
}

/// A restore with ELAPSED of a VM that was saved a long time ago.
fn long_ago(on: World) -> Vm {
    let mut vm = on.paused(1);
    vm.begin(1, restore::ELAPSED, 1, 0);
    vm
}

fn elapsed_never_moves_a_pinned_offset(on: World) {
    let mut vm = long_ago(on);
    vm.set_offset(40);
    vm.set(0, &[(CTL, 0), (CVAL, 0)]);
    vm.restore_done(0);
    assert_eq!(vm.offsets(), [40, 40]);
}

fn elapsed_never_moves_a_physical_clock_that_is_passed_through(on: World) {
    let mut vm = long_ago(on);
    vm.restored(0, 0);
    assert_eq!(vm.offsets()[1], 0);
}
