//! What a stock QEMU does alone, by the same guest and the same witness.

use vhost_user_timer_kit::qemu::{ClockVm, Guest, Options, Transport, environment};

use crate::judge::{assert_right, await_all, summary};

/// Migrations in a row.
const MOVES: usize = 3;

/// The control: what the witness finds with this project's device is not of the witness's making,
/// nor of the way in which guests are moved here.
#[test]
fn a_guest_of_tcg_moves_and_its_counter_continues() {
    let Some(environment) = environment() else {
        return;
    };
    let options = Options::default().vcpus("cortex-a72", 4);
    let mut guest = Guest::boot(&environment, &options).unwrap();
    guest.start_witness(0).unwrap();
    for number in 1..=MOVES {
        let destination = Guest::start(&environment, &options.clone().incoming()).unwrap();
        let before = guest.witness().unwrap();
        let mut source = guest.migrate_to(destination).unwrap();
        let after = await_all(&mut guest, &before);
        assert_right(&before, &after);
        println!(
            "migration {number} of {MOVES}, stock QEMU: the guest stood still for {:?}; {}",
            source.qmp().downtime().unwrap(),
            summary(&after)
        );
    }
}

/// With the patches of `contrib/qemu` the same device migrates, and so do cross timestamps, which a
/// stock QEMU's guest does not have.
#[test]
fn a_guest_with_the_backends_clock_does_not_move_and_cannot_pair_it_with_its_counter() {
    let Some(environment) = environment() else {
        return;
    };
    let mut vm = ClockVm::boot(&environment, Transport::Pci, &["--rtc-clock=utc"]);
    assert_eq!(vm.run("guest precise ptp0"), "error=EOPNOTSUPP");
    let error = vm.guest.save("/dev/null".as_ref()).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("non-migratable device"), "{error}");
}
