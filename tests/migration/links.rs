//! The ways in which QEMU reaches the backend.

use vhost_user_timer_kit::qemu::{Link, Shape, environment};

use crate::judge::{Before, watched};

#[test]
fn a_guest_runs_stops_and_moves_by_each_link_to_a_backend() {
    let Some(environment) = environment() else {
        return;
    };
    for link in Link::ALL {
        let mut vm = watched(&environment, &Shape::default().link(link));
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
