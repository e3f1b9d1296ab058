//! The library's restore object against the released backend: all vCPUs run with one offset, or
//! none runs.

use std::thread;
use std::time::Duration;

use vhost_user_timer_frontend::{
    Error, Frontend, Options, Phase, Reconnect, Register, Restore, RestoreOptions, Run, SavedVcpu,
    SavedVm, Status,
};
use vhost_user_timer_kit::backend_process::{BackendProcess, find_program};
use vhost_user_timer_kit::kvm_data::KvmData;
use vhost_user_timer_kit::time_out::with_a_time_out;
use vhost_user_timer_protocol::Abi;

/// Something that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);
/// Long enough for a vCPU to reach the gate on an idle machine; no result depends on it.
const TURN: Duration = Duration::from_millis(20);

pub(crate) const VCPUS: u32 = 8;

struct Served {
    backend: BackendProcess,
    frontend: Frontend,
}

fn options() -> Options {
    Options::default().timeout(LIMIT)
}

fn serve(backend: BackendProcess, options: Options) -> Served {
    let frontend = Frontend::connect(backend.socket_path(), options).unwrap();
    Served { backend, frontend }
}

fn launch() -> Served {
    serve(BackendProcess::launch::<&str>(&[]).unwrap(), options())
}

impl Served {
    fn phase(&self) -> Phase {
        self.frontend.queue().info(LIMIT).unwrap().phase
    }
}

/// What a real KVM said, for as many vCPUs; the counts differ by seconds.
pub(crate) fn saved() -> SavedVm {
    let data = KvmData::recorded();
    let frequency = data.frequency.try_into().unwrap();
    let vcpus = KvmData::for_vcpus(&data.skewed, VCPUS);
    SavedVm::new(Abi::Arm64, frequency, vcpus).unwrap()
}

fn autorun() -> RestoreOptions {
    RestoreOptions::default().autorun(true)
}

/// Runs every part that is left, each on a thread of its own that the restore's holder joins.
fn run_the_rest(restore: &Restore) -> Vec<thread::JoinHandle<Result<Run, Error>>> {
    restore
        .vcpus()
        .map(|mut part| thread::spawn(move || part.run(LIMIT)))
        .collect()
}

fn join(threads: Vec<thread::JoinHandle<Result<Run, Error>>>) -> Vec<Result<Run, Error>> {
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect()
}

#[test]
fn every_vcpu_runs_with_the_same_offsets_and_the_largest_count() {
    let served = launch();
    let saved = saved();
    let mut restore = served.frontend.restore(&saved, autorun()).unwrap();
    let threads = run_the_rest(&restore);
    restore.wait(LIMIT).unwrap();
    let runs: Vec<_> = join(threads).into_iter().map(Result::unwrap).collect();
    assert_eq!(runs.len(), VCPUS as usize);
    for run in &runs {
        assert_eq!(
            (run.cntvoff, run.cntpoff),
            (runs[0].cntvoff, runs[0].cntpoff)
        );
        assert!(run.virt_count >= saved.virt_count());
    }
    drop(restore);
    assert_eq!(served.phase(), Phase::Running);
}

#[test]
fn without_autorun_a_complete_restore_runs_at_resume() {
    let served = launch();
    let restore = served
        .frontend
        .restore(&saved(), RestoreOptions::default())
        .unwrap();
    let threads = run_the_rest(&restore);
    restore.finish(LIMIT).unwrap();
    assert_eq!(served.phase(), Phase::Paused);
    let resumed = served.frontend.queue().resume(LIMIT).unwrap();
    for run in join(threads) {
        assert_eq!(run.unwrap().cntvoff, resumed.cntvoff);
    }
}

#[test]
fn a_vcpu_that_lacks_a_register_stops_all_the_others_and_is_named() {
    let served = launch();
    let mut vcpus = saved().vcpus().to_vec();
    vcpus[5] = SavedVcpu::new(5).with(Register::TimerCtl, 0);
    let lacking = SavedVm::new(Abi::Arm64, saved().frequency(), vcpus).unwrap();
    let mut restore = served.frontend.restore(&lacking, autorun()).unwrap();
    let threads = run_the_rest(&restore);
    let by = |error: Error| match error {
        Error::Restore(failure) => (failure.vcpu, failure.cause.status()),
        error => panic!("{error:?}"),
    };
    let lacks = (5, Some(Status::Incomplete));
    assert_eq!(by(restore.wait(LIMIT).unwrap_err()), lacks);
    for run in join(threads) {
        assert_eq!(by(run.unwrap_err()), lacks);
    }
    assert_eq!(served.phase(), Phase::Paused);

    // And the same VM can be restored afterwards.
    let restore = served.frontend.restore(&saved(), autorun()).unwrap();
    let threads = run_the_rest(&restore);
    restore.finish(LIMIT).unwrap();
    assert!(join(threads).into_iter().all(|run| run.is_ok()));
}

#[test]
fn a_restore_that_times_out_names_the_first_missing_vcpu() {
    with_a_time_out(|time_out| {
        let served = launch();
        let options = autorun().timeout(time_out.length());
        let mut restore = served.frontend.restore(&saved(), options).unwrap();
        let missing = restore.vcpu(3).unwrap();
        let threads = run_the_rest(&restore);
        while restore.missing() != [3] && !time_out.may_have_passed() {
            thread::yield_now();
        }
        let scene_is_set = time_out.scene_is_set();
        let failure = restore.wait(LIMIT).unwrap_err();
        assert!(join(threads).into_iter().all(|run| run.is_err()));
        assert_eq!(served.phase(), Phase::Paused);
        drop(missing);
        scene_is_set?;
        match failure {
            Error::Restore(failure) => {
                assert_eq!(failure.vcpu, 3);
                assert_eq!(failure.cause.status(), Some(Status::TimedOut));
            }
            error => panic!("{error:?}"),
        }
        Some(())
    });
}

#[test]
fn a_dropped_restore_leaves_the_vm_as_it_was_and_no_vcpu_runs() {
    let served = launch();
    let queue = served.frontend.queue();
    let frequency = Some(saved().frequency());
    queue
        .configure(VCPUS, Abi::Arm64, frequency, LIMIT)
        .unwrap();
    // The physical count of this VM counts on.
    let registers = || {
        let vm = queue.get_vm(0, VCPUS, LIMIT).unwrap();
        let vcpus = vm.vcpus.into_iter();
        vcpus
            .map(|vcpu| vcpu.with(Register::PtimerCnt, 0))
            .collect::<Vec<_>>()
    };
    let before = registers();
    let restore = served.frontend.restore(&saved(), autorun()).unwrap();
    let straggler = restore.vcpu(0).unwrap();
    let threads = run_the_rest(&restore);
    while restore.missing() != [0] {
        thread::yield_now();
    }
    drop(restore);
    for run in join(threads) {
        assert_eq!(run.unwrap_err().status(), Some(Status::Canceled));
    }
    drop(straggler);
    assert_eq!(served.phase(), Phase::Paused);
    assert_eq!(registers(), before);
    // Nobody is left who would run now.
    queue.resume(LIMIT).unwrap();
    assert_eq!(served.phase(), Phase::Running);
}

#[test]
fn a_restore_that_was_begun_meanwhile_goes_on() {
    let served = launch();
    let first = served.frontend.restore(&saved(), autorun()).unwrap();
    let straggler = first.vcpu(0);
    let threads = run_the_rest(&first);
    let second = served.frontend.restore(&saved(), autorun()).unwrap();
    for run in join(threads) {
        match run.unwrap_err() {
            Error::Restore(failure) => assert_eq!(failure.cause.status(), Some(Status::Stale)),
            error => panic!("{error:?}"),
        }
    }
    drop((first, straggler));
    assert_eq!(served.phase(), Phase::Restoring);
    let threads = run_the_rest(&second);
    second.finish(LIMIT).unwrap();
    assert!(join(threads).into_iter().all(|run| run.is_ok()));
}

#[test]
fn a_backend_that_is_killed_meanwhile_and_comes_back_changes_nothing() {
    let program = find_program().unwrap();
    let backend = BackendProcess::launch_with_state::<&str>(&program, &[]).unwrap();
    let reconnect = Reconnect::default().patience(LIMIT);
    let mut served = serve(backend, options().reconnect(reconnect));
    let mut restore = served.frontend.restore(&saved(), autorun()).unwrap();
    let mut straggler = restore.vcpu(0).unwrap();
    let threads = run_the_rest(&restore);
    while restore.missing() != [0] {
        thread::yield_now();
    }
    served.backend.kill();
    assert!(matches!(straggler.run(TURN), Err(Error::TimedOut { .. })));
    assert!(matches!(restore.wait(TURN), Err(Error::TimedOut { .. })));
    served
        .backend
        .relaunch_with_state::<&str>(&program, &[])
        .unwrap();
    let last = straggler.run(LIMIT).unwrap();
    restore.wait(LIMIT).unwrap();
    for run in join(threads) {
        assert_eq!(run.unwrap().cntvoff, last.cntvoff);
    }
    assert_eq!(served.phase(), Phase::Running);
}
