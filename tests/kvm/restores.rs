//! Restores, and pauses and resumes, of a guest whose every vCPU reads its counter without end.
//!
//! In each round one vCPU's thread is held back until the others have come as far as they can come
//! without it. So an order of threads that fails is not left to chance.

use vhost_user_timer_kit::qemu::Kernel;
use vhost_user_timer_kit::rounds::{Round, faults};

use crate::machine::{Machine, on};

/// vCPUs of the guest.
const VCPUS: usize = 4;

/// The rounds after the guest's boot of the VMM with these arguments.
fn rounds(machine: &mut Machine<'_>, command: &str, count: usize) -> Vec<Round> {
    let command = format!("vhost-user-timer-vmm {command} --vcpus {VCPUS} --rounds {count}");
    let mut rounds = machine.rounds(&command);
    rounds.retain(|round| round.how != "boot");
    assert_eq!(rounds.len(), count, "{command}");
    rounds
}

/// Asserts that nothing is wrong with any of these rounds, and prints what they show.
fn assert_right(what: &str, rounds: &[Round]) {
    let faults = rounds.iter().flat_map(|round| faults(round, VCPUS));
    let faults: Vec<_> = faults.collect();
    assert!(
        faults.is_empty(),
        "{what}: {} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
    let sum = |count: fn(&Round) -> u64| rounds.iter().map(count).sum::<u64>();
    println!(
        "{what}: {} rounds, {} readings, {} timer interrupts, nothing wrong",
        rounds.len(),
        sum(|round| round.vcpus.iter().map(|vcpu| vcpu.readings).sum()),
        sum(|round| round.vcpus.iter().map(|vcpu| vcpu.interrupts).sum()),
    );
}

#[test]
fn in_180_restores_no_vcpu_runs_before_the_offset_is_in_kvm() {
    on(Kernel::Newest, |machine| {
        let mut all = Vec::new();
        // Six guests, each with orders of its own.
        for seed in 10..16 {
            all.extend(rounds(machine, &format!("moves --seed {seed}"), 30));
        }
        assert_right("restores", &all);
        let stragglers: Vec<_> = all.iter().map(|round| round.order.last()).collect();
        for vcpu in 0..VCPUS as u32 {
            assert!(
                stragglers.contains(&Some(&vcpu)),
                "vCPU {vcpu} was never late"
            );
        }
    });
}

#[test]
fn in_20_restores_with_the_backend_killed_no_vcpu_runs_before_the_offset_is_in_kvm() {
    on(Kernel::Newest, |machine| {
        for (point, seed) in [("restoring", 2), ("armed", 3)] {
            let command = format!("moves --kill-backend {point} --seed {seed}");
            let rounds = rounds(machine, &command, 10);
            let killed = format!("backend-{point}");
            for round in &rounds {
                assert_eq!(round.killed.as_ref(), Some(&killed), "{round:?}");
            }
            assert_right(&format!("restores, {killed} killed"), &rounds);
        }
    });
}

#[test]
fn in_50_pauses_and_resumes_no_vcpu_runs_before_the_offset_is_in_kvm() {
    on(Kernel::Newest, |machine| {
        assert_right("pauses", &rounds(machine, "pauses --seed 4", 40));
        let kept = rounds(machine, "pauses --keep-counting --seed 5", 10);
        assert_right("pauses through which time goes on", &kept);
        // H − V moves by 0 ticks.
        for round in &kept {
            assert_eq!(round.cntvoff, kept[0].cntvoff);
        }
    });
}

#[test]
fn by_the_kernel_alone_counts_decrease() {
    on(Kernel::Newest, |machine| {
        for round in &rounds(machine, "moves --gate none --seed 6", 5) {
            assert!(round.decreases() > 0, "{round:?}");
        }
    });
}

#[test]
fn behind_a_gate_without_confirm_the_offset_comes_too_late() {
    on(Kernel::Newest, |machine| {
        for round in &rounds(machine, "moves --gate only --seed 7", 5) {
            assert!(round.decreases() > 0 || round.is_elsewhere(), "{round:?}");
            assert!(!round.refused.is_empty(), "{round:?}");
        }
    });
}

#[test]
fn the_same_holds_where_the_host_runs_at_el1() {
    on(Kernel::Nvhe, |machine| {
        assert_right("nVHE: restores", &rounds(machine, "moves --seed 8", 10));
        assert_right("nVHE: pauses", &rounds(machine, "pauses --seed 9", 5));
    });
}
