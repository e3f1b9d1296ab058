//! SPEC.md, "Time page": what it says. That it is written is the device's, and tested there.

use vhost_user_timer_protocol::wire::{Page, page_flags};
use vhost_user_timer_protocol::{Phase, Register, Status};

use super::rig::{Ask, HZ, PHASES, Rig};
use crate::vm::{Effect, Incoming, PageOrder, Timeline, Token, Vm};

const VIRT: u32 = page_flags::VIRT_FROZEN;
const PHYS: u32 = page_flags::PHYS_FROZEN;

/// What the page tells of a clock at the rig's instant.
fn count(rig: &Rig, clock: Timeline) -> u64 {
    let page = rig.vm.time_page();
    let (frozen, count, offset) = match clock {
        Timeline::Virtual => (VIRT, page.virt_count, page.cntvoff),
        Timeline::Physical => (PHYS, page.phys_count, page.cntpoff),
    };
    match page.flags.get() & frozen {
        0 => {
            assert_eq!(count.get(), 0, "the count of a clock that counts");
            rig.now.host.wrapping_sub(offset.get())
        }
        _ => {
            assert_eq!(offset.get(), 0, "the offset of a frozen clock");
            count.get()
        }
    }
}

/// The page tells the VM that GET_INFO tells, now and later.
fn agrees(rig: &mut Rig) {
    for _ in 0..2 {
        let page = rig.vm.time_page();
        let info = rig.info();
        assert_eq!((page.seq.get(), page.wake.get()), (0, 0));
        assert_eq!(page.phase, info.phase);
        assert_eq!(page.epoch, info.epoch);
        assert_eq!(page.frequency, info.frequency);
        for clock in Timeline::ALL {
            assert_eq!(count(rig, clock), rig.count(clock), "{clock:?}");
        }
        rig.pass(12_345);
        assert_eq!(page, rig.vm.time_page(), "time alone changes nothing");
    }
}

#[test]
fn the_page_tells_phase_epoch_frequency_and_clocks_in_every_phase() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        agrees(&mut rig);
        let page = rig.vm.time_page();
        assert_eq!(page.phase.get(), phase.code());
        assert_eq!(page.frequency.get(), HZ);
        let flags = match phase {
            Phase::New | Phase::Running => 0,
            // Passed through.
            Phase::Paused => VIRT,
            Phase::Restoring => VIRT | PHYS,
        };
        assert_eq!(page.flags.get(), flags, "{phase}");
    }
}

#[test]
fn in_new_there_is_no_clock_and_the_page_is_all_zero_but_for_epoch_and_frequency() {
    let page = Page {
        epoch: 1.into(),
        frequency: HZ.into(),
        ..Page::default()
    };
    assert_eq!(Rig::new().vm.time_page(), page);
}

#[test]
fn the_page_follows_every_change_of_a_clock() {
    let mut rig = Rig::paused(2);
    rig.set(1, &[(Register::TimerCnt, 1 << 40)]);
    agrees(&mut rig);
    assert_eq!(rig.vm.time_page().virt_count.get(), 1 << 40);
    rig.set(0, &[(Register::PtimerCnt, 7)]);
    agrees(&mut rig);
    assert_eq!(rig.vm.time_page().phys_count.get(), 7);
    rig.drift(99);
    let run = rig.resume();
    agrees(&mut rig);
    assert_eq!(rig.vm.time_page().cntvoff, run.cntvoff);
    assert_eq!(rig.vm.time_page().cntpoff, run.cntpoff);
    rig.pause_counting();
    agrees(&mut rig);
    assert_eq!(rig.vm.time_page().flags.get(), 0, "paused, and counting");
    rig.done(&Ask::set_offset(5));
    agrees(&mut rig);
    assert_eq!(rig.vm.time_page().cntvoff.get(), 5);
    rig.done(&Ask::begin(2, 0));
    agrees(&mut rig);
    assert_eq!(rig.vm.time_page().epoch.get(), 2);
    rig.done(&Ask::abort());
    agrees(&mut rig);
    assert_eq!(rig.vm.time_page().flags.get(), 0);
}

#[test]
fn the_page_says_running_only_after_the_last_restore_done() {
    let mut rig = Rig::restoring(3, 1);
    for vcpu in 0..3 {
        assert_eq!(rig.vm.time_page().phase.get(), Phase::Restoring.code());
        rig.bring(vcpu, 1000 + u64::from(vcpu));
        rig.restored(vcpu);
    }
    let page = rig.vm.time_page();
    assert_eq!(page.phase.get(), Phase::Running.code());
    assert_eq!(rig.now.host.wrapping_sub(page.cntvoff.get()), 1002);
}

#[test]
fn a_write_of_ctl_or_cval_and_a_read_change_no_field() {
    for phase in [Phase::Paused, Phase::Running, Phase::Restoring] {
        let mut rig = Rig::in_phase(phase, 2);
        let page = rig.vm.time_page();
        rig.set(0, &[(Register::TimerCtl, 1), (Register::TimerCval, 9)]);
        rig.get_all(0);
        rig.done(&Ask::get_vm(0, 2));
        assert_eq!(rig.vm.time_page(), page, "{phase}");
    }
}

fn ordered(rig: &mut Rig, ask: &Ask) -> Option<PageOrder> {
    rig.done(ask);
    rig.effects.page.take()
}

#[test]
fn set_time_page_is_taken_in_every_phase() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        rig.effects.changed.clear();
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
        assert!(!rig.effects.changed.any(), "and no file has it");
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
                // The VMM sets a clock to another count by writing it.
                let written = ask.op == 0x0012;
                assert!(!froze || known || written, "{phase} {ask:?}");
            }
        }
    }
}
