//! A Linux guest of QEMU on KVM, whose timers the backend keeps: what the witness in it sees.
//! `make kvm-qemu` runs this in an emulated machine.

use std::time::Duration;

use vhost_user_timer_kit::qemu::{
    Environment, Guest, LIBRARY_VARIABLE, Options, Shape, TimerVm, environment, timer_library,
};

use crate::judge::{Before, assert_gate, assert_right, await_all, last, summary};

#[allow(dead_code, reason = "the tests under TCG use all of it")]
#[path = "../migration/judge.rs"]
mod judge;

/// Booting by an emulated KVM takes minutes on a busy machine.
const BOOT: Duration = Duration::from_secs(600);

/// Four vCPUs on this machine's KVM.
fn machine(options: Options) -> Options {
    options.kvm(4).boot_limit(BOOT).life_limit(2 * BOOT)
}

fn shape() -> Shape {
    Shape::default()
        .machine(machine)
        .backend_arg("--counter-source=cntvct")
}

/// Checks what the guest has seen since `before`: time in order, nobody before the gate, and both
/// counts with one offset.
fn check(before: &Before, vm: &mut TimerVm, paused: u64, what: &str) {
    let after = before.assert_right_since(vm);
    let gate = assert_gate(vm, paused);
    assert_eq!(vm.phase().unwrap(), "running");
    assert_eq!(vm.number("cntpoff"), vm.number("cntvoff"));
    println!("{what}: {gate} ticks before the gate; {}", summary(&after));
}

#[test]
fn time_stands_still_while_the_guest_is_stopped() {
    let environment = environment().unwrap();
    let mut vm = TimerVm::boot(&environment, &shape());
    vm.guest.start_witness(0).unwrap();
    for number in 1..=10 {
        let before = Before::of(&mut vm);
        vm.guest.qmp().stop().unwrap();
        let paused = vm.number("paused-count");
        vm.guest.qmp().cont().unwrap();
        check(
            &before,
            &mut vm,
            paused,
            &format!("stop and cont {number} of 10"),
        );
    }
}

#[test]
fn time_is_right_on_every_vcpu_after_each_of_five_migrations() {
    let environment = environment().unwrap();
    let mut vm = TimerVm::boot(&environment, &shape());
    vm.guest.start_witness(0).unwrap();
    for number in 1..=5 {
        let before = Before::of(&mut vm);
        let mut source = vm.migrate();
        let paused = source.number("paused-count");
        check(
            &before,
            &mut vm,
            paused,
            &format!("migration {number} of 5"),
        );
    }
}

/// Stops and migrates a guest of the same QEMU without the device. Its count is what QEMU writes
/// into KVM for each vCPU (`kvm-adjvtime`, the default).
#[test]
fn what_qemu_does_alone_keeps_the_order_of_time() {
    let environment = environment().unwrap();
    let options = alone(&environment);
    let mut guest = Guest::boot(&environment, &options).unwrap();
    guest.start_witness(0).unwrap();
    for number in 1..=5 {
        let before = guest.witness().unwrap();
        guest.qmp().stop().unwrap();
        guest.qmp().cont().unwrap();
        let after = await_all(&mut guest, &before);
        assert_right(&before, &after);
        println!("alone, stop and cont {number} of 5: {}", summary(&after));
    }
    for number in 1..=5 {
        let destination = Guest::start(&environment, &options.clone().incoming()).unwrap();
        let before = guest.witness().unwrap();
        let mut source = guest.migrate_to(destination).unwrap();
        let after = await_all(&mut guest, &before);
        assert_right(&before, &after);
        let downtime = source.qmp().downtime().unwrap();
        println!(
            "alone, migration {number} of 5: stood still for {downtime:?}, the guest's count moved by {}; {}",
            last(&after) - last(&before),
            summary(&after)
        );
    }
}

fn alone(environment: &Environment) -> Options {
    machine(Options::default())
        .program(environment.patched_qemu())
        .variable(LIBRARY_VARIABLE, timer_library().unwrap())
}
