//! The last metre against a fake backend: when offsets are applied, how often, by whom, and who
//! learns that they were not.

use std::error::Error as _;
use std::io;
use std::sync::Mutex;
use std::thread;

use crate::LONG;
use crate::SHORT;
use crate::fake;
use crate::fake::model::{Lost, Rig, VCPUS};
use crate::pace::{waiting, within_some_limit};
use crate::reconnect;
use crate::restore::{at_the_gate, release, saved};
use vhost_user_timer_frontend::{
    ApplyError, CounterSource, Deadline, Error, Frontend, Info, InvalidArgument, Op, Operation,
    Options, OtherCounter, Phase, Restore, RestoreOptions, Status, VcpuRestore, VmOptions,
};

type Applied = Result<(), ApplyError>;
type Call = fn(&Frontend) -> Result<(), Error>;

/// A VM that confirms, and a restore in it. With reconnecting.
fn opened() -> (Rig, Frontend, Restore) {
    let (rig, frontend) = Rig::confirming(reconnect::options().timeout(LONG));
    let restore = frontend.restore(&saved(VCPUS), asked()).unwrap();
    rig.vm.lock().unwrap().log.clear();
    (rig, frontend, restore)
}

/// The same, with every vCPU at the gate.
fn armed() -> (Rig, Frontend, Restore, Vec<VcpuRestore>) {
    let (rig, frontend, restore) = opened();
    let parts = restore
        .vcpus()
        .map(|part| at_the_gate(&rig, &restore, part));
    let parts = parts.collect();
    assert_eq!(phase(&rig), Phase::Armed);
    rig.vm.lock().unwrap().log.clear();
    (rig, frontend, restore, parts)
}

fn asked() -> RestoreOptions {
    RestoreOptions::default().vm(VmOptions::KVM)
}

fn phase(rig: &Rig) -> Phase {
    rig.vm.lock().unwrap().phase()
}

fn count(rig: &Rig, op: Op) -> usize {
    rig.vm.lock().unwrap().count(op)
}

/// As an ioctl that fails.
fn fails(_: &Info) -> Applied {
    Err(io::Error::from_raw_os_error(16).into())
}

fn never(info: &Info) -> Applied {
    panic!("nothing may be applied in {}", info.phase)
}

/// Whether it is what [`fails`] leads to.
fn is_the_failure(error: &Error) -> bool {
    match error {
        Error::Apply(failure) => failure
            .source()
            .unwrap()
            .to_string()
            .contains("os error 16"),
        _ => false,
    }
}

fn is_refused(error: &Error, status: Status, detail: u32) -> bool {
    let refusal = error.refusal();
    refusal.is_some_and(|refusal| (refusal.status, refusal.detail) == (status, detail))
}

/// Has all parts bring their registers back and wait, each on a thread of its own, while `then`
/// runs.
fn while_all_wait<T>(
    rig: &Rig,
    parts: &mut [VcpuRestore],
    then: impl FnOnce() -> T,
    check: impl Fn(Result<u64, Error>),
) -> T {
    let count = parts.len();
    thread::scope(|scope| {
        let threads: Vec<_> = parts
            .iter_mut()
            .map(|part| waiting(scope, || part.run(LONG).map(|run| run.cntvoff)))
            .collect();
        rig.fake.wait_for_held(count);
        let then = then();
        for thread in threads {
            check(thread.join().unwrap());
        }
        then
    })
}

#[test]
fn the_offsets_are_applied_when_every_vcpu_is_back_and_before_any_vcpu_runs() {
    let (rig, _frontend, mut restore) = opened();
    let mut parts: Vec<_> = restore.vcpus().collect();
    let epoch = restore.epoch();
    let apply_and_release = || {
        let confirmed = restore.apply(LONG, |info: &Info| -> Applied {
            let vm = rig.vm.lock().unwrap();
            assert_eq!((info.phase, vm.phase()), (Phase::Armed, Phase::Armed));
            assert_eq!(info.epoch, epoch);
            assert_eq!(info.cntvoff, vm.info().cntvoff.get());
            assert_eq!(info.cntpoff, info.cntvoff, "one offset");
            assert_eq!(rig.fake.held(), VCPUS as usize, "nobody was answered");
            Ok(())
        });
        let cntvoff = rig.vm.lock().unwrap().info().cntvoff.get();
        assert_eq!(confirmed.unwrap().cntvoff, cntvoff);
        release(&rig);
    };
    while_all_wait(&rig, &mut parts, apply_and_release, |ran| {
        ran.unwrap();
    });
    let vm = rig.vm.lock().unwrap();
    assert_eq!(vm.phase(), Phase::Running);
    assert_eq!(vm.log.last(), Some(&(Op::ConfirmRun, epoch)));
    drop(vm);
    drop((restore, parts));
    assert_eq!(count(&rig, Op::RestoreAbort), 0);
}

#[test]
fn a_new_vm_is_configured_with_what_the_restore_asks_for_and_one_that_lacks_it_is_another_vm() {
    let (rig, frontend) = Rig::new(Options::default());
    let error = frontend.restore(&saved(VCPUS), asked()).unwrap_err();
    let lacks = matches!(
        error,
        Error::InvalidArgument(InvalidArgument::OtherVm { saved, backend })
            if saved.options == VmOptions::KVM && backend.options == VmOptions::default()
    );
    assert!(lacks, "{error}");

    rig.set(Phase::New, &[]);
    let restore = frontend.restore(&saved(VCPUS), asked()).unwrap();
    let info = frontend.config().unwrap();
    assert!(info.confirm && info.one_offset);
    drop(restore);
    // It is the VM's, not this restore's.
    let restore = frontend.restore(&saved(VCPUS), RestoreOptions::default());
    let error = restore.unwrap().finish(LONG).unwrap_err();
    let needs = matches!(error, Error::InvalidArgument(InvalidArgument::NeedsApply));
    assert!(needs, "{error}");
    assert_eq!(phase(&rig), Phase::Paused);
}

#[test]
fn where_the_offsets_are_not_applied_nobody_runs_and_everyone_gets_the_error_and_may_try_again() {
    let (rig, _frontend, mut restore) = opened();
    let mut parts: Vec<_> = restore.vcpus().collect();
    for _ in 0..2 {
        let error = while_all_wait(
            &rig,
            &mut parts,
            || restore.apply(LONG, fails).unwrap_err(),
            |ran| assert!(is_the_failure(&ran.unwrap_err())),
        );
        assert!(is_the_failure(&error), "{error:?}");
        assert_eq!(
            error.to_string(),
            "the VM's offsets were not applied to the hypervisor, so no vCPU runs"
        );
        assert!(is_the_failure(&restore.wait(LONG).unwrap_err()));
        assert_eq!(phase(&rig), Phase::Armed);
        assert_eq!(
            count(&rig, Op::ConfirmRun) + count(&rig, Op::RestoreAbort),
            0
        );
    }
    // Each vCPU's WAIT_RUN was one request, however often its thread waited.
    assert_eq!(count(&rig, Op::WaitRun), VCPUS as usize);
    let again = || {
        restore.apply(LONG, |_: &Info| Ok(())).unwrap();
        release(&rig);
    };
    while_all_wait(&rig, &mut parts, again, |ran| {
        ran.unwrap();
    });
    restore.wait(LONG).unwrap();
}

#[test]
fn a_vcpu_that_comes_to_the_gate_after_the_failure_gets_it_once() {
    let (rig, _frontend, mut restore, mut parts) = armed();
    restore.apply(LONG, fails).unwrap_err();
    for part in &mut parts {
        assert!(is_the_failure(&part.run(LONG).unwrap_err()));
        let waits = part.run(SHORT);
        assert!(matches!(waits, Err(Error::TimedOut { .. })), "{waits:?}");
    }
    assert_eq!(phase(&rig), Phase::Armed);
}

#[test]
fn a_restore_that_is_dropped_unconfirmed_is_aborted_also_in_armed() {
    let (rig, _frontend, mut restore, mut parts) = armed();
    restore.apply(LONG, fails).unwrap_err();
    drop(restore);
    assert_eq!(phase(&rig), Phase::Paused);
    for part in &mut parts {
        let error = part.run(LONG).unwrap_err();
        assert_eq!(error.status(), Some(Status::Canceled), "{error:?}");
    }
    drop(parts);
    assert_eq!(count(&rig, Op::RestoreAbort), 1);
}

#[test]
fn finish_with_aborts_a_restore_whose_offsets_are_not_applied() {
    let (rig, _frontend, restore, parts) = armed();
    assert!(is_the_failure(
        &restore.finish_with(LONG, fails).unwrap_err()
    ));
    assert_eq!(phase(&rig), Phase::Paused);
    drop(parts);
}

#[test]
fn the_restores_time_out_in_armed_ends_a_wait_and_nothing_else() {
    let (rig, _frontend, mut restore) = opened();
    let mut parts: Vec<_> = restore.vcpus().collect();
    let late = |_: &[u8]| fake::answer(Status::TimedOut, 0, &[]);
    let release_late = || rig.fake.release(late);
    while_all_wait(&rig, &mut parts, release_late, |ran| {
        assert!(is_refused(&ran.unwrap_err(), Status::TimedOut, 0));
    });
    assert_eq!(phase(&rig), Phase::Armed);
    restore.apply(LONG, |_: &Info| Ok(())).unwrap();
    assert_eq!(phase(&rig), Phase::Running);
}

#[test]
fn nothing_is_applied_in_running_and_each_armed_gets_its_offsets_once() {
    let (rig, frontend, mut restore, _parts) = armed();
    let applied = Mutex::new(Vec::new());
    let apply = |info: &Info| -> Applied {
        applied.lock().unwrap().push(info.cntvoff);
        Ok(())
    };
    let first = restore.apply(LONG, apply).unwrap();
    // The restore is confirmed: another call finds the VM running.
    assert_eq!(restore.apply(LONG, never).unwrap().cntvoff, first.cntvoff);
    assert_eq!(
        frontend.resume_with(LONG, never).unwrap().cntvoff,
        first.cntvoff
    );
    let mut offsets = vec![first.cntvoff];
    for ns in [0, 500, 0] {
        frontend.queue().pause(LONG).unwrap();
        rig.vm.lock().unwrap().pass(ns);
        let run = frontend.resume_with(LONG, apply).unwrap();
        offsets.push(run.cntvoff);
    }
    assert_eq!(*applied.lock().unwrap(), offsets);
    assert_eq!(offsets[2], offsets[1].wrapping_add(500), "1 GHz");
    assert_eq!(phase(&rig), Phase::Running);
}

#[test]
fn a_restore_that_is_over_applies_nothing() {
    let (rig, frontend, mut first, parts) = armed();
    let second = frontend.restore(&saved(VCPUS), asked()).unwrap();
    let stale = first.apply(LONG, never).unwrap_err();
    assert!(is_refused(&stale, Status::Stale, 0), "{stale:?}");
    drop((second, parts));
    assert_eq!(phase(&rig), Phase::Paused);
    let (_rig, frontend, mut restore, _parts) = armed();
    frontend.queue().pause(LONG).unwrap();
    let paused = restore.apply(LONG, never).unwrap_err();
    let detail = Phase::Paused.code();
    assert!(is_refused(&paused, Status::Busy, detail), "{paused:?}");
}

#[test]
fn what_was_sent_before_is_carried_out_before_the_offsets_are_read() {
    let (rig, frontend, mut restore, _parts) = armed();
    // Not even published yet.
    let pause = frontend.queues()[1].submit(&Operation::pause()).unwrap();
    let paused = restore.apply(LONG, never).unwrap_err();
    assert!(is_refused(&paused, Status::Busy, Phase::Paused.code()));
    pause.wait(LONG).unwrap();
    assert_eq!(count(&rig, Op::ConfirmRun), 0);
}

#[test]
fn whatever_ends_an_armed_waits_for_the_thread_that_applies() {
    let ends: [Call; 5] = [
        |frontend| frontend.queues()[1].pause(SHORT).map(drop),
        |frontend| frontend.queue().resume(SHORT).map(drop),
        |frontend| {
            let begin = Operation::restore_begin(VCPUS, asked());
            frontend.queue().perform(&begin, SHORT).map(drop)
        },
        |frontend| frontend.queues()[1].restore_abort(SHORT),
        |frontend| frontend.queue().confirm_run(0, 0, SHORT).map(drop),
    ];
    let (rig, frontend, mut restore, _parts) = armed();
    let (frontend, rig) = (&frontend, &rig);
    let apply = |_: &Info| -> Applied {
        rig.vm.lock().unwrap().log.clear();
        thread::scope(|scope| {
            let others = scope.spawn(|| {
                for end in ends {
                    let late = end(frontend);
                    assert!(matches!(late, Err(Error::TimedOut { .. })), "{late:?}");
                }
                let submitted = frontend.queue().submit(&Operation::pause());
                let applying = matches!(submitted, Err(Error::Applying { op: Op::Pause }));
                assert!(applying, "{submitted:?}");
                // Others go on.
                frontend.queues()[1].info(LONG).unwrap();
            });
            others.join().unwrap();
        });
        // This thread would wait for itself.
        for end in ends {
            let inside = end(frontend);
            let inside = matches!(
                inside,
                Err(Error::InvalidArgument(InvalidArgument::InsideApply))
            );
            assert!(inside);
        }
        assert_eq!(rig.vm.lock().unwrap().log, [(Op::GetInfo, 0)]);
        Ok(())
    };
    restore.apply(LONG, apply).unwrap();
    frontend.queues()[1].pause(LONG).unwrap();
    assert_eq!(phase(rig), Phase::Paused);
}

#[test]
fn a_pause_that_waits_is_carried_out_after_the_confirmation() {
    let (rig, frontend, mut restore, _parts) = armed();
    thread::scope(|scope| {
        let queue = &frontend.queues()[1];
        let mut pausing = None;
        let apply = |_: &Info| -> Applied {
            pausing = Some(waiting(scope, || queue.pause(LONG)));
            Ok(())
        };
        restore.apply(LONG, apply).unwrap();
        pausing.unwrap().join().unwrap().unwrap();
    });
    let vm = rig.vm.lock().unwrap();
    let ended: Vec<_> = vm.log.iter().map(|(op, _)| *op).collect();
    assert!(ended.ends_with(&[Op::ConfirmRun, Op::Pause]), "{ended:?}");
}

#[test]
fn a_confirmation_that_is_late_is_repeated_and_nothing_is_applied_again() {
    for lost in [|op| late(op, Lost::Unseen), |op| late(op, Lost::Done)] as [fn(Op) -> Lost; 2] {
        let (rig, _frontend, mut restore, _parts) = armed();
        let held = rig.fake.held();
        rig.lose(lost);
        within_some_limit(SHORT, |limit| {
            let deadline = Deadline::from(limit);
            let mut applied = None;
            let error = restore.apply(deadline, |_: &Info| -> Applied {
                applied = Some(());
                thread::sleep(deadline.remaining().unwrap());
                Ok(())
            });
            let error = error.unwrap_err();
            assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");
            applied
        });
        rig.fake.wait_for_held(held + 1);
        let late = restore.apply(SHORT, never);
        assert!(matches!(late, Err(Error::TimedOut { .. })), "{late:?}");
        rig.lose(|_| Lost::No);
        restore.apply(LONG, never).unwrap();
        assert_eq!(phase(&rig), Phase::Running);
    }
}

fn late(op: Op, how: Lost) -> Lost {
    match op {
        Op::ConfirmRun => how,
        _ => Lost::No,
    }
}

#[test]
fn over_a_backend_that_is_killed_in_armed_the_confirmation_is_sent_and_nothing_is_applied_again() {
    let (mut rig, _frontend, mut restore, _parts) = armed();
    let killed = |_: &Info| -> Applied {
        rig.kill();
        rig.revive();
        Ok(())
    };
    restore.apply(LONG, killed).unwrap();
    assert_eq!(phase(&rig), Phase::Running);
    assert_eq!(count(&rig, Op::ConfirmRun), 1);

    for lost in [|op| late(op, Lost::Unseen), |op| late(op, Lost::Done)] as [fn(Op) -> Lost; 2] {
        let (mut rig, _frontend, mut restore, _parts) = armed();
        let mut applied = 0;
        thread::scope(|scope| {
            rig.lose(lost);
            let held = rig.fake.held();
            let apply = |_: &Info| -> Applied {
                applied += 1;
                Ok(())
            };
            let applying = scope.spawn(|| restore.apply(LONG, apply));
            rig.fake.wait_for_held(held + 1);
            rig.kill();
            rig.revive();
            applying.join().unwrap().unwrap();
        });
        assert_eq!((applied, phase(&rig)), (1, Phase::Running));
        assert_eq!(count(&rig, Op::ConfirmRun), 2);
    }
}

#[test]
fn offsets_of_another_counter_than_the_hypervisors_are_not_applied() {
    let expect = Options::default().host_counter(CounterSource::Cntvct);
    let (rig, frontend) = Rig::confirming(expect);
    frontend.queue().set_counter_anchor(0, 0, LONG).unwrap();
    let error = frontend.resume_with(LONG, never).unwrap_err();
    let Error::Apply(failure) = &error else {
        panic!("{error:?}");
    };
    let other = failure.cause.downcast_ref::<OtherCounter>().unwrap();
    assert!(other.anchored);
    assert_eq!(phase(&rig), Phase::Armed);
}

#[test]
fn threads_in_wait_run_get_the_failure_of_a_resume() {
    let (rig, frontend) = Rig::confirming(Options::default());
    let queue = &frontend.queues()[1];
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..3)
            .map(|vcpu| scope.spawn(move || queue.wait_run(vcpu, LONG)))
            .collect();
        rig.fake.wait_for_held(3);
        assert!(is_the_failure(
            &frontend.resume_with(LONG, fails).unwrap_err()
        ));
        for thread in waiting {
            assert!(is_the_failure(&thread.join().unwrap().unwrap_err()));
        }
    });
    assert_eq!(phase(&rig), Phase::Armed);
    frontend.resume_with(LONG, |_: &Info| Ok(())).unwrap();
    assert_eq!(phase(&rig), Phase::Running);
}

#[test]
fn all_vcpus_are_brought_back_by_one_request() {
    let (rig, _frontend, mut restore) = opened();
    let parts: Vec<_> = restore.vcpus().collect();
    restore.bring_all_back(LONG).unwrap();
    assert_eq!(restore.missing(), [0; 0]);
    assert_eq!(rig.vm.lock().unwrap().log, [(Op::SetVm, restore.epoch())]);
    assert_eq!(phase(&rig), Phase::Armed);
    // Again is fine, and a part has nothing left to bring.
    restore.bring_all_back(LONG).unwrap();
    rig.vm.lock().unwrap().log.clear();
    let parts: Vec<_> = parts
        .into_iter()
        .map(|part| at_the_gate(&rig, &restore, part))
        .collect();
    assert_eq!(count(&rig, Op::WaitRun), VCPUS as usize);
    assert_eq!(rig.vm.lock().unwrap().log.len(), VCPUS as usize);
    restore.apply(LONG, |_: &Info| Ok(())).unwrap();
    drop((restore, parts));
    assert_eq!(phase(&rig), Phase::Running);
}
