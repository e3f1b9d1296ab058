//! What the page says.

use vhost_user_timer_kit::contract::{CNT, CTL, CVAL, PCNT, VM, op, phase, restore, status, words};

use super::{AT, PHYS, Page, VIRT, order};
use crate::world::{HZ, PHASES, Vm, World};

scenarios! {
    both {
        the_page_says_phase_epoch_frequency_and_clocks_in_every_phase: "9.20" "9.21" "9.35";
        in_new_there_is_no_clock_and_the_page_is_zero_but_for_epoch_and_frequency: "9.30";
        the_page_follows_every_change_of_a_clock: "9.20" "9.21" "9.25";
        the_page_says_running_only_after_the_last_restore_done: "9.27";
        a_write_of_ctl_or_cval_and_a_read_change_no_field: "9.21";
        a_page_that_is_too_short_or_not_aligned_is_einval: "9.3" "9.4" "2.50";
    }
}

fn named(mut vm: Vm) -> Vm {
    vm.vm(op::SET_TIME_PAGE, &order(AT, 64)).ok(0);
    vm
}

fn page(vm: &mut Vm) -> Page {
    Page::of(&vm.driver.page(AT)).content()
}

/// The page says what GET_INFO answers, now and later.
#[track_caller]
fn agrees(vm: &mut Vm) -> Page {
    let said = page(vm);
    for _ in 0..2 {
        let info = vm.info();
        match info.phase {
            phase::NEW => {}
            _ => said.agrees(&info),
        }
        vm.pass(12_345);
        assert_eq!(page(vm), said, "time alone changes nothing");
    }
    said
}

fn the_page_says_phase_epoch_frequency_and_clocks_in_every_phase(on: World) {
    for wanted in PHASES {
        let mut vm = named(on.in_phase(wanted, 2));
        let said = agrees(&mut vm);
        let flags = match wanted {
            phase::NEW | phase::RUNNING | phase::ARMED => 0,
            // Passed through.
            phase::PAUSED => VIRT,
            _ => VIRT | PHYS,
        };
        let epoch = vm.epoch();
        assert_eq!(
            (said.phase, said.frequency, said.flags),
            (wanted, HZ, flags)
        );
        assert_eq!(said.epoch, epoch);
    }
}

fn in_new_there_is_no_clock_and_the_page_is_zero_but_for_epoch_and_frequency(on: World) {
    let mut bytes = [0; 64];
    bytes[8] = 1;
    bytes[32..40].copy_from_slice(&HZ.to_le_bytes());
    let mut vm = named(on.fresh());
    assert_eq!(page(&mut vm), Page::of(&bytes));
}

fn the_page_follows_every_change_of_a_clock(on: World) {
    let mut vm = named(on.paused(2));
    vm.set(1, &[(CNT, 1 << 40)]);
    assert_eq!(agrees(&mut vm).virt_count, 1 << 40);
    vm.set(0, &[(PCNT, 7)]);
    assert_eq!(agrees(&mut vm).phys_count, 7);
    vm.pass(99);
    let run = vm.resume();
    let said = agrees(&mut vm);
    assert_eq!((said.cntvoff, said.cntpoff), (run.cntvoff, run.cntpoff));
    vm.pause_counting();
    assert_eq!(agrees(&mut vm).flags, 0, "paused, and counting");
    vm.set_offset(5);
    assert_eq!(agrees(&mut vm).cntvoff, 5);
    vm.restore_begin(2, 0);
    assert_eq!(agrees(&mut vm).epoch, 2);
    vm.abort();
    assert_eq!(agrees(&mut vm).flags, 0);
}

fn the_page_says_running_only_after_the_last_restore_done(on: World) {
    let mut vm = named(on.restoring(3, restore::AUTORUN));
    for vcpu in 0..3 {
        assert_eq!(page(&mut vm).phase, phase::RESTORING);
        vm.bring(vcpu, 1_000 + u64::from(vcpu));
        if vcpu < 2 {
            vm.restore_done(vcpu);
        }
    }
    let waiter = vm.wait(0);
    let (_, released) = vm.releasing((op::RESTORE_DONE, 2, &[]), &[waiter]);
    let run = vhost_user_timer_kit::contract::Run::of(released[0].ok(40));
    let said = page(&mut vm);
    assert_eq!((said.phase, said.cntvoff), (phase::RUNNING, run.cntvoff));
    assert_eq!(run.host_count.wrapping_sub(said.cntvoff), 1_002);
}

fn a_write_of_ctl_or_cval_and_a_read_change_no_field(on: World) {
    for wanted in [phase::PAUSED, phase::RUNNING, phase::RESTORING] {
        let mut vm = named(on.in_phase(wanted, 2));
        let said = page(&mut vm);
        vm.set(0, &[(CTL, 1), (CVAL, 9)]);
        vm.get_all(0);
        vm.state();
        assert_eq!(page(&mut vm), said, "{wanted}");
    }
}

fn a_page_that_is_too_short_or_not_aligned_is_einval(on: World) {
    let mut vm = named(on.paused(1));
    let einval = (status::EINVAL, 0);
    for length in [1, 32, 63] {
        assert_eq!(
            vm.refused(op::SET_TIME_PAGE, VM, &order(AT, length)),
            einval
        );
    }
    for address in [1, 8, 32, 63, 65, u64::MAX] {
        assert_eq!(
            vm.refused(op::SET_TIME_PAGE, VM, &order(address, 64)),
            einval
        );
    }
    // The epoch comes first.
    let stale = vm.ask(op::SET_TIME_PAGE, VM, 9, &words(&[1, 64]));
    assert_eq!(stale.outcome(), (status::ESTALE, 0));
    // The page that was named goes on.
    vm.resume();
    assert_eq!(page(&mut vm).phase, phase::RUNNING);
}
