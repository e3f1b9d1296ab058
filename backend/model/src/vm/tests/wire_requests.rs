//! SPEC.md, "Requests": headers, scopes, epochs, room.

use vhost_user_timer_protocol::{Op, Phase, Register, Status, VM_WIDE};

use super::rig::{Ask, PHASES, Rig};

/// The operations whose answer has a body, each in a phase that takes it, and the body's length.
fn answers_with_a_body() -> Vec<(Phase, Ask, usize)> {
    let set = Ask::set_regs(1, &[(Register::TimerCval, 9)]);
    vec![
        (Phase::New, Ask::get_info(), 64),
        (Phase::Running, Ask::get_reg_list(1), 6 * 8),
        (Phase::Running, Ask::get_regs(1, &Register::ALL), 6 * 16),
        (Phase::Running, Ask::get_regs(1, &[]), 0),
        (Phase::Running, set.clone(), 8),
        (Phase::Paused, set.clone(), 8),
        (Phase::Restoring, set, 8),
        (Phase::Running, Ask::get_vm(0, 2), 40 + 2 * 56),
        (Phase::Paused, Ask::get_vm(2, 0), 40),
        (Phase::Running, Ask::pause(), 40),
        (Phase::Paused, Ask::pause(), 40),
        (Phase::Paused, Ask::resume(), 40),
        (Phase::Running, Ask::resume(), 40),
        (Phase::Running, Ask::wait_run(1), 40),
    ]
}

#[test]
fn an_answer_is_a_header_and_the_operations_body() {
    for (phase, ask, len) in answers_with_a_body() {
        let mut rig = Rig::in_phase(phase, 2);
        assert_eq!(rig.done(&ask).body.len(), len, "{ask:?} in {phase}");
    }
}

#[test]
fn an_operation_without_an_answer_gives_the_header_alone() {
    let of_phase = [
        (Phase::New, Ask::configure(2, 0, 0)),
        (Phase::Paused, Ask::set_offset(1)),
        (Phase::Paused, Ask::set_anchor(1, 2)),
        (Phase::Paused, Ask::begin(2, 0)),
        (Phase::Restoring, Ask::set_vm(&[])),
        (Phase::Restoring, Ask::abort()),
    ];
    for (phase, ask) in of_phase {
        let mut rig = Rig::in_phase(phase, 2);
        let reply = rig.done(&ask.with_room(16));
        assert!(reply.body.is_empty(), "in {phase}");
    }
}

#[test]
fn an_answer_that_just_fits_is_given_and_one_byte_less_is_e2big_with_the_bytes_needed() {
    for (phase, ask, len) in answers_with_a_body() {
        let mut rig = Rig::in_phase(phase, 2);
        let before = rig.vm.clone();
        for room in 16..16 + len {
            let verdict = rig.refused(&ask.clone().with_room(room));
            assert_eq!(verdict, (Status::TooBig, 16 + len as u32), "{ask:?}");
        }
        assert_eq!(rig.vm, before);
        rig.done(&ask.with_room(16 + len));
    }
}

#[test]
fn restore_done_needs_room_too_and_else_the_vcpu_is_not_done() {
    let mut rig = Rig::restoring(1, 0);
    rig.bring(0, 5);
    let before = rig.vm.clone();
    let verdict = rig.refused(&Ask::restore_done(0).with_room(23));
    assert_eq!(verdict, (Status::TooBig, 24));
    assert_eq!(rig.vm, before);
    rig.done(&Ask::restore_done(0).with_room(24));
    assert_eq!(rig.vm.phase(), Phase::Paused);
}

#[test]
fn a_wait_run_that_could_not_be_answered_does_not_wait() {
    for phase in [Phase::Paused, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 2);
        let verdict = rig.refused(&Ask::wait_run(0).with_room(55));
        assert_eq!(verdict, (Status::TooBig, 56));
        rig.vm.cancel_queue(1, &mut rig.effects);
        assert_eq!(rig.released(), []);
    }
}

#[test]
fn every_answer_names_the_current_epoch() {
    let mut rig = Rig::paused(2);
    assert_eq!(rig.send(&Ask::get_info()).epoch, 1);
    assert_eq!(rig.send(&Ask::begin(2, 0)).epoch, 2);
    assert_eq!(rig.send(&Ask::begin(2, 0)).epoch, 3);
    assert_eq!(rig.send(&Ask::restore_done(0)).epoch, 3);
    assert_eq!(rig.send(&Ask::get_regs(9, &[])).epoch, 3);
    assert_eq!(rig.send(&Ask::get_info().in_epoch(1)).epoch, 3);
}

#[test]
fn epoch_zero_means_whatever_is_current_and_any_other_epoch_is_over() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        let current = rig.vm.epoch();
        rig.done(&Ask::get_info());
        rig.done(&Ask::get_info().in_epoch(current));
        for other in [current - 1, current + 1, u64::MAX] {
            if other != 0 {
                let verdict = rig.refused(&Ask::get_info().in_epoch(other));
                assert_eq!(verdict, (Status::Stale, 0));
            }
        }
    }
}

#[test]
fn a_vm_wide_operation_that_names_a_vcpu_is_einval_in_every_phase() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        for ask in Ask::one_of_each(2) {
            if ask.vcpu == VM_WIDE {
                for vcpu in [0, 1, 2, VM_WIDE - 1] {
                    let verdict = rig.refused(&ask.clone().for_vcpu(vcpu));
                    assert_eq!(verdict, (Status::Invalid, 0));
                }
            }
        }
    }
}

#[test]
fn a_vcpu_operation_on_no_vcpu_of_the_vm_is_enxio_and_in_new_ebusy() {
    for phase in PHASES {
        let expected = match phase {
            Phase::New => (Status::Busy, 0),
            _ => (Status::NoSuchVcpu, 0),
        };
        let mut rig = Rig::in_phase(phase, 2);
        for ask in Ask::one_of_each(2) {
            if ask.vcpu != VM_WIDE {
                for vcpu in [2, 4096, VM_WIDE - 1, VM_WIDE] {
                    let verdict = rig.refused(&ask.clone().for_vcpu(vcpu));
                    assert_eq!(verdict, expected, "{ask:?} in {phase}");
                }
            }
        }
    }
}

#[test]
fn a_non_zero_header_flag_is_einval() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        for ask in Ask::one_of_each(2) {
            for bit in 0..16 {
                let ask = Ask {
                    flags: 1 << bit,
                    ..ask.clone()
                };
                assert_eq!(rig.refused(&ask), (Status::Invalid, 0));
            }
        }
    }
}

#[test]
fn a_body_that_is_too_short_or_too_long_is_eproto() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        for ask in Ask::one_of_each(2) {
            let mut longer = ask.clone();
            longer.body.push(0);
            assert_eq!(rig.refused(&longer), (Status::Malformed, 0));
            let mut shorter = ask;
            if shorter.body.pop().is_some() {
                assert_eq!(rig.refused(&shorter), (Status::Malformed, 0));
            }
        }
    }
}

#[test]
fn a_request_cut_inside_its_header_is_eproto_and_an_empty_one_too() {
    let mut rig = Rig::running(1);
    let bytes = Ask::get_info().bytes();
    for len in 0..bytes.len() {
        let reply = rig.offer_bytes(&bytes[..len], 4096, 1).unwrap();
        assert_eq!(reply.verdict(), (Status::Malformed, 0));
    }
}

#[test]
fn an_unknown_operation_is_eopnotsupp_whatever_its_body() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        for op in [0, 3, 0x0013, 0x0044, 0x00ff, 0x0100, 0xffff] {
            for len in [0, 1, 16, 4096] {
                let ask = Ask::new(Op::Unknown(op), 0, vec![0xff_u8; len].as_slice());
                assert_eq!(rig.refused(&ask), (Status::Unsupported, 0));
            }
        }
    }
}

#[test]
fn ebusys_detail_is_the_phase_or_while_restoring_the_vcpus_missing() {
    let mut rig = Rig::new();
    assert_eq!(rig.refused(&Ask::resume()), (Status::Busy, 0));
    rig.done(&Ask::configure(3, 0, 0));
    assert_eq!(rig.refused(&Ask::abort()), (Status::Busy, 1));
    rig.resume();
    assert_eq!(rig.refused(&Ask::set_offset(0)), (Status::Busy, 2));
    rig.pause();
    rig.done(&Ask::begin(3, 0));
    for (vcpu, missing) in [(0, 3), (1, 2), (2, 1)] {
        assert_eq!(rig.refused(&Ask::resume()), (Status::Busy, missing));
        rig.bring(vcpu, 1);
        rig.restored(vcpu);
    }
    assert_eq!(rig.refused(&Ask::abort()), (Status::Busy, 1));
}
