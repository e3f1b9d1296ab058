//! SPEC.md on ONE_OFFSET: the physical count is the virtual one.

use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, PCNT, PCTL, PCVAL, Vcpu, configure, phase, regs_body, restore, status,
};
use vhost_user_timer_kit::raw_driver::Rig;
use vhost_user_timer_model::vm::Notice;

use crate::world::{Clock, HZ, MS, Motion, Vm, World};

scenarios! {
    both {
        the_physical_count_has_the_virtual_counts_offset_always: "4.13" "4.14";
        a_vm_just_configured_has_both_counts_0_and_frozen: "4.15" "4.16";
        a_write_of_ptimer_cnt_is_ignored_and_counted_in_every_phase: "6.26";
        in_running_and_armed_it_is_ignored_alone_and_refused_beside_timer_cnt: "6.27";
        ptimer_cnt_reads_as_that_vcpus_timer_cnt: "6.28";
        the_line_of_the_physical_timer_follows_that_count: "6.29" "7.37";
        the_physical_count_is_not_settled: "7.31";
        strict_ignores_ptimer_cnt: "7.32";
        a_pinned_offset_is_one_offset_too: "4.13" "5.29";
    }
    model {
        the_log_says_how_far_cntpct_moves: "7.33";
        registers_written_back_change_nothing: "6.22" "6.26";
    }
    binary {
        the_backends_log_says_how_far_cntpct_moves: "7.33";
    }
}

/// The clocks move together.
#[track_caller]
fn one(vm: &mut Vm) -> Motion {
    let [virt, phys] = vm.seen().clocks;
    assert_eq!(virt, phys);
    let info = vm.info();
    assert_eq!(info.cntvoff, info.cntpoff);
    assert_eq!(info.flags & 0x14, 0x14, "PHYS_VIRTUALISED and ONE_OFFSET");
    virt
}

fn paused(on: World, vcpus: u32) -> Vm {
    on.configured(vcpus, configure::ONE_OFFSET)
}

fn the_physical_count_has_the_virtual_counts_offset_always(on: World) {
    let mut vm = on.configured(2, configure::ONE_OFFSET | configure::CONFIRM);
    let is_frozen = |motion| matches!(motion, Motion::Frozen(_));
    assert!(is_frozen(one(&mut vm)));
    vm.resume();
    assert!(!is_frozen(one(&mut vm)));
    vm.confirm();
    assert!(!is_frozen(one(&mut vm)));
    vm.pause_counting();
    assert!(!is_frozen(one(&mut vm)));
    vm.set(1, &[(CNT, 5_000)]);
    assert_eq!(one(&mut vm), Motion::Frozen(5_000));
    vm.restore_begin(2, restore::AUTORUN);
    assert!(is_frozen(one(&mut vm)));
    vm.set(0, &[(PCNT, 77)]);
    vm.restored(0, 6_000);
    vm.restored(1, 7_000);
    assert!(!is_frozen(one(&mut vm)));
    vm.abort();
    assert_eq!(one(&mut vm), Motion::Frozen(5_000));
    vm.resume();
    vm.confirm();
    vm.pause();
    assert!(is_frozen(one(&mut vm)));
}

fn a_vm_just_configured_has_both_counts_0_and_frozen(on: World) {
    let mut vm = paused(on, 1);
    assert_eq!(vm.info().flags, 0x14);
    vm.pass(MS);
    assert_eq!(vm.counts(), [0, 0]);
}

fn a_write_of_ptimer_cnt_is_ignored_and_counted_in_every_phase(on: World) {
    let mut vm = paused(on, 1);
    assert_eq!(vm.set(0, &[(PCNT, 9), (CNT, 500)]), (0, 1));
    assert_eq!(vm.counts(), [500, 500]);
    vm.restore_begin(1, 0);
    assert_eq!(vm.set(0, &[(PCNT, 9)]), (0, 1));
    assert_eq!(vm.get_one(0, PCNT), 500);
    vm.set_vm(&[Vcpu::with(0, [0, 600, 0, 0, 77, 0])]);
    assert_eq!(vm.get_one(0, PCNT), 600);
    vm.restore_done(0);
    assert_eq!(vm.counts(), [600, 600]);
    for confirms in [0, configure::CONFIRM] {
        let mut vm = on.configured(1, configure::ONE_OFFSET | confirms);
        vm.resume();
        let offsets = vm.offsets();
        assert_eq!(vm.set(0, &[(PCNT, 9), (PCTL, 2)]).1, 1);
        assert_eq!(vm.offsets(), offsets);
        assert_eq!(vm.get_one(0, PCTL) & 3, 2);
    }
}

fn in_running_and_armed_it_is_ignored_alone_and_refused_beside_timer_cnt(on: World) {
    for (confirms, wanted) in [(0, phase::RUNNING), (configure::CONFIRM, phase::ARMED)] {
        let mut vm = on.configured(1, configure::ONE_OFFSET | confirms);
        vm.resume();
        let before = vm.snapshot();
        assert_eq!(vm.set(0, &[(PCNT, 9)]), (0, 1));
        for entries in [[(PCNT, 9), (CNT, 9)], [(CNT, 9), (PCNT, 9)]] {
            assert_eq!(vm.set_refused(0, &entries), (status::EBUSY, wanted));
        }
        assert_eq!(vm.snapshot(), before);
    }
}

fn ptimer_cnt_reads_as_that_vcpus_timer_cnt(on: World) {
    let mut vm = paused(on, 2);
    vm.restore_begin(2, 0);
    vm.set(0, &[(CNT, 40), (PCNT, 1)]);
    vm.set(1, &[(PCNT, 2), (CNT, 50)]);
    assert_eq!(vm.get(0, &[CNT, PCNT]), [40, 40]);
    assert_eq!(vm.get(1, &[PCNT, CNT]), [50, 50]);
    let counts = vm
        .state()
        .vcpus
        .iter()
        .map(|it| it.registers[4])
        .collect::<Vec<_>>();
    assert_eq!(counts, [40, 50]);
    vm.abort();
    vm.resume();
    let [virt, phys] = vm.get(0, &[CNT, PCNT])[..] else {
        unreachable!("two registers");
    };
    assert_eq!(virt, phys);
}

fn the_line_of_the_physical_timer_follows_that_count(on: World) {
    let mut vm = paused(on, 1);
    vm.restore_begin(1, 0);
    // By the physical count that it brings the line would be high.
    let entries = [(PCTL, 1), (PCVAL, 50), (PCNT, 90), (CNT, 40)];
    assert_eq!(vm.set(0, &entries), (0, 1));
    assert_eq!(vm.set(0, &[(CNT, 60)]), (2, 0));
    assert_eq!(vm.set_done(0, &[(CTL, 0), (CVAL, 0)]), (2, 0, 0));
    vm.resume();
    assert_eq!(vm.fired(), [(0, 1)]);
    let soon = vm.virt() + MS;
    vm.arm(0, Clock::Physical, 1, soon);
    vm.until(|vm| vm.virt() > soon);
    assert_eq!(vm.fired(), [(0, 1)]);
}

fn the_physical_count_is_not_settled(on: World) {
    let mut vm = paused(on, 2);
    vm.restore_begin(2, 0);
    vm.set_vm_done(&[
        Vcpu::with(0, [0, 100, 0, 0, 9_000, 0]),
        Vcpu::with(1, [0, 200, 0, 0, 8_000, 0]),
    ]);
    assert_eq!(vm.counts(), [200, 200]);
    // Nor does it continue as before where no vCPU brings it.
    vm.restore_begin(2, 0);
    vm.restored(0, 300);
    vm.restored(1, 250);
    assert_eq!(vm.counts(), [300, 300]);
}

fn strict_ignores_ptimer_cnt(on: World) {
    let mut vm = paused(on, 2);
    vm.restore_begin(2, restore::STRICT);
    let done = vm.set_vm_done(&[
        Vcpu::with(0, [0, 100, 0, 0, 9_000, 0]),
        Vcpu::with(1, [0, 100, 0, 0, 8_000, 0]),
    ]);
    assert_eq!((done, vm.counts()), (0, [100, 100]));
}

fn a_pinned_offset_is_one_offset_too(on: World) {
    let mut vm = paused(on, 1);
    vm.set_offset(50);
    assert_eq!(one(&mut vm), Motion::Counting(50));
    assert_eq!(vm.set(0, &[(CNT, 1), (PCNT, 1)]), (0, 2));
    vm.resume();
    assert_eq!(one(&mut vm), Motion::Counting(50));
}

fn the_log_says_how_far_cntpct_moves(on: World) {
    for (brought, ticks) in [
        ([Some(700), None], Some(300)),
        ([Some(700), Some(1_500)], Some(-500)),
        ([Some(1_000), Some(3)], None),
        ([None, None], None),
        ([Some(u64::MAX), None], Some(1_001)),
    ] {
        let mut vm = paused(on, 2);
        // ELAPSED moves both alike.
        let now = vm.driver.realtime();
        vm.begin(2, restore::ELAPSED, now - HZ, 0);
        vm.exact().notices();
        for (vcpu, count) in (0..).zip(brought) {
            vm.bring(vcpu, 1_000 - u64::from(vcpu));
            if let Some(count) = count {
                vm.set(vcpu, &[(PCNT, count)]);
            }
            vm.restore_done(vcpu);
        }
        let is_moved = |notice: &Notice| match *notice {
            Notice::PhysicalCountMoved { ticks } => Some(ticks),
            _ => None,
        };
        let moved: Vec<_> = vm.exact().notices().iter().filter_map(is_moved).collect();
        assert_eq!(moved, Vec::from_iter(ticks), "{brought:?}");
        assert_eq!(vm.counts()[0], 1_000 + HZ);
    }
}

fn registers_written_back_change_nothing(on: World) {
    let mut vm = paused(on, 1);
    vm.resume();
    vm.pass(1_000);
    vm.pause_counting();
    let before = vm.offsets();
    for _ in 0..100 {
        let all = vm.get_all(0);
        vm.pass(7);
        let entries: Vec<_> = vhost_user_timer_kit::contract::ARM64
            .into_iter()
            .zip(all)
            .collect();
        assert_eq!(vm.set(0, &entries).1, 1);
    }
    assert_eq!(vm.offsets(), before);
}

fn the_backends_log_says_how_far_cntpct_moves() {
    let rig = Rig::launch_release(&[]);
    let mut client = Client::connect(&rig);
    client.configure_with(1, configure::ONE_OFFSET);
    client.restore_begin(1, 0);
    let entries = [(CTL, 0), (CNT, 100), (CVAL, 0), (PCNT, 130)];
    let body = regs_body(&entries);
    client
        .ask_done(vhost_user_timer_kit::contract::op::SET_REGS, 0, &body)
        .ok(12);
    rig.log_with("CNTPCT moves by -30 ticks");
}
