//! A Linux guest of QEMU on KVM, whose timers the backend keeps: what the witness in it sees.
//! `make kvm-qemu` runs this in an emulated machine.

use std::time::{Duration, Instant};

use vhost_user_timer_kit::qemu::{Options, Seen, Shape, TimerVm, environment};

use crate::judge::{assert_gate, assert_right, await_all, last, summary};

#[allow(dead_code, reason = "the tests under TCG use all of it")]
#[path = "../migration/judge.rs"]
mod judge;

/// Booting by an emulated KVM takes minutes on a busy machine.
const BOOT: Duration = Duration::from_secs(600);

/// Four vCPUs on this machine's KVM.
fn shape() -> Shape {
    let machine = |options: Options| options.kvm(4).boot_limit(BOOT).life_limit(2 * BOOT);
    Shape::default()
        .machine(machine)
        .backend_arg("--counter-source=cntvct")
}

/// What the guest had seen, and when.
struct Before {
    seen: Vec<Seen>,
    at: Instant,
}

impl Before {
    fn of(vm: &mut TimerVm) -> Self {
        let at = Instant::now();
        let seen = vm.guest.witness().unwrap();
        Before { seen, at }
    }

    /// Checks what the guest has seen since: a counter that never decreased, that nobody read
    /// before the gate, and that has not advanced by more than this machine's time.
    fn check(&self, vm: &mut TimerVm, paused: u64, what: &str) {
        let after = await_all(&mut vm.guest, &self.seen);
        let elapsed = self.at.elapsed();
        assert_right(&self.seen, &after);
        let gate = assert_gate(vm, paused);
        let ticks = u128::from(last(&after) - last(&self.seen));
        let frequency = u128::from(vm.number("frequency"));
        let limit = elapsed.as_nanos() * frequency / 1_000_000_000;
        assert!(
            ticks <= limit,
            "{ticks} ticks of the guest in {limit} of the host"
        );
        assert_eq!(vm.phase().unwrap(), "running");
        assert_eq!(vm.number("cntpoff"), vm.number("cntvoff"));
        println!("{what}: {gate} ticks before the gate; {}", summary(&after));
    }
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
        before.check(&mut vm, paused, &format!("stop and cont {number} of 10"));
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
        before.check(&mut vm, paused, &format!("migration {number} of 5"));
    }
}
