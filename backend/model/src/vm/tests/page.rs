//! The time page, as far as the model and its shell agree on it: what the page says, and that it is
//! written, are sentences of SPEC.md and tested as such.

use vhost_user_timer_protocol::wire::page_flags;
use vhost_user_timer_protocol::{Op, Phase, Status};

use super::rig::{Ask, PHASES, Rig};
use crate::vm::{Effect, Incoming, PageOrder, Token, Vm};

const VIRT: u32 = page_flags::VIRT_FROZEN;
const PHYS: u32 = page_flags::PHYS_FROZEN;

fn ordered(rig: &mut Rig, ask: &Ask) -> Option<PageOrder> {
    rig.done(ask);
    rig.effects.page.take()
}

#[test]
fn set_time_page_is_taken_in_every_phase() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        rig.effects.take_changed(|_| ());
        let vm = rig.vm.clone();
        let order = PageOrder::WriteAt {
            address: 0x1_0040,
            length: 64,
        };
        assert_eq!(
            ordered(&mut rig, &Ask::time_page(0x1_0040, 64)),
            Some(order)
        );
        let order = ordered(&mut rig, &Ask::time_page(!63, u64::MAX));
        assert!(matches!(order, Some(PageOrder::WriteAt { .. })));
        // Whatever the address.
        for address in [0, 1, u64::MAX] {
            let order = ordered(&mut rig, &Ask::time_page(address, 0));
            assert_eq!(order, Some(PageOrder::Stop));
        }
        assert_eq!(rig.vm, vm, "the VM does not know of it");
        assert_eq!(rig.effects.take_changed(|_| ()), None, "and no file has it");
    }
}

#[test]
fn a_page_that_is_too_short_or_not_aligned_is_einval() {
    let mut rig = Rig::paused(1);
    for length in [1, 32, 63] {
        assert_eq!(
            rig.refused(&Ask::time_page(0, length)),
            (Status::Invalid, 0)
        );
    }
    for address in [1, 8, 32, 63, 65, u64::MAX] {
        assert_eq!(
            rig.refused(&Ask::time_page(address, 64)),
            (Status::Invalid, 0)
        );
    }
    assert_eq!(rig.effects.page, None);
    // The epoch comes first.
    let stale = Ask::time_page(1, 64).in_epoch(9);
    assert_eq!(rig.refused(&stale), (Status::Stale, 0));
}

#[test]
fn the_numbers_of_the_pages_changes_are_left_to_the_shell() {
    for phase in PHASES {
        let page = Rig::in_phase(phase, 2).vm.time_page();
        assert_eq!((page.seq.get(), page.wake.get()), (0, 0), "{phase}");
    }
}

#[test]
fn the_shell_can_have_the_request_refused() {
    let mut rig = Rig::paused(1);
    rig.done(&Ask::time_page(0, 64));
    rig.vm.refuse(Status::Invalid, &mut rig.effects);
    assert_eq!(rig.effects.response[..4], 22_u32.to_le_bytes());
    assert_eq!(rig.effects.response.len(), 16);
    assert_eq!(rig.effects.response[8], 1, "the epoch");
}

#[test]
fn what_freezes_a_clock_that_counts_is_known_before() {
    for phase in PHASES {
        for ask in Ask::one_of_each(2) {
            let mut rig = Rig::in_phase(phase, 2);
            if phase == Phase::Running {
                rig.pause_counting();
            }
            for running in [false, true] {
                if running && phase == Phase::Running {
                    rig.resume();
                }
                let mut rig = rig.clone();
                let counting = |vm: &Vm, bit| vm.time_page().flags.get() & bit == 0;
                let before = [VIRT, PHYS].map(|bit| counting(&rig.vm, bit));
                let before = before.map(|counting| counting && rig.vm.phase() != Phase::New);
                let bytes = ask.bytes();
                let call = Incoming::parse(&bytes, ask.room, Token { queue: 1, head: 0 });
                let known = call.effect() == Effect::Freezes;
                rig.offer(&ask);
                let after = [VIRT, PHYS].map(|bit| counting(&rig.vm, bit));
                let froze = before.iter().zip(after).any(|(was, is)| *was && !is);
                // A count that does not depend on the instant: the VMM writes it, or it is that of
                // the VM from before a restore.
                let set_regs = Op::from(ask.op) == Op::SetRegs;
                let given = set_regs || Op::from(ask.op) == Op::RestoreAbort;
                assert!(!froze || known || given, "{phase} {ask:?}");
            }
        }
    }
}
