//! SPEC.md, "Phases": which operation is taken when, and where it leads.

use vhost_user_timer_protocol::wire::{self, restore_flags};
use vhost_user_timer_protocol::{Phase, Status};

use super::rig::{Ask, HZ, ON, PHASES, PROFILE, Rig};
use crate::vm::{MAX_FREQUENCY, Notice, Profile, Timeline};

/// Whether the phase takes the operation, on a VM that is otherwise right for it.
fn taken(name: &str, phase: Phase) -> bool {
    let phases: &[Phase] = match name {
        "GET_INFO" => &PHASES,
        "CONFIGURE_VM, the same again" => &PHASES,
        "CONFIGURE_VM, others" => &[Phase::New],
        "SET_VM" | "RESTORE_DONE" | "RESTORE_ABORT" => &[Phase::Restoring],
        "SET_COUNTER_OFFSET" | "RESTORE_BEGIN" => &[Phase::Paused, Phase::Restoring],
        "SET_COUNTER_ANCHOR" => &[Phase::Paused],
        "PAUSE" | "RESUME" => &[Phase::Paused, Phase::Running],
        "SET_REGS, a count" => &[Phase::Paused, Phase::Restoring],
        _ => &PHASES[1..],
    };
    phases.contains(&phase)
}

#[test]
fn every_operation_is_taken_in_its_phases_and_is_ebusy_in_the_others() {
    use vhost_user_timer_protocol::Register::{TimerCnt, TimerCtl};
    let asks = [
        ("GET_INFO", Ask::get_info()),
        ("CONFIGURE_VM, the same again", Ask::configure(2, 0, 0)),
        ("CONFIGURE_VM, others", Ask::configure(3, 0, 0)),
        ("GET_REG_LIST", Ask::get_reg_list(0)),
        ("GET_REGS", Ask::get_regs(0, &[TimerCnt])),
        ("SET_REGS", Ask::set_regs(0, &[(TimerCtl, 1)])),
        ("SET_REGS, a count", Ask::set_regs(0, &[(TimerCnt, 1)])),
        ("GET_VM", Ask::get_vm(0, 2)),
        ("SET_VM", Ask::set_vm(&[])),
        ("SET_COUNTER_OFFSET", Ask::set_offset(1)),
        ("SET_COUNTER_ANCHOR", Ask::set_anchor(1, 1)),
        ("PAUSE", Ask::pause()),
        ("RESUME", Ask::resume()),
        ("RESTORE_BEGIN", Ask::begin(2, 0)),
        ("RESTORE_DONE", Ask::restore_done(0)),
        ("WAIT_RUN", Ask::wait_run(0)),
        ("RESTORE_ABORT", Ask::abort()),
    ];
    for phase in PHASES {
        for (name, ask) in &asks {
            let mut rig = Rig::in_phase(phase, 2);
            if phase == Phase::Restoring {
                rig.bring(0, 1);
            }
            let before = rig.vm.clone();
            let refused = rig
                .offer(ask)
                .is_some_and(|reply| reply.status == Status::Busy);
            assert_eq!(!refused, taken(name, phase), "{name} in {phase}");
            if refused {
                assert_eq!(rig.vm, before, "{name} in {phase}");
            }
        }
    }
}

#[test]
fn configuring_leads_to_paused_with_virtual_count_and_physical_offset_zero() {
    let mut rig = Rig::new();
    rig.done(&Ask::configure(4, 0, 0));
    assert_eq!(rig.vm.phase(), Phase::Paused);
    assert_eq!(rig.virt(), 0);
    assert_eq!(rig.offset(Timeline::Physical), 0);
    rig.pass(HZ);
    assert_eq!(rig.virt(), 0, "the virtual clock stands still");
    assert_eq!(rig.phys(), rig.now.host);
}

#[test]
fn configuring_the_same_again_is_fine_in_any_phase_and_changes_nothing() {
    for phase in PHASES.into_iter().skip(1) {
        let mut rig = Rig::in_phase(phase, 4);
        let before = rig.vm.clone();
        rig.done(&Ask::configure(4, 0, 0));
        rig.done(&Ask::configure(4, 0, HZ));
        assert_eq!(rig.vm, before);
        for other in [
            Ask::configure(5, 0, HZ),
            Ask::configure(4, 1, HZ),
            Ask::configure(4, 0, HZ + 1),
            Ask::configure(0, 0, HZ),
            Ask::configure(4, 9, HZ),
        ] {
            assert_eq!(rig.refused(&other).0, Status::Busy);
        }
        assert_eq!(rig.vm, before);
    }
}

#[test]
fn a_vm_has_at_least_one_vcpu_and_at_most_those_of_the_backend() {
    for (vcpus, right) in [(0, false), (1, true), (8, true), (9, false)] {
        let mut rig = Rig::with_profile(Profile {
            max_vcpus: 8,
            ..PROFILE
        });
        let status = rig.send(&Ask::configure(vcpus, 0, 0)).status;
        assert_eq!(status == Status::Ok, right, "{vcpus}");
    }
}

#[test]
fn an_unknown_abi_is_einval() {
    for abi in [2, 3, 0xff] {
        let mut rig = Rig::new();
        let verdict = rig.refused(&Ask::configure(1, abi, 0));
        assert_eq!(verdict, (Status::Invalid, 0));
        assert_eq!(rig.vm.phase(), Phase::New);
    }
}

#[test]
fn a_frequency_is_any_up_to_the_highest_and_zero_is_the_backends() {
    for (frequency, taken) in [
        (0, Some(HZ)),
        (1, Some(1)),
        (62_500_000, Some(62_500_000)),
        (MAX_FREQUENCY, Some(MAX_FREQUENCY)),
        (MAX_FREQUENCY + 1, None),
        (u64::MAX, None),
    ] {
        let mut rig = Rig::new();
        let reply = rig.send(&Ask::configure(1, 0, frequency));
        match taken {
            Some(frequency) => assert_eq!(rig.vm.frequency(), frequency),
            None => assert_eq!(reply.verdict(), (Status::Invalid, 0)),
        }
    }
}

#[test]
fn a_backend_of_one_frequency_refuses_every_other() {
    for (frequency, right) in [(0, true), (HZ, true), (HZ - 1, false), (1, false)] {
        let mut rig = Rig::with_profile(Profile {
            frequency_fixed: true,
            ..PROFILE
        });
        let reply = rig.send(&Ask::configure(1, 0, frequency));
        assert_eq!(reply.status == Status::Ok, right);
        assert!(right || reply.verdict() == (Status::Invalid, 0));
    }
}

#[test]
fn pause_in_paused_and_resume_in_running_change_nothing() {
    let mut rig = Rig::running(2);
    rig.arm(1, Timeline::Virtual, ON, 0);
    rig.pass(10);
    let before = rig.vm.clone();
    let run = rig.resume();
    assert_eq!(rig.vm, before, "and no line is told again");
    assert_eq!(run.virt_count.get(), 10);

    rig.pause_counting();
    let before = rig.vm.clone();
    rig.pass(5);
    assert_eq!(rig.pause().virt_count.get(), 15);
    assert_eq!(rig.vm, before, "not even the clocks are frozen");

    rig.resume();
    rig.pause();
    let before = rig.vm.clone();
    rig.pause_counting();
    assert_eq!(rig.vm, before, "nor is a frozen one let go");
}

#[test]
fn the_last_restore_done_leads_to_running_with_autorun_and_to_paused_without() {
    for (flags, phase) in [(0, Phase::Paused), (restore_flags::AUTORUN, Phase::Running)] {
        let mut rig = Rig::restoring(2, flags);
        rig.bring(0, 1);
        rig.bring(1, 1);
        assert_eq!(rig.restored(0), 1);
        assert_eq!(rig.vm.phase(), Phase::Restoring);
        assert_eq!(rig.restored(1), 0);
        assert_eq!(rig.vm.phase(), phase);
    }
}

#[test]
fn the_epoch_starts_at_one_and_grows_by_one_at_every_restore_begin_and_by_nothing_else() {
    let mut rig = Rig::new();
    assert_eq!(rig.vm.epoch(), 1);
    rig.done(&Ask::configure(1, 0, 0));
    rig.resume();
    rig.pause();
    assert_eq!(rig.vm.epoch(), 1);
    rig.done(&Ask::begin(1, 0));
    assert_eq!(rig.vm.epoch(), 2);
    rig.done(&Ask::begin(1, 0));
    assert_eq!(rig.vm.epoch(), 3);
    rig.done(&Ask::abort());
    rig.done(&Ask::begin(1, 0));
    assert_eq!(rig.vm.epoch(), 4);
    rig.bring(0, 0);
    rig.restored(0);
    assert_eq!(rig.vm.epoch(), 4);
    rig.refused(&Ask::begin(2, 0));
    assert_eq!(rig.vm.epoch(), 4);
}

#[test]
fn a_reset_leads_to_new_and_keeps_the_epoch() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        let epoch = rig.vm.epoch();
        rig.reset();
        assert_eq!(rig.vm.phase(), Phase::New);
        assert_eq!(rig.vm.epoch(), epoch);
        assert_eq!(rig.events(), []);
        assert_eq!(rig.vm.ticks_to_next(rig.now), None);
        rig.done(&Ask::configure(3, 1, 24_000_000));
        rig.done(&Ask::begin(3, 0));
        assert_eq!(rig.vm.epoch(), epoch + 1);
    }
}

#[test]
fn every_change_of_phase_is_told_and_nothing_else_is() {
    let mut rig = Rig::new();
    let steps = [
        (Ask::configure(1, 0, 0), Some(Phase::Paused)),
        (Ask::pause(), None),
        (Ask::resume(), Some(Phase::Running)),
        (Ask::resume(), None),
        (Ask::get_info(), None),
        (Ask::abort(), None),
        (Ask::pause(), Some(Phase::Paused)),
        (Ask::begin(1, 0), Some(Phase::Restoring)),
        (Ask::begin(1, 0), None),
        (Ask::abort(), Some(Phase::Paused)),
    ];
    for (ask, entered) in steps {
        let from = rig.vm.phase();
        rig.send(&ask);
        let notice = entered.map(|to| Notice::Phase {
            from,
            to,
            epoch: rig.vm.epoch(),
        });
        assert_eq!(rig.notices(), Vec::from_iter(notice));
        let virt = rig.virt();
        let event = entered.map(|phase| wire::Event {
            kind: wire::EVENT_PHASE_CHANGED.into(),
            timer: 0.into(),
            vcpu: phase.code().into(),
            cval: 0.into(),
            count: virt.into(),
            epoch: rig.vm.epoch().into(),
        });
        assert_eq!(rig.events(), Vec::from_iter(event));
    }
}
