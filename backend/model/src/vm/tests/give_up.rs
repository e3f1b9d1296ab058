//! A restore that is given up leaves nothing behind, in no field that a frontend might never see.

use vhost_user_timer_protocol::Register;
use vhost_user_timer_protocol::wire::restore_flags::{AUTORUN, ELAPSED, STRICT};

use super::rig::{Ask, ON, Rig, whole_vcpu};
use crate::vm::Timeline;

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
    virtualised.set(0, &[(Register::PtimerCnt, 3)]);
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
            // Only the epoch, and the phase that the frontend has yet to be told, may differ.
            let mut expected = past.vm.clone();
            expected.epoch = epoch;
            expected.pending_phase = rig.vm.pending_phase;
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
