//! vCPUs that are off, resets of the guest, a VMM that dies, and a KVM that takes no offset.

use serde_json::Value;
use vhost_user_timer_kit::qemu::Kernel;

use crate::machine::{Machine, on};

/// The lines that a command of the VMM prints. The last one, the verdict, must be that all of the
/// rounds were good.
fn good_rounds(machine: &mut Machine<'_>, command: &str) -> Vec<Value> {
    let output = machine.output(&format!("vhost-user-timer-vmm {command}"));
    let lines = output.lines().filter(|line| line.starts_with('{'));
    let mut rounds: Vec<Value> = lines
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let verdict = rounds.pop().expect("a verdict");
    assert_eq!(verdict["event"], "verdict", "{command}: {output}");
    assert_eq!(verdict["rounds"], rounds.len(), "{command}: {output}");
    for wrong in ["bad_rounds", "refused", "ran_before_confirmation"] {
        assert_eq!(verdict[wrong], 0, "{command}: {output}");
    }
    rounds
}

/// What was before each round, which of its vCPUs were on at its end, and how often each had begun
/// at its entry by then.
fn story(rounds: &[Value]) -> Vec<(&str, Vec<bool>, Vec<u64>)> {
    let vcpus = |round: &Value| round["vcpus"].as_array().expect("vCPUs").clone();
    let on = |vcpu: Value| vcpu["on"].as_bool().expect("a bool");
    let starts = |vcpu: Value| vcpu["starts"].as_u64().expect("a number");
    rounds
        .iter()
        .map(|round| {
            let how = round["how"].as_str().expect("a text");
            let on = vcpus(round).into_iter().map(on).collect();
            (how, on, vcpus(round).into_iter().map(starts).collect())
        })
        .collect()
}

#[test]
fn a_vcpu_that_is_off_is_restored_with_the_others_and_a_reset_leaves_time_alone() {
    on(Kernel::Newest, |machine| {
        let rounds = good_rounds(machine, "lifecycle --vcpus 3");
        let expected = [
            ("boot", [true, true, true], [1, 1, 1]),
            ("off", [true, true, false], [1, 1, 1]),
            ("resume", [true, true, false], [1, 1, 1]),
            ("restore", [true, true, false], [1, 1, 1]),
            ("on", [true, true, true], [1, 1, 2]),
            ("resetting", [true, true, true], [1, 1, 2]),
            ("reset", [true, true, true], [2, 2, 3]),
            ("restore", [true, true, true], [2, 2, 3]),
        ];
        let expected = expected.map(|(how, on, starts)| (how, on.to_vec(), starts.to_vec()));
        assert_eq!(story(&rounds), expected);
    });
}

#[test]
fn another_vmm_restores_the_vm_with_the_backend_of_one_that_died() {
    on(Kernel::Newest, |machine| {
        for point in ["restoring", "armed", "running"] {
            let rounds = good_rounds(machine, &format!("moves --rounds 2 --die {point}"));
            for round in &rounds[1..] {
                assert_eq!(round["killed"], format!("vmm-{point}"));
                // The restore of the VMM that died was the second epoch of this backend.
                assert_eq!(round["epoch"], 3, "{round}");
            }
        }
    });
}

#[test]
fn a_kvm_that_takes_no_offset_is_given_the_counts_before_any_vcpu_runs() {
    on(Kernel::Bookworm, |machine| {
        for command in ["moves --rounds 5", "pauses --rounds 5"] {
            let rounds = good_rounds(machine, &format!("{command} --gate best-effort"));
            let ahead: Vec<_> = rounds.iter().map(|round| &round["ahead"]).collect();
            println!("{command}: KVM's count is ahead by at least and at most, ticks: {ahead:?}");
        }
    });
}
