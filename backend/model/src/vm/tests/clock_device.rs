//! What the clock device asks of the VM: the guest's counter, and whether a restore is open.

use vhost_user_timer_protocol::Phase;

use super::rig::{Ask, HZ, PHASES, Rig};
use crate::vm::{GuestCounter, ticks_of_ns};

#[test]
fn the_guests_counter_is_known_while_it_runs_and_only_then() {
    for phase in PHASES {
        let mut rig = Rig::in_phase(phase, 2);
        rig.pass(5);
        let expected = match phase {
            Phase::New => GuestCounter::Unconfigured,
            Phase::Paused | Phase::Restoring | Phase::Armed => GuestCounter::Stopped,
            Phase::Running => GuestCounter::Running(rig.virt()),
        };
        assert_eq!(rig.vm.guest_counter(rig.now), expected);
    }
}

#[test]
fn an_open_restore_says_who_is_missing_and_how_long_it_has_left() {
    let mut rig = Rig::paused(2);
    assert_eq!(rig.vm.open_restore(rig.now), None);
    rig.done(&Ask::begin(2, 0));
    let open = rig.vm.open_restore(rig.now).unwrap();
    assert_eq!(
        (open.overdue, open.ticks_left, open.missing),
        (false, None, 2)
    );

    rig.done(&Ask::begin_with(2, 0, 0, 1_000));
    rig.bring(1, 5);
    rig.restored(1);
    rig.drift(ticks_of_ns(400, HZ));
    let open = rig.vm.open_restore(rig.now).unwrap();
    assert_eq!((open.overdue, open.missing), (false, 1));
    assert_eq!(open.ticks_left, Some(ticks_of_ns(600, HZ)));
    // Whether or not the VM was advanced to this time.
    rig.drift(HZ);
    for _ in 0..2 {
        let open = rig.vm.open_restore(rig.now).unwrap();
        assert_eq!((open.overdue, open.ticks_left), (true, None));
        rig.pass(1);
    }
    rig.bring(0, 5);
    rig.restored(0);
    assert_eq!(rig.vm.open_restore(rig.now), None);
}
