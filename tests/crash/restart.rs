//! A backend that is started on the state file of another goes on where that one was, whether it
//! was killed or told to end; and what is no state file for it is refused, with a message.

use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost_user_timer_frontend::{
    Deadline, Event, EventStream, Frontend, Info, Operation, Options, RegValue, RequestQueue,
    RestoreOptions, SavedVcpu, Timer, Vm,
};
use vhost_user_timer_kit::backend_process::BackendProcess;
use vhost_user_timer_kit::watch::{HOST_FREQUENCY, host_count};
use vhost_user_timer_protocol::wire::ctl;
use vhost_user_timer_protocol::{Abi, Phase, Register, Status};

/// Something that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Where the boot id begins in a state file, and the VM's record in its second slot.
const BOOT_ID: usize = 24;
const VM_RECORD: usize = 128 + 256 + 16;

/// A VM that outlives its backends.
struct Life {
    folder: TempDir,
    /// Options besides that of the state file.
    args: Vec<String>,
}

struct Served {
    backend: BackendProcess,
    frontend: Frontend,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Killed,
    Terminated,
}

const ENDS: [End; 2] = [End::Killed, End::Terminated];

impl Life {
    fn new() -> Self {
        Life {
            folder: tempfile::tempdir().unwrap(),
            args: Vec::new(),
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn launch(&self, args: &[&str]) -> BackendProcess {
        let mut all = vec![format!("--state-file={}", self.file().display())];
        all.extend(self.args.iter().cloned());
        all.extend(args.iter().map(|arg| (*arg).to_owned()));
        BackendProcess::launch(&all).unwrap()
    }

    fn serve(&self) -> Served {
        let backend = self.launch(&[]);
        let options = Options::default().timeout(LIMIT);
        let connected = Frontend::connect(backend.socket_path(), options);
        let frontend = connected.unwrap_or_else(|error| panic!("{error}: {}", backend.log()));
        Served { backend, frontend }
    }

    /// A backend with these options does not come up. Returns what it says of it.
    fn refused(&self, args: &[&str]) -> String {
        let before = std::fs::read(self.file()).unwrap();
        let mut backend = self.launch(args);
        let status = backend.wait(LIMIT);
        assert_eq!(status.code(), Some(1), "{}", backend.log());
        assert_eq!(
            std::fs::read(self.file()).unwrap(),
            before,
            "the file is as it was"
        );
        backend.log()
    }

    fn patch(&self, at: usize) {
        let mut bytes = std::fs::read(self.file()).unwrap();
        bytes[at] ^= 1;
        std::fs::write(self.file(), bytes).unwrap();
    }
}

impl Served {
    fn queue(&self) -> &RequestQueue {
        self.frontend.queue()
    }

    fn configure(&self, vcpus: u32) {
        let queue = self.queue();
        queue
            .configure(vcpus, Abi::Arm64, NonZeroU64::new(HOST_FREQUENCY), LIMIT)
            .unwrap();
    }

    fn set(&self, vcpu: u32, register: Register, value: u64) {
        let entry = RegValue::new(register.id(Abi::Arm64), value);
        self.queue().set_regs(vcpu, &[entry], LIMIT).unwrap();
    }

    fn begin_restore(&self, options: RestoreOptions) {
        self.queue().restore_begin(options, LIMIT).unwrap();
    }

    fn info(&self) -> Info {
        self.queue().info(LIMIT).unwrap()
    }

    fn vm(&self, vcpus: u32) -> Vm {
        self.queue().get_vm(0, vcpus, LIMIT).unwrap()
    }

    fn events(&mut self) -> EventStream {
        self.frontend.take_events().unwrap()
    }

    fn end(mut self, end: End) {
        match end {
            End::Killed => assert_eq!(self.backend.kill().code(), None),
            End::Terminated => assert!(self.backend.terminate().success()),
        }
    }
}

fn autorun() -> RestoreOptions {
    RestoreOptions::default().autorun(true)
}

/// All six registers, with this count.
fn row(vcpu: u32, count: u64) -> SavedVcpu {
    let mut row = SavedVcpu::new(vcpu);
    for register in Register::ALL {
        row.set(register, u64::from(vcpu) << 32 | 1 << 60);
    }
    row.set(Register::TimerCtl, ctl::IMASK);
    row.set(Register::PtimerCtl, 0);
    row.set(Register::TimerCnt, count);
    row.set(Register::PtimerCnt, count + 7);
    row
}

/// Only a timer's assertions; the VM's phase may change meanwhile.
fn next_assertion(events: &mut EventStream) -> (u32, Timer, u64, u64) {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Event::TimerAsserted {
            vcpu,
            timer,
            cval,
            count,
            ..
        } = events.next(deadline).unwrap()
        {
            return (vcpu, timer, cval, count);
        }
    }
}

#[test]
fn a_running_vm_goes_on_with_its_offsets_and_registers() {
    for end in ENDS {
        let life = Life::new();
        let served = life.serve();
        served.configure(3);
        served.begin_restore(autorun());
        for vcpu in 0..3 {
            served
                .queue()
                .restore_vcpu(&row(vcpu, 1 << 50), LIMIT)
                .unwrap();
        }
        let (info, vm) = (served.info(), served.vm(3));
        served.end(end);

        let served = life.serve();
        let (info_after, vm_after) = (served.info(), served.vm(3));
        assert_eq!(info_after.phase, Phase::Running, "{end:?}");
        assert_eq!(info_after.epoch, 2);
        assert_eq!(info_after.cntvoff, info.cntvoff);
        assert_eq!(info_after.cntpoff, info.cntpoff);
        assert!(info_after.phys_virtualised);
        assert!(vm_after.virt_count > vm.virt_count && vm_after.phys_count > vm.phys_count);
        for (before, after) in vm.vcpus.iter().zip(&vm_after.vcpus) {
            for register in [
                Register::TimerCtl,
                Register::TimerCval,
                Register::PtimerCval,
            ] {
                assert_eq!(after.get(register), before.get(register));
            }
        }
        assert!(served.backend.log().contains("Going on with the VM"));
    }
}

#[test]
fn a_paused_vm_stays_at_its_count() {
    for end in ENDS {
        let life = Life::new();
        let served = life.serve();
        served.configure(1);
        served.queue().resume(LIMIT).unwrap();
        let run = served.queue().pause(LIMIT).unwrap();
        served.end(end);
        let served = life.serve();
        assert_eq!(served.vm(1).virt_count, run.virt_count);
        assert_eq!(
            served.queue().resume(LIMIT).unwrap().virt_count,
            run.virt_count
        );
    }
}

#[test]
fn the_count_goes_on_at_its_rate_whatever_it_is_derived_from() {
    for source in ["monotonic", "boottime", "tsc"] {
        let mut life = Life::new();
        life.args = vec![format!("--counter-source={source}")];
        let mut backend = life.launch(&[]);
        if backend.exit_within(Duration::from_millis(200)).is_some() {
            eprintln!("{source} is not to be had here: {}", backend.log());
            continue;
        }
        drop(backend);

        let served = life.serve();
        served.configure(1);
        served.queue().resume(LIMIT).unwrap();
        let started = Instant::now();
        let before = served.vm(1);
        let offset = served.info().cntvoff;
        served.end(End::Killed);
        let served = life.serve();
        let after = served.vm(1);
        let most = started.elapsed().as_nanos() as u64;
        assert_eq!(served.info().cntvoff, offset, "{source}");
        let passed = after.virt_count - before.virt_count;
        // A hundredth more, since the TSC's rate is measured.
        assert!(
            (1..=most + most / 100).contains(&passed),
            "{source}: {passed} of {most} ns"
        );
    }
}

#[test]
fn a_timer_that_fell_due_meanwhile_fires_at_once_and_a_later_one_when_it_is_due() {
    let life = Life::new();
    let served = life.serve();
    served.configure(3);
    let start = served.queue().resume(LIMIT).unwrap();
    let soon = start.virt_count + 20_000_000;
    let later = start.phys_count + 400_000_000;
    served.set(1, Register::TimerCval, soon);
    served.set(1, Register::TimerCtl, ctl::ENABLE);
    served.set(2, Register::PtimerCval, later);
    served.set(2, Register::PtimerCtl, ctl::ENABLE);
    served.set(0, Register::TimerCval, soon);
    served.set(0, Register::TimerCtl, ctl::ENABLE | ctl::IMASK);
    served.end(End::Killed);
    while host_count().wrapping_sub(start.cntvoff) < soon {
        std::thread::yield_now();
    }

    let mut served = life.serve();
    let mut events = served.events();
    let (vcpu, timer, cval, count) = next_assertion(&mut events);
    assert_eq!((vcpu, timer, cval), (1, Timer::Virtual, soon));
    assert!(count >= soon);
    let (vcpu, timer, cval, count) = next_assertion(&mut events);
    assert_eq!((vcpu, timer, cval), (2, Timer::Physical, later));
    assert!(count >= later);
    assert!(
        events.try_next().unwrap().is_none(),
        "a masked timer never fires"
    );
}

#[test]
fn an_expiry_that_nobody_may_have_read_is_told_again() {
    let life = Life::new();
    let mut served = life.serve();
    served.configure(1);
    served.set(0, Register::TimerCtl, ctl::ENABLE);
    served.queue().resume(LIMIT).unwrap();
    assert_eq!(next_assertion(&mut served.events()).0, 0);
    served.end(End::Killed);
    let mut served = life.serve();
    assert_eq!(next_assertion(&mut served.events()).0, 0);
}

#[test]
fn a_restore_goes_on_and_the_gate_opens_at_the_last_vcpu() {
    for end in ENDS {
        let life = Life::new();
        let served = life.serve();
        served.configure(3);
        served.begin_restore(autorun());
        let queue = served.queue();
        queue.set_vm(&[row(1, 5_000)], LIMIT).unwrap();
        assert_eq!(queue.restore_vcpu(&row(0, 9_000), LIMIT).unwrap(), 2);
        let waits = queue.submit(&Operation::wait_run(0)).unwrap();
        queue.kick();
        served.info();
        served.end(end);
        assert!(waits.wait(LIMIT).is_err(), "nobody runs");

        let served = life.serve();
        let queue = served.queue();
        let info = served.info();
        assert_eq!(
            (info.phase, info.epoch, info.restored),
            (Phase::Restoring, 2, 1)
        );
        // A vCPU that is done stays done, and what another brought is there.
        let entry = RegValue::new(Register::TimerCval.id(Abi::Arm64), 1);
        let busy = queue.set_regs(0, &[entry], LIMIT).unwrap_err();
        assert_eq!(busy.status(), Some(Status::Busy));
        let lacking = queue.restore_done(2, LIMIT).unwrap_err();
        assert_eq!(lacking.status(), Some(Status::Incomplete));
        let waits: Vec<_> = (0..3)
            .map(|vcpu| queue.submit(&Operation::wait_run(vcpu)).unwrap())
            .collect();
        queue.kick();
        assert_eq!(queue.restore_done(1, LIMIT).unwrap(), 1);
        assert_eq!(queue.restore_vcpu(&row(2, 4_000), LIMIT).unwrap(), 0);
        let runs: Vec<_> = waits
            .into_iter()
            .map(|wait| wait.wait(LIMIT).unwrap())
            .collect();
        assert!(runs.iter().all(|run| *run == runs[0]), "{runs:?}");
        assert_eq!((runs[0].virt_count, runs[0].phys_count), (9_000, 9_007));
    }
}

#[test]
fn a_restore_that_is_aborted_after_a_restart_leads_back_to_the_vm_from_before() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    served.set(1, Register::TimerCval, 77);
    served.set(0, Register::TimerCnt, 123_456);
    served.begin_restore(autorun());
    served
        .queue()
        .set_vm(&[row(0, 5), row(1, 6)], LIMIT)
        .unwrap();
    served.end(End::Killed);
    let served = life.serve();
    served.queue().restore_abort(LIMIT).unwrap();
    let vm = served.vm(2);
    assert_eq!(served.info().phase, Phase::Paused);
    assert_eq!(
        (vm.virt_count, vm.vcpus[1].get(Register::TimerCval)),
        (123_456, Some(77))
    );
    assert_eq!(vm.vcpus[0].get(Register::TimerCval), Some(0));
}

#[test]
fn a_restores_time_out_goes_on() {
    for (dead_until_it_passed, ms) in [(false, 1_500), (true, 200)] {
        let timeout = Duration::from_millis(ms);
        let life = Life::new();
        let served = life.serve();
        served.configure(4);
        let began = Instant::now();
        let options = autorun().timeout(timeout);
        served.begin_restore(options);
        served.queue().restore_vcpu(&row(1, 5), LIMIT).unwrap();
        served.end(End::Killed);
        while dead_until_it_passed && began.elapsed() <= timeout {
            std::thread::yield_now();
        }

        let mut served = life.serve();
        if dead_until_it_passed {
            // Whether or not anybody waits, the log says it.
            let deadline = Instant::now() + LIMIT;
            while !served.backend.log().contains("timed out") && Instant::now() < deadline {
                served.info();
            }
        } else {
            let late = served.queue().wait_run(1, LIMIT).unwrap_err();
            let refusal = late.refusal().unwrap();
            assert_eq!((refusal.status, refusal.detail), (Status::TimedOut, 3));
        }
        assert!(began.elapsed() >= timeout);
        let info = served.info();
        assert_eq!((info.phase, info.restored), (Phase::Restoring, 1));
        assert!(served.backend.terminate().success());
        let log = served.backend.log();
        assert!(log.contains("3 of 4 vCPUs missing: 0, 2-3"), "{log}");
    }
}

#[test]
fn a_time_out_that_has_passed_does_not_pass_again() {
    let life = Life::new();
    let served = life.serve();
    served.configure(1);
    let options = autorun().timeout(Duration::from_nanos(1));
    served.begin_restore(options);
    // By the next request it has passed.
    served.info();
    served.end(End::Killed);
    let mut served = life.serve();
    served.info();
    assert!(served.backend.terminate().success());
    assert!(
        !served.backend.log().contains("timed out"),
        "{}",
        served.backend.log()
    );
}

#[test]
fn a_pinned_offset_and_an_anchor_are_kept() {
    let life = Life::new();
    let served = life.serve();
    served.configure(1);
    let queue = served.queue();
    queue
        .set_counter_anchor(host_count(), 1 << 60, LIMIT)
        .unwrap();
    queue.set_counter_offset(1 << 59, LIMIT).unwrap();
    queue.resume(LIMIT).unwrap();
    let before = served.vm(1);
    served.end(End::Killed);
    let served = life.serve();
    let info = served.info();
    assert!(info.offset_pinned && info.anchored && info.phys_virtualised);
    assert_eq!((info.cntvoff, info.cntpoff), (1 << 59, 1 << 59));
    assert!(served.vm(1).virt_count > before.virt_count);
}

#[test]
fn a_vm_that_was_reset_stays_new_in_its_epoch() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    served.begin_restore(autorun());
    served.frontend.reset_device().unwrap();
    served.end(End::Killed);
    let served = life.serve();
    let info = served.info();
    assert_eq!((info.phase, info.vcpus, info.epoch), (Phase::New, 0, 2));
    served.configure(1);
    assert_eq!(served.vm(1).vcpus.len(), 1);
}

#[test]
fn the_file_is_private() {
    let life = Life::new();
    let _served = life.serve();
    let mode = std::fs::metadata(life.file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_second_backend_on_the_same_file_is_refused_and_the_first_goes_on() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    let log = life.refused(&[]);
    assert!(log.contains("is in use by another backend"), "{log}");
    assert_eq!(served.info().vcpus, 2);
}

#[test]
fn a_vm_of_another_boot_is_begun_anew_with_a_warning() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    served.end(End::Killed);
    life.patch(BOOT_ID);
    let served = life.serve();
    assert_eq!(served.info().phase, Phase::New);
    let log = served.backend.log();
    assert!(log.contains(": the host was rebooted since"), "{log}");
    // From now on it is of this boot.
    served.configure(1);
    served.end(End::Killed);
    assert_eq!(life.serve().info().vcpus, 1);
}

#[test]
fn what_a_backend_cannot_go_on_with_is_refused_and_left_as_it_is() {
    let life = Life::new();
    let served = life.serve();
    served.configure(8);
    served.end(End::Terminated);
    let log = life.refused(&["--max-vcpus=7"]);
    assert!(log.contains("8 vCPUs, and this backend takes 7"), "{log}");
    let log = life.refused(&["--counter-source=boottime"]);
    assert!(log.contains("--counter-source"), "{log}");
    assert_eq!(life.serve().info().vcpus, 8);

    life.patch(VM_RECORD);
    let log = life.refused(&[]);
    assert!(log.contains("is damaged (the VM's record"), "{log}");
    life.patch(VM_RECORD);
    assert_eq!(life.serve().info().vcpus, 8);

    std::fs::write(life.file(), "my diary").unwrap();
    let log = life.refused(&[]);
    assert!(log.contains("is not a state file"), "{log}");
}

#[test]
fn a_file_that_cannot_be_made_is_refused() {
    let mut backend = BackendProcess::launch(&["--state-file=/nowhere/at/all"]).unwrap();
    assert_eq!(backend.wait(LIMIT).code(), Some(1));
    assert!(
        backend
            .log()
            .contains("Opening the state file /nowhere/at/all"),
        "{}",
        backend.log()
    );
}

#[test]
fn a_backend_for_more_vcpus_goes_on_with_the_vm() {
    let mut life = Life::new();
    life.args = vec!["--max-vcpus=2".to_owned()];
    let served = life.serve();
    served.configure(2);
    served.set(1, Register::TimerCval, 99);
    served.end(End::Killed);
    life.args = vec!["--max-vcpus=100".to_owned()];
    let served = life.serve();
    assert_eq!(served.vm(2).vcpus[1].get(Register::TimerCval), Some(99));
    served.frontend.reset_device().unwrap();
    served.configure(100);
    served.set(99, Register::TimerCval, 98);
    served.end(End::Killed);
    let row = life.serve().queue().get_vm(99, 1, LIMIT).unwrap().vcpus[0];
    assert_eq!(row.get(Register::TimerCval), Some(98));
}

#[test]
fn the_last_restore_done_lets_those_run_who_ask_after_a_restart() {
    let life = Life::new();
    let served = life.serve();
    served.configure(2);
    served.begin_restore(autorun());
    for vcpu in 0..2 {
        served
            .queue()
            .restore_vcpu(&row(vcpu, 1_000), LIMIT)
            .unwrap();
    }
    let run = served.queue().wait_run(0, LIMIT).unwrap();
    served.end(End::Killed);
    let served = life.serve();
    let again = served.queue().wait_run(1, Deadline::from(LIMIT)).unwrap();
    assert_eq!((again.cntvoff, again.cntpoff), (run.cntvoff, run.cntpoff));
    assert!(again.host_count > run.host_count);
}
