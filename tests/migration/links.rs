//! The ways in which QEMU reaches the backend.

use vhost_user_timer_kit::qemu::{Link, Shape, TimerVm, environment};

use crate::judge::Before;

#[test]
fn a_guest_runs_stops_and_moves_by_each_link_to_a_backend() {
    let Some(environment) = environment() else {
        return;
    };
    for link in Link::ALL {
        let mut vm = TimerVm::boot(&environment, &Shape::default().link(link));
        vm.guest.start_witness(0).unwrap();
        let before = Before::of(&mut vm);
        vm.guest.qmp().stop().unwrap();
        vm.guest.qmp().cont().unwrap();
        before.assert_right_since(&mut vm);
        let before = Before::of(&mut vm);
        vm.migrate();
        before.assert_right_since(&mut vm);
        assert_eq!(vm.phase().unwrap(), "running", "{link:?}");
        // QEMU has a process to name only where it has launched one.
        let pid = vm.property("backend-pid");
        assert_eq!(pid.is_ok(), link == Link::Program, "{link:?}: {pid:?}");
    }
}
