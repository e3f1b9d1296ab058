//! The model check of the VM's time, and the proof that it can fail.
//!
//! `model-check` explores more than these tests do; see its `--help`.

use vhost_user_timer_model::vm::Vm;
use vhost_user_timer_tools::model::device::{self, Device};
use vhost_user_timer_tools::model::limits::Limits;
use vhost_user_timer_tools::model::mutant::{Fault, Mutant};
use vhost_user_timer_tools::model::run::{Effort, Verdict, check};
use vhost_user_timer_tools::model::{
    CONFIRMED, FORWARD, GATE, IN_TIME, NOT_FALSELY, ONE_OFFSET, ONE_RUN, OPENS, RECORDED, REPORTED,
    SETTLED,
};

fn explore(limits: Limits, device: impl Device) -> Verdict {
    check(limits, device, Effort::WHOLE, |_| {})
}

fn real(vcpus: u32) -> Vm {
    Vm::new(device::profile(vcpus))
}

/// Nothing failed, everything was explored, and whatever must be possible was reached.
fn assert_whole(verdict: &Verdict) {
    assert!(verdict.failures.is_empty(), "{:#?}", verdict.failures);
    assert!(verdict.exhaustive);
    assert_eq!(
        verdict.never, [""; 0],
        "must be possible, but is never reached"
    );
}

#[test]
fn the_real_vm_keeps_every_promise_with_three_vcpus() {
    let verdict = explore(Limits::SMALL, real(3));
    assert_whole(&verdict);
}

#[test]
fn the_real_vm_keeps_every_promise_with_one_vcpu_and_more_of_everything() {
    let limits = Limits {
        vcpus: 1,
        ticks: 2,
        disturbances: 3,
        ..Limits::SMALL
    };
    let verdict = explore(limits, real(1));
    assert!(verdict.ok(), "{verdict:#?}");
}

#[test]
fn the_real_vm_keeps_every_promise_to_a_vmm_that_confirms() {
    let verdict = explore(Limits::SMALL.confirming(), real(3));
    assert_whole(&verdict);
}

#[test]
fn the_real_vm_keeps_every_promise_with_one_offset_for_both_counts() {
    let limits = Limits {
        vcpus: 2,
        one_offset: true,
        ..Limits::SMALL.confirming()
    };
    let verdict = explore(limits, real(2));
    assert!(verdict.failures.is_empty(), "{:#?}", verdict.failures);
    assert!(verdict.exhaustive);
}

#[test]
fn a_check_that_was_stopped_does_not_claim_to_be_exhaustive() {
    let states = Effort {
        max_states: Some(1_000),
        ..Effort::WHOLE
    };
    let depth = Effort {
        max_depth: Some(3),
        ..Effort::WHOLE
    };
    for effort in [states, depth] {
        let verdict = check(Limits::SMALL, real(3), effort, |_| {});
        assert!(!verdict.exhaustive);
    }
}

// Limits within which each fault shows.

const ONE_TICK: Limits = Limits {
    ticks: 1,
    ..Limits::QUIET
};

const ONE_RESTORE: Limits = Limits {
    begins: 1,
    ..Limits::QUIET
};

/// Checks that a fault is caught within these limits, and by this property: no other property
/// fails in fewer steps.
fn caught(fault: Fault, limits: Limits, by: &str) {
    let verdict = explore(limits, Mutant::new(limits.vcpus, fault));
    let first = verdict.failures.first().expect("the fault is caught");
    let soonest = first.trace.len();
    let failures = verdict.failures.iter();
    let failing: Vec<_> = failures
        .filter(|failure| failure.trace.len() == soonest)
        .map(|failure| failure.property)
        .collect();
    let (states, trace) = (verdict.states, first.trace.join("\n"));
    println!("{fault:?} breaks {failing:?} after {states} states:\n{trace}");
    assert!(failing.contains(&by), "{fault:?} breaks {failing:?}");
    // The limits are not the reason: the real backend holds within them.
    let verdict = explore(limits, real(limits.vcpus));
    assert!(verdict.failures.is_empty(), "{:#?}", verdict.failures);
}

#[test]
fn a_gate_that_opens_when_one_vcpu_is_missing_is_caught() {
    caught(Fault::OpensOneEarly, ONE_RESTORE, GATE);
}

#[test]
fn old_dones_that_count_in_a_new_epoch_are_caught() {
    let two_restores = Limits {
        begins: 2,
        ..Limits::QUIET
    };
    caught(Fault::KeepsOldDones, two_restores, GATE);
}

#[test]
fn a_last_count_that_wins_is_caught() {
    caught(Fault::LastCountWins, ONE_RESTORE, FORWARD);
    caught(Fault::LastCountWins, ONE_RESTORE, SETTLED);
}

#[test]
fn an_offset_per_vcpu_is_caught() {
    caught(Fault::OffsetPerVcpu, ONE_RESTORE, ONE_OFFSET);
}

#[test]
fn different_answers_to_vcpus_released_together_are_caught() {
    caught(Fault::AnswersDiffer, Limits::QUIET, ONE_RUN);
}

#[test]
fn a_count_that_changes_under_running_vcpus_is_caught() {
    let one_count = Limits {
        counts: 1,
        ..Limits::QUIET
    };
    caught(Fault::CountWhileRunning, one_count, ONE_OFFSET);
}

#[test]
fn a_masked_timer_that_fires_is_caught() {
    caught(Fault::FiresMasked, ONE_TICK, NOT_FALSELY);
}

#[test]
fn a_timer_that_is_reported_twice_is_caught() {
    caught(Fault::TellsTwice, ONE_TICK, REPORTED);
}

#[test]
fn a_timer_that_is_never_reported_is_caught() {
    caught(Fault::LosesEvent, ONE_TICK, REPORTED);
}

#[test]
fn a_timer_that_is_forgotten_over_a_restart_is_caught() {
    let one_restart = Limits {
        restarts: 1,
        ..ONE_TICK
    };
    caught(Fault::ForgetsOverRestart, one_restart, IN_TIME);
}

#[test]
fn a_backend_that_oversleeps_is_caught() {
    caught(Fault::Oversleeps, ONE_TICK, IN_TIME);
}

#[test]
fn a_restore_that_cannot_be_completed_after_its_time_out_is_caught() {
    let one_long_restore = Limits {
        ticks: 1,
        ..ONE_RESTORE
    };
    caught(Fault::GivesUp, one_long_restore, OPENS);
}

#[test]
fn a_waiter_that_is_forgotten_is_caught() {
    caught(Fault::LosesWaiter, Limits::QUIET, OPENS);
}

#[test]
fn a_change_that_is_missing_in_the_state_file_is_caught() {
    caught(Fault::KeepsFromStateFile, ONE_RESTORE, RECORDED);
}

#[test]
fn a_gate_that_opens_when_the_offsets_are_decided_is_caught() {
    let resumes = Limits::QUIET.confirming();
    caught(Fault::ReleasesAtArmed, resumes, CONFIRMED);
    caught(Fault::ReleasesAtArmed, ONE_RESTORE.confirming(), CONFIRMED);
}

#[test]
fn a_confirmation_of_other_offsets_that_opens_the_gate_is_caught() {
    let one_pause = Limits {
        pauses: 1,
        ..ONE_TICK
    };
    caught(Fault::TakesAnyOffsets, one_pause.confirming(), CONFIRMED);
}

#[test]
fn a_vmm_that_writes_a_count_wakes_its_vcpu_and_goes_on_to_the_next_is_caught() {
    let confirming = ONE_TICK.confirming();
    caught(Fault::ResumeLoop, confirming, ONE_OFFSET);
    caught(Fault::ResumeLoop, confirming, FORWARD);
}
