//! The restore object against a fake backend: what it asks for, in which order, and what becomes
//! of the others when a vCPU fails.

use std::num::NonZeroU64;
use std::thread;
use std::time::Duration;

use crate::LONG;
use crate::SHORT;
use crate::fake;
use crate::fake::model::{Lost, Rig, VCPUS};
use crate::fake::{run_of, saved_vcpu};
use crate::pace::{waiting, within_some_limit};
use vhost_user_timer_frontend::{
    Abi, ApplyError, Error, Frontend, Info, InvalidArgument, Op, Options, Phase, Reconnect,
    Restore, RestoreOptions, Run, SavedVcpu, SavedVm, Status, VcpuRestore,
};
use zerocopy::IntoBytes;

pub(crate) fn saved(vcpus: u32) -> SavedVm {
    let hz = NonZeroU64::new(1_000_000_000).unwrap();
    SavedVm::new(Abi::Arm64, hz, (0..vcpus).map(saved_vcpu).collect()).unwrap()
}

fn autorun() -> RestoreOptions {
    RestoreOptions::default().autorun(true)
}

/// A backend in PAUSED, and a restore that was opened in it.
fn opened() -> (Rig, Frontend, Restore) {
    let (rig, frontend) = Rig::new(Options::default());
    let restore = frontend.restore(&saved(VCPUS), autorun()).unwrap();
    rig.vm.lock().unwrap().log.clear();
    (rig, frontend, restore)
}

/// The same, and the time-out of these options: the shortest within which it can be opened.
fn opened_in_time(options: &Options) -> (Rig, Frontend, Restore, Duration) {
    within_some_limit(Duration::from_millis(200), |timeout| {
        let (rig, frontend) = Rig::try_new(options.clone().timeout(timeout))?;
        match frontend.restore(&saved(VCPUS), autorun()) {
            Ok(restore) => Some((rig, frontend, restore, timeout)),
            Err(Error::TimedOut { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    })
}

fn aborts(rig: &Rig) -> usize {
    rig.vm.lock().unwrap().count(Op::RestoreAbort)
}

/// The model answers no WAIT_RUN that it holds: this does, now that the VM runs.
pub(crate) fn release(rig: &Rig) {
    assert_eq!(rig.vm.lock().unwrap().phase(), Phase::Running);
    rig.fake.release(|_| fake::ok(run_of(9).as_bytes()));
}

/// The vCPU that a restore failed by, and whether its error is as expected.
fn failed_by(error: &Error, cause: impl Fn(&Error) -> bool) -> u32 {
    match error {
        Error::Restore(failure) if cause(&failure.cause) => failure.vcpu,
        error => panic!("{error:?}"),
    }
}

fn refused_with(status: Status) -> impl Fn(&Error) -> bool {
    move |error| error.status() == Some(status)
}

/// Brings a vCPU's registers back, and gives its part back once it waits for the others.
pub(crate) fn at_the_gate(rig: &Rig, restore: &Restore, mut part: VcpuRestore) -> VcpuRestore {
    let held = rig.fake.held();
    let late = part.run(Duration::from_millis(20));
    while rig.fake.held() == held || restore.missing().contains(&part.index()) {
        assert!(matches!(late, Err(Error::TimedOut { .. })), "{late:?}");
        assert!(matches!(part.run(SHORT), Err(Error::TimedOut { .. })));
    }
    part
}

#[test]
fn a_new_vm_is_configured_and_every_request_names_the_epoch() {
    let (rig, frontend) = Rig::new(Options::default());
    rig.set(Phase::New, &[]);
    rig.vm.lock().unwrap().log.clear();
    let restore = frontend.restore(&saved(VCPUS), autorun()).unwrap();
    assert_eq!(restore.epoch(), 8);
    let began = [Op::GetInfo, Op::ConfigureVm, Op::RestoreBegin].map(|op| (op, 0));
    assert_eq!(rig.vm.lock().unwrap().log, began);

    rig.vm.lock().unwrap().log.clear();
    let mut part = restore.vcpu(2).unwrap();
    assert_eq!(part.registers(), &saved_vcpu(2));
    part = at_the_gate(&rig, &restore, part);
    assert_eq!(part.index(), 2);
    let asked = [Op::SetVm, Op::WaitRun].map(|op| (op, 8));
    assert_eq!(rig.vm.lock().unwrap().log, asked);
    assert_eq!(restore.missing(), [0, 1, 3]);
}

#[test]
fn a_vm_of_another_shape_is_refused_and_nothing_is_begun() {
    let (rig, frontend) = Rig::new(Options::default());
    rig.vm.lock().unwrap().log.clear();
    let error = frontend.restore(&saved(VCPUS + 1), autorun()).unwrap_err();
    let other = matches!(
        error,
        Error::InvalidArgument(InvalidArgument::OtherVm { saved, backend })
            if saved.vcpus == VCPUS + 1 && backend.vcpus == VCPUS
    );
    assert!(other, "{error}");
    assert_eq!(rig.vm.lock().unwrap().log, [(Op::GetInfo, 0)]);
}

#[test]
fn what_needs_a_confirmation_is_refused_for_a_vm_that_runs_without_one() {
    let (rig, frontend, mut restore) = opened();
    let without = |error: &Error| {
        matches!(
            error,
            Error::InvalidArgument(InvalidArgument::WithoutConfirm)
        )
    };
    let never = |_: &Info| -> Result<(), ApplyError> { panic!("nothing may be applied") };
    assert!(without(&restore.apply(LONG, never).unwrap_err()));
    // The restore goes on.
    assert_eq!(rig.vm.lock().unwrap().log, []);
    drop(restore);
    rig.vm.lock().unwrap().log.clear();
    assert!(without(&frontend.resume_with(LONG, never).unwrap_err()));
    assert_eq!(rig.vm.lock().unwrap().log, [(Op::GetInfo, 0)]);
}

#[test]
fn each_part_is_given_away_once() {
    let (_rig, _frontend, restore) = opened();
    assert!(restore.vcpu(VCPUS).is_none());
    let first = restore.vcpu(1).unwrap();
    assert!(restore.vcpu(1).is_none());
    let rest: Vec<_> = restore.vcpus().collect();
    let indices: Vec<_> = rest.iter().map(VcpuRestore::index).collect();
    assert_eq!(indices, [0, 2, 3]);
    assert_eq!(restore.vcpus().count(), 0);
    drop((first, rest));
}

#[test]
fn all_run_once_every_one_of_them_is_done_and_the_drop_asks_for_nothing() {
    let (rig, _frontend, mut restore) = opened();
    let mut parts: Vec<_> = restore.vcpus().collect();
    let mut last = parts.pop().unwrap();
    let mut parts: Vec<_> = parts
        .into_iter()
        .map(|part| at_the_gate(&rig, &restore, part))
        .collect();
    assert_eq!(restore.missing(), [VCPUS - 1]);
    assert!(matches!(restore.wait(SHORT), Err(Error::TimedOut { .. })));
    assert_eq!(last.run(LONG).unwrap().cntvoff, 1000 + u64::from(VCPUS - 1));
    restore.wait(LONG).unwrap();
    release(&rig);
    for part in &mut parts {
        part.run(LONG).unwrap();
    }
    drop((parts, last, restore));
    assert_eq!(aborts(&rig), 0);
}

#[test]
fn a_part_goes_on_where_it_was_after_its_deadline() {
    let (rig, _frontend, restore) = opened();
    let mut part = restore.vcpu(0).unwrap();
    rig.lose(|op| match op {
        Op::SetVm => Lost::Done,
        _ => Lost::No,
    });
    for _ in 0..3 {
        assert!(matches!(part.run(SHORT), Err(Error::TimedOut { .. })));
    }
    // The WAIT_RUN is behind it.
    rig.fake.wait_for_held(2);
    rig.lose(|_| Lost::No);
    assert_eq!(restore.missing(), [0, 1, 2, 3]);
    rig.fake
        .release_those(Op::SetVm, &fake::ok(&fake::remaining(3)));
    while restore.missing() != [1, 2, 3] {
        assert!(matches!(part.run(SHORT), Err(Error::TimedOut { .. })));
    }
    let vm = rig.vm.lock().unwrap();
    assert_eq!((vm.count(Op::SetVm), vm.count(Op::WaitRun)), (1, 1));
    assert_eq!(vm.count(Op::RestoreDone), 0);
}

/// Runs all parts but `failing`, has that one fail, and checks what the others and the holder of
/// the restore get.
fn one_fails(fail: impl FnOnce(&Rig, VcpuRestore), cause: impl Fn(&Error) -> bool) {
    let (rig, frontend, mut restore) = opened();
    let failing = restore.vcpu(1).unwrap();
    let others: Vec<_> = restore.vcpus().collect();
    thread::scope(|scope| {
        let waiting: Vec<_> = others
            .into_iter()
            .map(|mut part| scope.spawn(move || part.run(LONG)))
            .collect();
        rig.fake.wait_for_held(3);
        fail(&rig, failing);
        for thread in waiting {
            let error = thread.join().unwrap().unwrap_err();
            assert_eq!(failed_by(&error, &cause), 1);
        }
    });
    assert_eq!(failed_by(&restore.wait(LONG).unwrap_err(), &cause), 1);
    drop(restore);
    assert_eq!(aborts(&rig), 1);
    assert_eq!(frontend.config().unwrap().phase, Phase::Paused);
}

#[test]
fn a_vcpu_that_is_refused_ends_all_the_others_and_is_named() {
    let refuse = |rig: &Rig, mut part: VcpuRestore| {
        // As if its registers had been set before.
        rig.set(Phase::Restoring, &[1]);
        let error = part.run(LONG).unwrap_err();
        assert_eq!(failed_by(&error, refused_with(Status::Busy)), 1);
        assert_eq!(
            error.to_string(),
            "the restore was aborted because vCPU 1 failed"
        );
        let again = part.run(LONG).unwrap_err();
        assert_eq!(failed_by(&again, refused_with(Status::Busy)), 1);
    };
    one_fails(refuse, refused_with(Status::Busy));
}

#[test]
fn a_thread_that_panics_before_its_registers_are_back_ends_all_the_others() {
    let panics = |_: &Rig, part: VcpuRestore| {
        let thread = thread::spawn(move || {
            let _part = part;
            std::panic::resume_unwind(Box::new("as a vCPU thread might"));
        });
        thread.join().unwrap_err();
    };
    one_fails(panics, |error| matches!(error, Error::Abandoned));
}

#[test]
fn to_drop_a_restore_that_is_not_complete_aborts_it_and_ends_those_that_wait() {
    let (rig, _frontend, restore) = opened();
    let mut late = restore.vcpu(3).unwrap();
    let mut part = restore.vcpu(0).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(move || part.run(LONG));
        rig.fake.wait_for_held(1);
        drop(restore);
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.status(), Some(Status::Canceled), "{error:?}");
    });
    assert_eq!(
        rig.vm.lock().unwrap().log.last(),
        Some(&(Op::RestoreAbort, 8))
    );
    assert_eq!(aborts(&rig), 1);
    // One that comes later than that learns the same.
    let error = late.run(LONG).unwrap_err();
    assert_eq!(error.status(), Some(Status::Canceled), "{error:?}");
}

#[test]
fn a_vcpu_that_is_done_and_asks_after_the_abort_does_not_wait_for_the_next_resume() {
    let (rig, _frontend, restore) = opened();
    let mut part = at_the_gate(&rig, &restore, restore.vcpu(0).unwrap());
    drop(restore);
    let error = part.run(LONG).unwrap_err();
    assert_eq!(error.status(), Some(Status::Canceled), "{error:?}");
}

#[test]
fn a_restore_that_was_begun_meanwhile_is_not_aborted() {
    let (rig, frontend, first) = opened();
    let mut part = first.vcpu(0).unwrap();
    let second = frontend.restore(&saved(VCPUS), autorun()).unwrap();
    assert_eq!((first.epoch(), second.epoch()), (8, 9));
    let error = part.run(LONG).unwrap_err();
    assert_eq!(failed_by(&error, refused_with(Status::Stale)), 0);
    drop((first, part));
    assert_eq!(rig.vm.lock().unwrap().phase(), Phase::Restoring);
    drop(second);
    assert_eq!(rig.vm.lock().unwrap().phase(), Phase::Paused);
}

#[test]
fn to_drop_a_restore_over_a_backend_that_hangs_takes_no_longer_than_the_time_out() {
    let (rig, _frontend, restore, timeout) = opened_in_time(&Options::default());
    rig.lose(|_| Lost::Unseen);
    let began = std::time::Instant::now();
    drop(restore);
    assert!(began.elapsed() >= timeout);
    // It was asked for.
    rig.fake.wait_for_held(1);
}

#[test]
fn to_drop_a_restore_over_a_dead_backend_ends_with_and_without_reconnecting() {
    let forever = Reconnect::default().patience(Duration::MAX);
    let options = Options::default();
    for options in [options.clone(), options.reconnect(forever)] {
        let (mut rig, _frontend, mut restore, _) = opened_in_time(&options);
        rig.kill();
        let error = restore.wait(SHORT).unwrap_err();
        let ended = matches!(error, Error::TimedOut { .. } | Error::Disconnected);
        assert!(ended, "{error}");
        drop(restore);
    }
}

#[test]
fn a_shut_down_ends_the_wait_for_a_restore() {
    let (_rig, frontend, mut restore) = opened();
    let shutdown = frontend.shutdown_handle();
    thread::scope(|scope| {
        let waits = waiting(scope, || restore.wait(LONG));
        shutdown.shut_down();
        let error = waits.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::ShutDown), "{error}");
    });
}

#[test]
fn parts_can_be_sent_to_threads_that_outlive_their_maker() {
    fn is_send<T: Send + 'static>() {}
    fn is_sync<T: Sync>() {}
    is_send::<Restore>();
    is_send::<VcpuRestore>();
    is_send::<Run>();
    is_sync::<Restore>();
    is_sync::<SavedVcpu>();
}
