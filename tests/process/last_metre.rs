//! The last metre with the released backend: nobody runs before the offsets are applied and
//! confirmed, wherever the backend is killed.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_user_timer_frontend::{
    Abi, ApplyError, Backend, Error, Info, Options, Phase, Register, Restore, RestoreOptions,
    SavedVcpu, SavedVm, Status, VcpuRestore, VmOptions,
};
use vhost_user_timer_kit::backend_process::kill_and_wait;

use crate::restore_object::{VCPUS, saved};
use crate::spawned::{options, replaced, spawn};

/// Something that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

type Applied = Result<(), ApplyError>;

/// A hypervisor: the offset that was put into it, and how often.
#[derive(Default)]
struct Hypervisor {
    offset: Mutex<Option<u64>>,
    applied: AtomicU32,
}

impl Hypervisor {
    fn apply(&self, info: &Info) -> Applied {
        assert_eq!(info.phase, Phase::Armed);
        assert_eq!(info.cntvoff, info.cntpoff, "one offset");
        *self.offset.lock().unwrap() = Some(info.cntvoff);
        self.applied.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// What a vCPU that enters the guest finds.
    fn offset(&self) -> u64 {
        let offset = *self.offset.lock().unwrap();
        offset.expect("nobody runs before the offset is applied")
    }
}

fn restore_in(backend: &Backend) -> Restore {
    let options = RestoreOptions::default().vm(VmOptions::KVM);
    backend.frontend().restore(&saved(), options).unwrap()
}

fn phase(backend: &Backend) -> Phase {
    backend.frontend().queue().info(LIMIT).unwrap().phase
}

/// A vCPU's thread: returns once the vCPU runs, with what its guest finds.
fn vcpu(part: &mut VcpuRestore, hypervisor: &Hypervisor) {
    let run = part.run(LIMIT).unwrap();
    assert_eq!(run.cntvoff, hypervisor.offset());
}

/// When the backend is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kill {
    Never,
    /// In RESTORING, with one vCPU missing.
    InRestoring,
    /// In ARMED, before the offsets are read.
    BeforeApply,
    /// From inside of the closure, before the hypervisor has the offset, and after.
    InApply,
    AfterApply,
    /// Each of these.
    Always,
}

/// Kills the backend, once one lives that is not among those killed before: a vCPU that waits has
/// the library launch it.
fn kill_the_next(backend: &Backend, killed: &mut Vec<u32>) {
    let deadline = Instant::now() + LIMIT;
    let pid = loop {
        match backend.pid() {
            Some(pid) if !killed.contains(&pid) => break pid,
            _ => thread::yield_now(),
        }
        assert!(Instant::now() < deadline, "no backend after {killed:?}");
    };
    kill_and_wait(pid);
    killed.push(pid);
}

#[test]
fn nobody_runs_before_the_offset_is_applied_once_wherever_the_backend_is_killed() {
    for at in [
        Kill::Never,
        Kill::InRestoring,
        Kill::BeforeApply,
        Kill::InApply,
        Kill::AfterApply,
        Kill::Always,
    ] {
        let directory = TempDir::new().unwrap();
        let backend = spawn(replaced(&directory)).unwrap();
        let hypervisor = Hypervisor::default();
        let killed = Mutex::new(Vec::new());
        let kill_if = |now: Kill| {
            if at == now || at == Kill::Always {
                kill_the_next(&backend, &mut killed.lock().unwrap());
            }
        };
        let mut restore = restore_in(&backend);
        let mut parts: Vec<_> = restore.vcpus().collect();
        let mut straggler = parts.pop().unwrap();
        thread::scope(|scope| {
            for part in &mut parts {
                scope.spawn(|| vcpu(part, &hypervisor));
            }
            while restore.missing() != [VCPUS - 1] {
                thread::yield_now();
            }
            kill_if(Kill::InRestoring);
            scope.spawn(|| vcpu(&mut straggler, &hypervisor));
            restore.wait(LIMIT).unwrap();
            kill_if(Kill::BeforeApply);
            let run = restore.apply(LIMIT, |info: &Info| {
                kill_if(Kill::InApply);
                hypervisor.apply(info)?;
                kill_if(Kill::AfterApply);
                Ok(())
            });
            assert_eq!(run.unwrap().cntvoff, hypervisor.offset(), "{at:?}");
        });
        assert_eq!(hypervisor.applied.into_inner(), 1, "{at:?}");
        assert_eq!(phase(&backend), Phase::Running);
        let times = match at {
            Kill::Never => 0,
            Kill::Always => 4,
            _ => 1,
        };
        assert_eq!(killed.into_inner().unwrap().len(), times, "{at:?}");
    }
}

#[test]
fn a_queue_without_room_for_every_wait_restores_every_vcpu_all_the_same() {
    let frontend = Options::default().timeout(LIMIT);
    let frontend = frontend.queue_size(4).request_queues(1);
    let backend = spawn(options().frontend(frontend)).unwrap();
    assert!(backend.frontend().queue().capacity() < VCPUS as usize);
    let hypervisor = Hypervisor::default();
    let mut restore = restore_in(&backend);
    let mut parts: Vec<_> = restore.vcpus().collect();
    thread::scope(|scope| {
        for part in &mut parts {
            scope.spawn(|| vcpu(part, &hypervisor));
        }
        restore.apply(LIMIT, |info| hypervisor.apply(info)).unwrap();
    });
    assert_eq!(phase(&backend), Phase::Running);
}

#[test]
fn a_pause_and_each_resume_apply_an_offset_of_their_own() {
    let backend = spawn(options()).unwrap();
    let frontend = backend.frontend();
    let queue = frontend.queue();
    queue
        .configure_with(VCPUS, Abi::Arm64, None, VmOptions::KVM, LIMIT)
        .unwrap();
    let hypervisor = Hypervisor::default();
    let mut offsets = Vec::new();
    for round in 1..=20 {
        thread::scope(|scope| {
            for index in 0..VCPUS {
                let (queue, hypervisor) = (frontend.queue_of(index), &hypervisor);
                scope.spawn(move || {
                    let run = queue.wait_run(index, LIMIT).unwrap();
                    assert_eq!(run.cntvoff, hypervisor.offset());
                });
            }
            let run = frontend.resume_with(LIMIT, |info| hypervisor.apply(info));
            offsets.push(run.unwrap().cntvoff);
        });
        assert_eq!(hypervisor.applied.load(Ordering::Relaxed), round);
        queue.pause(LIMIT).unwrap();
        *hypervisor.offset.lock().unwrap() = None;
    }
    offsets.dedup();
    assert_eq!(offsets.len(), 20, "each is larger by the pause");
}

/// As an ioctl that fails.
fn fails(_: &Info) -> Applied {
    Err("the ioctl failed".into())
}

fn is_the_failure(error: &Error) -> bool {
    match error {
        Error::Apply(failure) => failure.cause.to_string() == "the ioctl failed",
        _ => false,
    }
}

#[test]
fn threads_that_wait_by_the_time_page_get_the_failure_and_the_next_attempt() {
    let backend = spawn(options()).unwrap();
    let frontend = backend.frontend();
    frontend.time_page().start(frontend.queue(), LIMIT).unwrap();
    let hypervisor = Hypervisor::default();
    let mut restore = restore_in(&backend);
    let mut parts: Vec<_> = restore.vcpus().collect();
    restore.bring_all_back(LIMIT).unwrap();
    assert_eq!(frontend.time_page().read().unwrap().phase, Phase::Armed);
    thread::scope(|scope| {
        let waiting: Vec<_> = parts
            .iter_mut()
            .map(|part| scope.spawn(|| part.run_by_page(LIMIT)))
            .collect();
        assert!(is_the_failure(&restore.apply(LIMIT, fails).unwrap_err()));
        for thread in waiting {
            assert!(is_the_failure(&thread.join().unwrap().unwrap_err()));
        }
    });
    assert_eq!(phase(&backend), Phase::Armed);
    thread::scope(|scope| {
        for part in &mut parts {
            scope.spawn(|| {
                let offsets = part.run_by_page(LIMIT).unwrap();
                assert_eq!(offsets.cntvoff, hypervisor.offset());
            });
        }
        restore.apply(LIMIT, |info| hypervisor.apply(info)).unwrap();
    });
    assert_eq!(phase(&backend), Phase::Running);
}

#[test]
fn a_restore_that_is_given_up_in_armed_leaves_the_vm_as_it_was_and_no_vcpu_runs() {
    let backend = spawn(options()).unwrap();
    let frontend = backend.frontend();
    let queue = frontend.queue();
    let frequency = Some(saved().frequency());
    queue
        .configure_with(VCPUS, Abi::Arm64, frequency, VmOptions::KVM, LIMIT)
        .unwrap();
    let before = queue.get_vm(0, VCPUS, LIMIT).unwrap();
    for by_page in [false, true] {
        let mut restore = restore_in(&backend);
        if by_page {
            frontend.time_page().start(queue, LIMIT).unwrap();
        }
        let mut parts: Vec<_> = restore.vcpus().collect();
        thread::scope(|scope| {
            let waiting: Vec<_> = parts
                .iter_mut()
                .map(|part| {
                    scope.spawn(move || match by_page {
                        true => part.run_by_page(LIMIT).map(drop),
                        false => part.run(LIMIT).map(drop),
                    })
                })
                .collect();
            restore.wait(LIMIT).unwrap();
            drop(restore);
            for thread in waiting {
                let error = thread.join().unwrap().unwrap_err();
                assert_eq!(error.status(), Some(Status::Canceled), "{error:?}");
            }
        });
        let after = queue.get_vm(0, VCPUS, LIMIT).unwrap();
        assert_eq!(
            (after.vcpus, after.virt_count),
            (before.vcpus.clone(), before.virt_count)
        );
        // A vCPU that comes later, into a VM that runs, was not restored either.
        frontend.resume_with(LIMIT, |_| Ok(())).unwrap();
        let mut late = parts.pop().unwrap();
        let error = late.run_by_page(LIMIT).unwrap_err();
        assert_eq!(error.status(), Some(Status::Canceled), "{error:?}");
        let error = late.run(LIMIT).unwrap_err();
        assert_eq!(error.status(), Some(Status::Canceled), "{error:?}");
        queue.pause(LIMIT).unwrap();
        let cnt = vhost_user_timer_frontend::RegValue::new(
            Register::TimerCnt.id(Abi::Arm64),
            before.virt_count,
        );
        queue.set_regs(0, &[cnt], LIMIT).unwrap();
    }
}

#[test]
fn the_largest_vm_is_restored_by_two_requests_and_its_threads_wait_by_the_page() {
    const MOST: u32 = 4096;
    const WAITING: u32 = 32;
    let backend = spawn(options().arg(format!("--max-vcpus={MOST}"))).unwrap();
    let frontend = backend.frontend();
    frontend.time_page().start(frontend.queue(), LIMIT).unwrap();
    let vcpus = (0..MOST).map(|index| {
        SavedVcpu::new(index)
            .with(Register::TimerCtl, 1)
            .with(Register::TimerCval, 7)
            .with(Register::TimerCnt, u64::from(index))
    });
    let saved = SavedVm::new(Abi::Arm64, saved().frequency(), vcpus.collect()).unwrap();
    let options = RestoreOptions::default().vm(VmOptions::KVM);
    let restore = frontend.restore(&saved, options).unwrap();
    let hypervisor = Hypervisor::default();
    restore.bring_all_back(LIMIT).unwrap();
    thread::scope(|scope| {
        for mut part in restore.vcpus().take(WAITING as usize) {
            let hypervisor = &hypervisor;
            scope.spawn(move || {
                let offsets = part.run_by_page(LIMIT).unwrap();
                assert_eq!(offsets.cntvoff, hypervisor.offset());
            });
        }
        let run = restore.finish_with(LIMIT, |info| hypervisor.apply(info));
        assert!(run.unwrap().virt_count >= u64::from(MOST - 1));
    });
}
