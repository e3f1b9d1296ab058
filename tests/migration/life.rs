//! What else happens to a guest: it is stopped, it is reset, its vCPUs go offline.

use vhost_user_timer_kit::qemu::{Seen, Shape, TimerVm, environment};

use crate::judge::{Before, assert_gate, await_all, last, summary, watched};

/// A first count that is far from QEMU's own, so that a vCPU without the VM's offset shows.
const INITIAL: u64 = 1 << 40;

#[test]
fn time_stands_still_while_the_guest_is_stopped() {
    let Some(environment) = environment() else {
        return;
    };
    let mut vm = watched(&environment, &Shape::default());
    for _ in 0..10 {
        let before = Before::of(&mut vm);
        vm.guest.qmp().stop().unwrap();
        assert_eq!(vm.phase().unwrap(), "paused");
        let paused = vm.number("paused-count");
        vm.guest.qmp().cont().unwrap();
        assert_eq!(vm.phase().unwrap(), "running");
        let after = before.assert_right_since(&mut vm);
        assert_gate(&mut vm, paused);
        assert_eq!(vm.number("cntvoff"), 0);
        println!("stop and cont: {}", summary(&after));
    }
}

/// The judge of the gate can find a vCPU that has run: between two reports all have.
#[test]
fn a_reading_before_the_gate_would_be_found() {
    let Some(environment) = environment() else {
        return;
    };
    let mut vm = watched(&environment, &Shape::default());
    let before = Before::of(&mut vm);
    let after = before.assert_right_since(&mut vm);
    let (from, to) = (last(before.seen()), last(&after) + 1);
    let gaps = vm.guest.gaps_around(from, to).unwrap();
    assert_eq!(gaps, [None; 4]);
}

/// Takes each vCPU but the first offline and online again.
fn cycle_cpus(vm: &mut TimerVm) {
    let before = Before::of(vm);
    for cpu in 1..4 {
        let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        vm.run(&format!("echo 0 >{online}"));
        vm.run(&format!("echo 1 >{online}"));
    }
    let after = before.assert_right_since(vm);
    assert!(after.iter().all(|seen| seen.last > INITIAL), "{after:?}");
}

/// Reboots the guest, whose counter must continue.
fn reboot(vm: &mut TimerVm) {
    let before = vm.guest.witness().unwrap();
    vm.guest.reboot().unwrap();
    vm.guest.await_ready().unwrap();
    vm.guest.start_witness(0).unwrap();
    // Each vCPU has read its counter: this is another witness, which had seen nothing.
    let after = await_all(&mut vm.guest, &[Seen::default(); 4]);
    for seen in &after {
        assert_eq!((seen.below_own, seen.below_other), (0, 0), "{seen:?}");
        assert!(seen.last > last(&before), "{before:?} {seen:?}");
    }
}

#[test]
fn an_offset_outlives_reboots_and_vcpus_that_go_offline() {
    let Some(environment) = environment() else {
        return;
    };
    let shape = Shape::default().property(&format!("x-initial-count={INITIAL}"));
    let mut vm = watched(&environment, &shape);
    for _ in 0..2 {
        assert_ne!(vm.number("cntvoff"), 0);
        cycle_cpus(&mut vm);
        reboot(&mut vm);
        cycle_cpus(&mut vm);
        let before = Before::of(&mut vm);
        let offset = vm.number("cntvoff");
        vm.migrate();
        before.assert_right_since(&mut vm);
        println!(
            "offset {offset:#x} before, {:#x} after",
            vm.number("cntvoff")
        );
    }
    vm.guest.reset().unwrap();
    vm.guest.await_ready().unwrap();
    vm.guest.start_witness(0).unwrap();
    cycle_cpus(&mut vm);
}
