//! SPEC.md, "Counters": two clocks, each counting or frozen, and `info` and `run`.

use vhost_user_timer_protocol::wire::{self, info_flags};
use vhost_user_timer_protocol::{Phase, Register, VERSION};

use super::rig::{Ask, HZ, PHASES, PROFILE, Rig};
use crate::vm::Timeline;

fn assert_run(rig: &Rig, run: wire::Run, virt: u64, phys: u64) {
    let host = rig.now.host;
    let expected = wire::Run {
        cntvoff: host.wrapping_sub(virt).into(),
        cntpoff: host.wrapping_sub(phys).into(),
        virt_count: virt.into(),
        phys_count: phys.into(),
        host_count: host.into(),
    };
    assert_eq!(run, expected);
}

#[test]
fn a_pause_freezes_the_virtual_clock_and_resume_goes_on_from_there() {
    let mut rig = Rig::running(1);
    rig.pass(100);
    let run = rig.pause();
    assert_run(&rig, run, 100, rig.now.host);
    rig.pass(1_000);
    assert_eq!(rig.virt(), 100);
    let run = rig.resume();
    assert_run(&rig, run, 100, rig.now.host);
    rig.pass(7);
    assert_eq!(rig.virt(), 107);
}

#[test]
fn the_offset_moves_by_the_pause() {
    let mut rig = Rig::running(1);
    let before = rig.offset(Timeline::Virtual);
    rig.pause();
    rig.pass(12_345);
    rig.resume();
    assert_eq!(rig.offset(Timeline::Virtual), before + 12_345);
}

#[test]
fn keep_counting_lets_the_clocks_go_on_and_the_offset_stay() {
    let mut rig = Rig::running(1);
    let before = rig.offset(Timeline::Virtual);
    rig.pause_counting();
    rig.pass(12_345);
    assert_eq!(rig.virt(), 12_345);
    rig.resume();
    assert_eq!(rig.offset(Timeline::Virtual), before);
}

#[test]
fn the_physical_clock_passes_the_host_counter_through_and_is_never_frozen() {
    for phase in [Phase::Paused, Phase::Running] {
        let mut rig = Rig::in_phase(phase, 1);
        for _ in 0..3 {
            rig.pass(99);
            assert_eq!(rig.phys(), rig.now.host);
            assert_eq!(rig.get(0, Register::PtimerCnt), rig.now.host);
            assert_eq!(rig.offset(Timeline::Physical), 0);
        }
        assert_eq!(rig.info().flags & info_flags::PHYS_VIRTUALISED, 0);
    }
}

#[test]
fn a_ptimer_cnt_write_virtualises_the_physical_clock_and_then_it_freezes_alike() {
    let mut rig = Rig::paused(1);
    rig.set(0, &[(Register::PtimerCnt, 1_000)]);
    assert_eq!(rig.info().flags, info_flags::PHYS_VIRTUALISED);
    rig.pass(5);
    assert_eq!(rig.phys(), 1_000, "frozen");
    rig.resume();
    rig.pass(5);
    assert_eq!(rig.phys(), 1_005);
    rig.pause();
    rig.pass(5);
    assert_eq!(rig.phys(), 1_005, "frozen by the pause");
    rig.resume();
    rig.pause_counting();
    rig.pass(5);
    assert_eq!(rig.phys(), 1_010, "not by this one");
}

#[test]
fn one_clock_can_be_frozen_while_the_other_counts() {
    let mut rig = Rig::running(1);
    rig.pause_counting();
    rig.set(0, &[(Register::PtimerCnt, 500)]);
    rig.pass(10);
    assert_eq!((rig.virt(), rig.phys()), (10, 500));
}

#[test]
fn an_offset_in_an_answer_is_the_host_count_less_the_count_of_that_instant() {
    let mut rig = Rig::paused(1);
    for _ in 0..4 {
        rig.pass(1_000);
        let info = rig.info();
        assert_eq!(info.host_count.get(), rig.now.host);
        assert_eq!(info.cntvoff.get(), rig.now.host, "the count stands at 0");
        let run = rig.pause();
        assert_run(&rig, run, 0, rig.now.host);
    }
}

#[test]
fn all_arithmetic_is_modulo_two_to_the_64() {
    let mut rig = Rig::paused(1);
    rig.set(
        0,
        &[
            (Register::TimerCnt, u64::MAX),
            (Register::PtimerCnt, u64::MAX - 1),
        ],
    );
    let run = rig.resume();
    assert_run(&rig, run, u64::MAX, u64::MAX - 1);
    rig.pass(3);
    assert_eq!((rig.virt(), rig.phys()), (2, 1));
    assert_eq!(rig.get(0, Register::TimerCnt), 2);
    // And the host counter itself.
    rig.pass(u64::MAX - rig.now.host);
    let (virt, phys) = (rig.virt(), rig.phys());
    rig.pass(10);
    assert_eq!(rig.now.host, 9);
    assert_eq!((rig.virt(), rig.phys()), (virt + 10, phys + 10));
    rig.pause();
    rig.pass(10);
    assert_eq!((rig.virt(), rig.phys()), (virt + 10, phys + 10));
}

#[test]
fn one_pair_of_offsets_serves_every_vcpu() {
    let mut rig = Rig::paused(5);
    let counts = [(Register::TimerCnt, 70), (Register::PtimerCnt, 80)];
    rig.set(3, &counts);
    rig.resume();
    rig.pass(11);
    for vcpu in 0..5 {
        assert_eq!(rig.get(vcpu, Register::TimerCnt), 81);
        assert_eq!(rig.get(vcpu, Register::PtimerCnt), 91);
    }
}

#[test]
fn info_says_what_the_vm_is() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 3);
        rig.pass(40);
        let info = rig.info();
        let configured = phase != Phase::New;
        let virt = if phase == Phase::Running { 40 } else { 0 };
        // While RESTORING the physical clock stands still as well.
        let phys_behind = if phase == Phase::Restoring { 40 } else { 0 };
        let expected = wire::Info {
            version: VERSION.into(),
            phase: phase.code().into(),
            vcpus: if configured { 3 } else { 0 }.into(),
            restored: match phase {
                Phase::Paused | Phase::Running => 3,
                Phase::New | Phase::Restoring => 0,
            }
            .into(),
            frequency: HZ.into(),
            cntvoff: if configured { rig.now.host - virt } else { 0 }.into(),
            cntpoff: phys_behind.into(),
            epoch: rig.vm.epoch().into(),
            max_vcpus: PROFILE.max_vcpus.into(),
            request_queues: PROFILE.request_queues.into(),
            abi: 0,
            flags: 0,
            host_count: rig.now.host.into(),
        };
        assert_eq!(info, expected);
        assert_eq!(rig.vm.info(rig.now), expected);
    }
}

#[test]
fn infos_flags_say_pinned_anchored_and_physical_virtualised() {
    let mut rig = Rig::paused_arm(1);
    assert_eq!((rig.info().abi, rig.info().flags), (1, 0));
    rig.done(&Ask::set_anchor(1, 2));
    assert_eq!(rig.info().flags, info_flags::ANCHORED);
    rig.done(&Ask::set_offset(1));
    let all = info_flags::ANCHORED | info_flags::OFFSET_PINNED | info_flags::PHYS_VIRTUALISED;
    assert_eq!(rig.info().flags, all);
}

#[test]
fn restored_counts_the_vcpus_done_in_this_restore() {
    let mut rig = Rig::restoring(3, 0);
    for vcpu in 0..3 {
        assert_eq!(rig.info().restored.get(), vcpu);
        rig.bring(vcpu, 1);
        rig.restored(vcpu);
    }
    assert_eq!(rig.info().restored.get(), 3);
}

#[test]
fn the_offsets_never_change_while_the_vm_runs() {
    let mut rig = Rig::running(2);
    let offsets = [
        rig.offset(Timeline::Virtual),
        rig.offset(Timeline::Physical),
    ];
    for ask in Ask::one_of_each(2) {
        rig.pass(1_000);
        if ask.op != Ask::pause().op {
            rig.send(&ask);
        }
        assert_eq!(rig.vm.phase(), Phase::Running);
        let now = [
            rig.offset(Timeline::Virtual),
            rig.offset(Timeline::Physical),
        ];
        assert_eq!(now, offsets, "{ask:?}");
    }
}

#[test]
fn a_count_never_goes_back_over_any_number_of_pauses() {
    let mut rig = Rig::paused(1);
    rig.set(0, &[(Register::PtimerCnt, 0)]);
    let mut last = (0, 0);
    for n in 0..200 {
        rig.pass(n * 7 % 13);
        match n % 4 {
            0 => rig.resume(),
            1 => rig.pause_counting(),
            2 => rig.resume(),
            _ => rig.pause(),
        };
        let counts = (rig.virt(), rig.phys());
        assert!(counts.0 >= last.0 && counts.1 >= last.1);
        last = counts;
    }
}
