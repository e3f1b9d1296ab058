//! A backend that is started on the state file of an earlier one goes on where that one was,
//! whether it was killed or told to end. A file that it cannot use is refused, with a message.

mod armed;
mod clocks_and_timers;
mod files;
mod replaced;
mod restores;

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
use vhost_user_timer_kit::state_file;
use vhost_user_timer_kit::time_out::with_a_time_out;
use vhost_user_timer_kit::watch::{HOST_FREQUENCY, host_count};
use vhost_user_timer_protocol::wire::ctl;
use vhost_user_timer_protocol::{Abi, Phase, Register, Status};

/// A wait that takes longer is a hang.
const LIMIT: Duration = Duration::from_secs(30);

/// Where the VM's record begins in the second slot of a state file.
const VM_RECORD: usize = state_file::VM_SLOTS[1] + state_file::SLOT_HEAD;

/// A VM that outlives its backends.
struct Life {
    folder: TempDir,
    /// Options besides --state-file.
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

    /// Checks that a backend with these options does not start. Returns its message.
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

    fn flip(&self, at: usize) {
        self.edit(|bytes| {
            let mut bytes = bytes.to_vec();
            bytes[at] ^= 1;
            bytes
        });
    }

    fn edit(&self, edit: impl FnOnce(&[u8]) -> Vec<u8>) {
        let bytes = std::fs::read(self.file()).unwrap();
        state_file::write(&self.file(), &edit(&bytes)).unwrap();
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

/// A restore of three vCPUs goes on: vCPU 0 is done with count 9,000, vCPU 1 has brought 5,000, and
/// vCPU 2 nothing. All wait, and pass the gate together.
#[track_caller]
fn the_gate_opens_at_the_last_vcpu(queue: &RequestQueue) {
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

/// The next TIMER_ASSERTED. The VM's phase may change meanwhile.
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
