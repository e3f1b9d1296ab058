//! What a stock QEMU does alone, by the same guest and the same witness.

use vhost_user_timer_kit::qemu::{Guest, Options, environment};

use crate::judge::{assert_right, lateness};

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
        let after = guest.witness().unwrap();
        assert_right(&before, &after);
        println!(
            "migration {number} of {MOVES}, stock QEMU: the guest stood still for {:?}; {}",
            source.qmp().downtime().unwrap(),
            lateness(&after)
        );
    }
}
