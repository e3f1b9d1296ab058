//! A guest that moves is right afterwards: in a row, while it is busy, by way of a file.

use std::time::Instant;

use vhost_user_timer_kit::qemu::{PATIENCE, Shape, TimerVm, environment};

use crate::judge::{Before, assert_gate, summary, watched};

/// MiB of memory that a busy guest writes to all the time.
const BUSY: u32 = 32;

/// Migrates the guest once, and checks all that must hold.
fn migrate(vm: &mut TimerVm, what: &str) {
    let before = Before::of(vm);
    let mut source = vm.migrate();
    let after = before.assert_right_since(vm);
    let paused = source.number("paused-count");
    let ticks = assert_gate(vm, paused);
    assert_eq!(vm.number("cntvoff"), 0);
    assert_eq!(vm.phase().unwrap(), "running");
    assert_eq!(vm.number("missing-vcpus"), 0);
    println!(
        "{what}: the guest stood still for {:?}, {ticks} ticks of it before the gate; {}",
        source.guest.qmp().downtime().unwrap(),
        summary(&after)
    );
}

#[test]
fn time_is_right_on_every_vcpu_after_each_of_twenty_migrations() {
    let Some(environment) = environment() else {
        return;
    };
    let mut vm = watched(&environment, &Shape::default());
    for number in 1..=20 {
        migrate(&mut vm, &format!("migration {number} of 20"));
    }
}

#[test]
fn time_is_right_after_migrations_of_a_guest_that_writes_to_its_memory() {
    let Some(environment) = environment() else {
        return;
    };
    let mut vm = TimerVm::boot(&environment, &Shape::default());
    vm.guest.start_witness(BUSY).unwrap();
    let mut passes = await_pass(&mut vm, 0);
    for number in 1..=3 {
        migrate(
            &mut vm,
            &format!("migration {number} of 3, {BUSY} MiB busy"),
        );
        passes = await_pass(&mut vm, passes);
    }
}

/// Waits until the guest has written to all of its memory more often than so many times. Returns
/// how often it has.
fn await_pass(vm: &mut TimerVm, passes: u64) -> u64 {
    let began = Instant::now();
    loop {
        let seen = vm.guest.witness().unwrap();
        let now = seen.iter().map(|seen| seen.passes).sum();
        if now > passes {
            return now;
        }
        assert!(began.elapsed() < PATIENCE, "no pass: {seen:?}");
    }
}

#[test]
fn time_is_right_in_a_guest_that_was_saved_to_a_file_and_loaded_twice() {
    let Some(environment) = environment() else {
        return;
    };
    let shape = Shape::default();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("guest");
    let mut vm = watched(&environment, &shape);
    let before = Before::of(&mut vm);
    vm.guest.save(&file).unwrap();
    let paused = vm.number("paused-count");
    drop(vm);
    // What happens to the first of them does not change the file.
    for number in 1..=2 {
        let mut vm = TimerVm::incoming(&environment, &shape);
        vm.guest.load(&file).unwrap();
        let after = before.assert_right_since(&mut vm);
        assert_gate(&mut vm, paused);
        assert_eq!(vm.number("cntvoff"), 0);
        println!("loaded, {number} of 2: {}", summary(&after));
    }
}
