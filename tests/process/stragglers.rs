//! vCPUs that come late to a restore, or never: the missing ones are named, none runs early, and
//! the VMM can keep waiting, give up, or begin again.

use std::num::NonZeroU64;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use vhost_user_timer_frontend::{
    Frontend, Operation, Options, RegValue, RequestQueue, RestoreOptions, Run, SavedVcpu, Ticket,
};
use vhost_user_timer_kit::backend_process::BackendProcess;
use vhost_user_timer_kit::time_out::with_a_time_out;
use vhost_user_timer_kit::watch::HOST_FREQUENCY;
use vhost_user_timer_protocol::wire::ctl;
use vhost_user_timer_protocol::{Abi, IndexRanges, Phase, Register, Status};

/// A wait that takes longer is a hang.
const LIMIT: Duration = Duration::from_secs(30);

const VCPUS: u32 = 64;
const MISSING: [u32; 3] = [7, 12, 13];

const SECOND: u64 = HOST_FREQUENCY;

struct Served {
    backend: BackendProcess,
    frontend: Frontend,
}

impl Served {
    fn launch(vcpus: u32) -> Self {
        let backend = BackendProcess::launch::<&str>(&[]).unwrap();
        let options = Options::default().timeout(LIMIT);
        let frontend = Frontend::connect(backend.socket_path(), options).unwrap();
        let queue = frontend.queue();
        queue
            .configure(vcpus, Abi::Arm64, NonZeroU64::new(HOST_FREQUENCY), LIMIT)
            .unwrap();
        Served { backend, frontend }
    }

    fn queue(&self) -> &RequestQueue {
        self.frontend.queue()
    }

    fn begin(&self, options: RestoreOptions) {
        self.queue().restore_begin(options, LIMIT).unwrap();
    }

    fn phase(&self) -> Phase {
        self.queue().info(LIMIT).unwrap().phase
    }

    /// Has all vCPUs but the missing ones done and waiting at the backend.
    fn all_but_stragglers_wait(&self) -> Vec<Ticket<Run>> {
        let queue = self.queue();
        let rows: Vec<_> = (0..VCPUS).map(|vcpu| row(vcpu, 1_000)).collect();
        queue.set_vm(&rows, LIMIT).unwrap();
        let present = (0..VCPUS).filter(|vcpu| !MISSING.contains(vcpu));
        let done: Vec<_> = present
            .clone()
            .map(|vcpu| queue.submit(&Operation::restore_done(vcpu)).unwrap())
            .collect();
        let waits = present.map(|vcpu| queue.submit(&Operation::wait_run(vcpu)).unwrap());
        let waits = waits.collect();
        queue.kick();
        for done in done {
            done.wait(LIMIT).unwrap();
        }
        // Requests of one queue are carried out in order.
        queue.info(LIMIT).unwrap();
        waits
    }

    /// Ends the backend, and returns its log. A process that ends writes what is not yet written
    /// for a second at most, so what must be in the log is waited for before.
    fn into_log(self) -> String {
        let Served { mut backend, .. } = self;
        assert!(backend.terminate().success());
        backend.log()
    }
}

/// With a time-out that does not pass.
fn options() -> RestoreOptions {
    RestoreOptions::default()
        .autorun(true)
        .timeout(Duration::from_secs(3_600))
}

fn row(vcpu: u32, count: u64) -> SavedVcpu {
    let mut row = SavedVcpu::new(vcpu);
    row.set(Register::TimerCtl, ctl::IMASK);
    row.set(Register::TimerCval, 5);
    row.set(Register::TimerCnt, count);
    row
}

fn all_refused(waits: Vec<Ticket<Run>>, status: Status, detail: u32) {
    for wait in waits {
        let error = wait.wait(LIMIT).unwrap_err();
        let refusal = error.refusal().unwrap_or_else(|| panic!("{error}"));
        assert_eq!((refusal.status, refusal.detail), (status, detail));
    }
}

fn realtime_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec as u64 * SECOND + now.tv_nsec as u64
}

#[test]
fn the_missing_vcpus_are_named_as_ranges_by_the_log_and_by_the_library() {
    let served = with_a_time_out(|time_out| {
        let served = Served::launch(VCPUS);
        served.begin(options().timeout(time_out.length()));
        let waits = served.all_but_stragglers_wait();
        time_out.scene_is_set()?;
        all_refused(waits, Status::TimedOut, 3);
        Some(served)
    });
    let queue = served.queue();
    let missing = queue.missing_vcpus(LIMIT).unwrap();
    assert_eq!(missing, MISSING);
    assert_eq!(IndexRanges(&missing).to_string(), "7, 12-13");

    // Late, but not too late.
    for (vcpu, remaining) in MISSING.into_iter().zip([2, 1, 0]) {
        assert_eq!(served.phase(), Phase::Restoring);
        assert_eq!(queue.restore_done(vcpu, LIMIT).unwrap(), remaining);
    }
    assert_eq!(queue.missing_vcpus(LIMIT).unwrap(), [0; 0]);
    let run = queue.wait_run(0, LIMIT).unwrap();
    let late = queue.wait_run(7, LIMIT).unwrap();
    assert_eq!((run.cntvoff, run.cntpoff), (late.cntvoff, late.cntpoff));
    assert!(run.virt_count >= 1_000);
    served
        .backend
        .log_with("Restore timed out: 3 of 64 vCPUs missing: 7, 12-13; it stays open");
    let log = served.into_log();
    assert_eq!(log.matches("timed out").count(), 1, "it is told once");
}

#[test]
fn a_restore_that_takes_too_long_can_be_given_up() {
    let served = Served::launch(VCPUS);
    let queue = served.queue();
    let cnt = Register::TimerCnt.id(Abi::Arm64);
    queue.set_regs(0, &[RegValue::new(cnt, 77)], LIMIT).unwrap();
    served.begin(options());
    let waits = served.all_but_stragglers_wait();
    queue.restore_abort(LIMIT).unwrap();
    all_refused(waits, Status::Canceled, 0);
    assert_eq!(served.phase(), Phase::Paused);
    let vm = queue.get_vm(0, 1, LIMIT).unwrap();
    assert_eq!(
        (vm.virt_count, vm.vcpus[0].get(Register::TimerCval)),
        (77, Some(0))
    );
    let log = served.into_log();
    assert!(!log.contains("timed out"), "{log}");
}

#[test]
fn a_restore_can_begin_again_and_keeps_nothing_of_the_one_before() {
    let served = Served::launch(VCPUS);
    let queue = served.queue();
    served.begin(options());
    let waits = served.all_but_stragglers_wait();
    served.begin(options());
    all_refused(waits, Status::Stale, 0);
    let info = queue.info(LIMIT).unwrap();
    assert_eq!((info.epoch, info.restored), (3, 0));

    // A straggler of the previous restore learns that it is over.
    let late = Operation::restore_done(7).in_epoch(2);
    let stale = queue.perform(&late, LIMIT).unwrap_err();
    assert_eq!(stale.status(), Some(Status::Stale));
    let lacking = queue.restore_done(0, LIMIT).unwrap_err();
    let missing: Vec<_> = lacking.refusal().unwrap().missing_registers().collect();
    assert_eq!(
        missing,
        [Register::TimerCtl, Register::TimerCnt, Register::TimerCval]
    );

    let waits = served.all_but_stragglers_wait();
    for vcpu in MISSING {
        queue.restore_done(vcpu, LIMIT).unwrap();
    }
    let runs: Vec<_> = waits
        .into_iter()
        .map(|wait| wait.wait(LIMIT).unwrap())
        .collect();
    assert!(runs.iter().all(|run| *run == runs[0]));
    assert_eq!(runs[0].virt_count, 1_000);
}

#[test]
fn with_strict_a_vcpu_that_brings_another_count_keeps_the_restore_open_until_it_agrees() {
    let served = Served::launch(3);
    let queue = served.queue();
    let strict = options().strict(true);
    served.begin(strict);
    for vcpu in 0..2 {
        queue.restore_vcpu(&row(vcpu, 1_000), LIMIT).unwrap();
    }
    for other in [999, 1_001, u64::MAX] {
        let unequal = queue.restore_vcpu(&row(2, other), LIMIT).unwrap_err();
        assert_eq!(unequal.status(), Some(Status::Invalid));
        assert_eq!(served.phase(), Phase::Restoring);
    }
    assert_eq!(queue.restore_vcpu(&row(2, 1_000), LIMIT).unwrap(), 0);
    assert!(queue.wait_run(2, LIMIT).unwrap().virt_count >= 1_000);
}

#[test]
fn the_time_since_the_save_is_added_by_the_wall_clock_and_none_where_that_went_back() {
    let served = Served::launch(1);
    let queue = served.queue();
    let restored = |since: u64| {
        let elapsed = RestoreOptions::default().elapsed_since(since);
        served.begin(elapsed);
        queue.restore_vcpu(&row(0, 5_000), LIMIT).unwrap();
        queue.get_vm(0, 1, LIMIT).unwrap().virt_count
    };
    for hours in [1, 24 * 365] {
        let ago = hours * 3_600 * SECOND;
        let since = realtime_ns() - ago;
        let count = restored(since);
        let by_now = 5_000 + (realtime_ns() - since);
        assert!((5_000 + ago..=by_now).contains(&count), "{count}");
    }
    assert_eq!(restored(realtime_ns() + 3_600 * SECOND), 5_000);
    served
        .backend
        .log_with("Restore with ELAPSED: the state was saved 35");
    let log = served.into_log();
    assert_eq!(log.matches("nothing is added").count(), 1, "{log}");
}
