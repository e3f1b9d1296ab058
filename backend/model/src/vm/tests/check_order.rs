//! The order of checks: EPROTO, EOPNOTSUPP, EINVAL (reserved), ENXIO, ESTALE, EBUSY,
//! EINVAL/ENOENT (values), E2BIG. Each request is wrong in two ways, and the first is answered.

use vhost_user_timer_protocol::wire::{present, restore_flags};
use vhost_user_timer_protocol::{Op, Phase, Register, Status, VM_WIDE};

use super::rig::{Ask, PHASES, Rig, whole_vcpu};

/// A register id of no architecture.
const NO_ID: u64 = 7;

/// Every operation in every phase, on a VM of 2 vCPUs.
fn everywhere() -> impl Iterator<Item = (Rig, Ask)> {
    PHASES.into_iter().flat_map(|phase| {
        Ask::one_of_each(2)
            .into_iter()
            .map(move |ask| (Rig::in_phase(phase, 2), ask))
    })
}

#[test]
fn framing_before_operation() {
    for (mut rig, ask) in everywhere() {
        let mut bytes = ask.bytes();
        bytes[1] = 0xff;
        let reply = rig.offer_bytes(&bytes[..15], 4096, 1).unwrap();
        assert_eq!(reply.verdict(), (Status::Malformed, 0));
    }
}

#[test]
fn operation_before_reserved() {
    for phase in PHASES {
        for vcpu in [0, 2, VM_WIDE] {
            let ask = Ask {
                flags: 2,
                ..Ask::new(Op::Unknown(0x60), vcpu, &[1_u8; 3])
            };
            let verdict = Rig::in_phase(phase, 2).refused(&ask.in_epoch(9));
            assert_eq!(verdict, (Status::Unsupported, 0));
        }
    }
}

#[test]
fn framing_before_reserved() {
    for (mut rig, mut ask) in everywhere() {
        ask.body.push(0);
        ask.flags = 2;
        assert_eq!(rig.refused(&ask), (Status::Malformed, 0));
    }
}

#[test]
fn reserved_before_vcpu() {
    for (mut rig, ask) in everywhere() {
        if ask.vcpu != VM_WIDE {
            let ask = Ask {
                flags: 2,
                vcpu: 2,
                ..ask
            };
            assert_eq!(rig.refused(&ask), (Status::Invalid, 0));
        }
    }
}

#[test]
fn reserved_before_epoch_and_phase() {
    for (mut rig, ask) in everywhere() {
        let ask = Ask { flags: 2, ..ask };
        assert_eq!(rig.refused(&ask.in_epoch(9)), (Status::Invalid, 0));
    }
    // The reserved fields of bodies, in phases in which the operation is refused.
    let mut reserved = [
        (Phase::Paused, Ask::configure(7, 0, 0), 16 - 9),
        (Phase::Running, Ask::set_offset(0), 15),
        (Phase::Restoring, Ask::pause(), 7),
        (Phase::Restoring, Ask::pause(), 0),
        (Phase::Running, Ask::begin(2, 0), 7),
    ];
    for (phase, ask, byte) in &mut reserved {
        ask.body[*byte] = 0x80;
        let verdict = Rig::in_phase(*phase, 2).refused(&ask.clone().in_epoch(9));
        assert_eq!(verdict, (Status::Invalid, 0), "{ask:?}");
    }
}

#[test]
fn vcpu_before_epoch() {
    for (mut rig, ask) in everywhere() {
        if ask.vcpu != VM_WIDE && rig.vm.phase() != Phase::New {
            let ask = ask.for_vcpu(2).in_epoch(9);
            assert_eq!(rig.refused(&ask), (Status::NoSuchVcpu, 0));
        }
    }
}

#[test]
fn vcpu_before_phase() {
    let mut rig = Rig::paused(2);
    let verdict = rig.refused(&Ask::restore_done(2));
    assert_eq!(verdict, (Status::NoSuchVcpu, 0));
    let mut rig = Rig::running(2);
    let ask = Ask::set_regs(2, &[(Register::TimerCnt, 0)]);
    assert_eq!(rig.refused(&ask), (Status::NoSuchVcpu, 0));
}

#[test]
fn epoch_before_phase() {
    for (mut rig, ask) in everywhere() {
        assert_eq!(rig.refused(&ask.in_epoch(9)), (Status::Stale, 0));
    }
}

#[test]
fn epoch_before_values_and_room() {
    let mut rig = Rig::paused(2);
    for ask in [
        Ask::get_ids(0, &[NO_ID]),
        Ask::get_vm(9, 9),
        Ask::begin(9, 0),
        Ask::get_info(),
    ] {
        let verdict = rig.refused(&ask.in_epoch(9).with_room(16));
        assert_eq!(verdict, (Status::Stale, 0));
    }
}

#[test]
fn phase_before_values() {
    let done = {
        let mut rig = Rig::restoring(2, 0);
        rig.bring(0, 1);
        rig.restored(0);
        rig
    };
    let count = Register::TimerCnt.id(vhost_user_timer_protocol::Abi::Arm64);
    let cases = [
        (Rig::new(), Ask::get_ids(0, &[NO_ID]), 0),
        (Rig::new(), Ask::set_ids(0, &[(NO_ID, 0)]), 0),
        (Rig::new(), Ask::get_vm(5, 5), 0),
        (Rig::new(), Ask::begin(9, 0), 0),
        (Rig::paused(2), Ask::configure(0, 9, u64::MAX), 1),
        (Rig::paused(2), Ask::set_vm(&[whole_vcpu(9, [0; 6])]), 1),
        (Rig::running(2), Ask::begin(9, 0), 2),
        (
            Rig::running(2),
            Ask::set_ids(0, &[(NO_ID, 0), (count, 0)]),
            2,
        ),
        (done.clone(), Ask::set_ids(0, &[(NO_ID, 0)]), 1),
        (
            done,
            Ask::set_vm(&[whole_vcpu(9, [0; 6]), whole_vcpu(0, [0; 6])]),
            1,
        ),
    ];
    for (mut rig, ask, detail) in cases {
        assert_eq!(rig.refused(&ask), (Status::Busy, detail), "{ask:?}");
    }
}

#[test]
fn phase_before_room() {
    let cases = [
        (Rig::new(), Ask::get_vm(0, 0)),
        (Rig::new(), Ask::get_reg_list(0)),
        (Rig::new(), Ask::wait_run(0)),
        (Rig::new(), Ask::pause()),
        (Rig::restoring(2, 0), Ask::pause()),
        (Rig::restoring(2, 0), Ask::resume()),
        (Rig::paused(2), Ask::restore_done(0)),
        (
            Rig::running(2),
            Ask::set_regs(0, &[(Register::TimerCnt, 0)]),
        ),
    ];
    for (mut rig, ask) in cases {
        assert_eq!(rig.refused(&ask.with_room(16)).0, Status::Busy);
    }
}

#[test]
fn values_before_room() {
    let good = Register::TimerCval.id(vhost_user_timer_protocol::Abi::Arm64);
    for phase in [Phase::Paused, Phase::Running, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 2);
        let room = 16;
        let ask = Ask::get_ids(0, &[good, NO_ID]).with_room(room);
        assert_eq!(rig.refused(&ask), (Status::UnknownRegister, 1));
        let ask = Ask::set_ids(0, &[(good, 1), (NO_ID, 1)]).with_room(room);
        assert_eq!(rig.refused(&ask), (Status::UnknownRegister, 1));
        let ask = Ask::set_ids(0, &[(good, 1), (good, 2)]).with_room(room);
        assert_eq!(rig.refused(&ask), (Status::Invalid, 1));
        let ask = Ask::get_vm(1, 2).with_room(room);
        assert_eq!(rig.refused(&ask), (Status::Invalid, 0));
    }
    let mut rig = Rig::restoring(2, restore_flags::STRICT);
    let ask = Ask::restore_done(0).with_room(16);
    let missing = present::CTL | present::CNT | present::CVAL;
    assert_eq!(rig.refused(&ask), (Status::Incomplete, missing));
    rig.bring(0, 1);
    rig.bring(1, 2);
    rig.restored(1);
    assert_eq!(rig.refused(&ask), (Status::Invalid, 0), "STRICT");
}

#[test]
fn of_several_bad_entries_the_first_is_named() {
    let mut rig = Rig::paused(2);
    let foreign = Register::TimerCtl.id(vhost_user_timer_protocol::Abi::Arm);
    let good = Register::TimerCval.id(vhost_user_timer_protocol::Abi::Arm64);
    let ids = [good, foreign, NO_ID];
    assert_eq!(rig.refused(&Ask::get_ids(0, &ids)), (Status::Invalid, 1));
    let ids = [good, good, NO_ID, foreign];
    let verdict = rig.refused(&Ask::get_ids(0, &ids));
    assert_eq!(verdict, (Status::UnknownRegister, 2));
    let entries = [(good, 1), (good, 2), (NO_ID, 0)];
    let verdict = rig.refused(&Ask::set_ids(0, &entries));
    assert_eq!(verdict, (Status::Invalid, 1));
}
