//! A VM that outlives its backends: the naive one that SPEC.md's text describes. It can serve a
//! request and keep the answer to itself, like a backend that is killed just then.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vhost_user_backend::ShutdownHandle;
use vhost_user_timer_frontend::{Frontend, Options};
use vhost_user_timer_protocol::wire::{self, RequestHeader, configure_flags, restore_flags};
use vhost_user_timer_protocol::{CounterSource, MAX_MESSAGE, Op, Phase};
use vhost_user_timer_reference::{Ask, Profile, Reference, Waiter, whole_vcpu};
use zerocopy::{FromBytes, IntoBytes};

use super::{Fake, connect, info, run_of, serve, socket_path, unless_late};

/// The number of vCPUs, unless a test names another.
pub(crate) const VCPUS: u32 = 4;

/// The epoch that a VM begins with here, so that another VM's can be told from it.
const EPOCH: u64 = 7;

/// Where every answer goes: the fake keeps the requests that it holds.
const WAITER: Waiter = Waiter { queue: 1, head: 0 };

/// When a request is lost with its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Never.
    No,
    /// After it was served.
    Done,
    /// Before it was seen.
    Unseen,
}

pub(crate) struct Vm {
    vcpus: u32,
    /// CONFIGURE_VM's flags.
    options: u8,
    reference: Reference,
    /// How many SET_REGS and SET_VM were granted.
    pub(crate) writes: u32,
    /// Requests as they came: operation, and epoch in the header.
    pub(crate) log: Vec<(Op, u64)>,
    /// What is lost on this connection.
    pub(crate) lost: fn(Op) -> Lost,
}

/// A VM, configured with these options, in this phase and epoch. In RESTORING these vCPUs are done,
/// and the others lack nothing else. ARMED is reached by RESUME.
fn reference(
    (vcpus, options): (u32, u8),
    phase: Phase,
    epoch: u64,
    done: &[u32],
    flags: u32,
) -> Reference {
    let profile = Profile {
        max_vcpus: info().max_vcpus.get(),
        request_queues: info().request_queues.get(),
        frequency: info().frequency.get(),
        frequency_fixed: false,
        source: CounterSource::Cntvct.code(),
    };
    let mut vm = Reference::new(profile, 0, 0);
    let mut grant = |ask: Ask| {
        let answer = vm.handle(&ask.bytes(), ask.room, WAITER).unwrap();
        assert_eq!(answer[..4], [0; 4], "{ask:?}");
    };
    grant(Ask::configure_with(vcpus, 0, options, 0));
    let restoring = phase == Phase::Restoring;
    for _ in 1..epoch - u64::from(restoring) {
        grant(Ask::begin(vcpus, 0));
        grant(Ask::abort());
    }
    match phase {
        Phase::Running | Phase::Armed => grant(Ask::resume()),
        Phase::Restoring => {
            grant(Ask::begin(vcpus, flags));
            let rows: Vec<_> = (0..vcpus).map(|vcpu| whole_vcpu(vcpu, [0; 6])).collect();
            grant(Ask::set_vm(&rows));
            for vcpu in done {
                grant(Ask::restore_done(*vcpu));
            }
        }
        _ => {}
    }
    match phase {
        Phase::New => vm.reset(),
        Phase::Running if vm.phase() == Phase::Armed.code() => {
            let info = info_of(&vm);
            let confirm = Ask::confirm(info.cntvoff.get(), info.cntpoff.get());
            let answer = vm.handle(&confirm.bytes(), confirm.room, WAITER).unwrap();
            assert_eq!(answer[..4], [0; 4]);
        }
        _ => {}
    }
    assert_eq!((vm.phase(), vm.epoch()), (phase.code(), epoch));
    vm
}

impl Vm {
    fn handle(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, _) = RequestHeader::ref_from_prefix(bytes).unwrap();
        let op = Op::from(header.op.get());
        self.log.push((op, header.epoch.get()));
        let lost = (self.lost)(op);
        if lost == Lost::Unseen {
            return None;
        }
        let mut answer = self.reference.handle(bytes, MAX_MESSAGE, WAITER)?;
        let granted = answer[..4] == [0; 4];
        self.writes += u32::from(granted && matches!(op, Op::SetRegs | Op::SetVm));
        if granted && op == Op::WaitRun {
            // A `run` that tells the vCPU.
            answer[16..].copy_from_slice(run_of(header.vcpu.get()).as_bytes());
        }
        (lost == Lost::No).then_some(answer)
    }

    pub(crate) fn phase(&self) -> Phase {
        Phase::from_code(self.reference.phase()).unwrap()
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.reference.epoch()
    }

    /// How many vCPUs are done in the open restore.
    pub(crate) fn done(&self) -> usize {
        self.vcpus as usize - self.reference.missing().len()
    }

    /// What the config space says.
    pub(crate) fn info(&self) -> wire::Info {
        info_of(&self.reference)
    }

    /// Lets time pass.
    pub(crate) fn pass(&mut self, ns: u64) {
        self.reference.pass(ns, ns);
    }

    /// A device state is loaded: the VM is RESTORING in a new epoch.
    pub(crate) fn load(&mut self) {
        let epoch = self.epoch() + 1;
        self.reference = reference((self.vcpus, self.options), Phase::Restoring, epoch, &[], 0);
    }

    /// How often an operation came.
    pub(crate) fn count(&self, op: Op) -> usize {
        self.log.iter().filter(|(is, _)| *is == op).count()
    }
}

fn info_of(vm: &Reference) -> wire::Info {
    let ask = Ask::get_info();
    let answer = vm.clone().handle(&ask.bytes(), ask.room, WAITER);
    wire::Info::read_from_bytes(&answer.unwrap()[16..]).unwrap()
}

/// A VM that outlives its backends, and a frontend.
pub(crate) struct Rig {
    pub(crate) vm: Arc<Mutex<Vm>>,
    pub(crate) fake: Arc<Fake>,
    pub(crate) path: PathBuf,
    serving: (JoinHandle<()>, Receiver<ShutdownHandle>),
}

impl Rig {
    /// A backend in PAUSED, and a frontend connected to it.
    pub(crate) fn new(options: Options) -> (Self, Frontend) {
        Self::with(options, |_| {})
    }

    /// As [`new`](Self::new); `None` if the handshake takes longer than the options' time-out.
    pub(crate) fn try_new(options: Options) -> Option<(Self, Frontend)> {
        Self::try_with_vm((VCPUS, 0), options, |_| {})
    }

    pub(crate) fn with(options: Options, change: impl FnOnce(&mut Fake)) -> (Self, Frontend) {
        Self::with_vcpus(VCPUS, options, change)
    }

    pub(crate) fn with_vcpus(
        vcpus: u32,
        options: Options,
        change: impl FnOnce(&mut Fake),
    ) -> (Self, Frontend) {
        Self::with_vm((vcpus, 0), options, change)
    }

    /// As [`new`](Self::new), with a VM that confirms, and has one offset.
    pub(crate) fn confirming(options: Options) -> (Self, Frontend) {
        Self::with_vm((VCPUS, configure_flags::ALL), options, |_| {})
    }

    fn with_vm(
        vm: (u32, u8),
        options: Options,
        change: impl FnOnce(&mut Fake),
    ) -> (Self, Frontend) {
        Self::try_with_vm(vm, options, change).expect("the handshake takes too long")
    }

    fn try_with_vm(
        (vcpus, vm_options): (u32, u8),
        options: Options,
        change: impl FnOnce(&mut Fake),
    ) -> Option<(Self, Frontend)> {
        let vm = Arc::new(Mutex::new(Vm {
            vcpus,
            options: vm_options,
            reference: reference((vcpus, vm_options), Phase::Paused, EPOCH, &[], 0),
            writes: 0,
            log: Vec::new(),
            lost: |_| Lost::No,
        }));
        let (asked, told) = (vm.clone(), vm.clone());
        let mut fake = Fake::new(move |request| asked.lock().unwrap().handle(request));
        fake.live_config = Some(Box::new(move || told.lock().unwrap().info()));
        change(&mut fake);
        let (fake, path) = (Arc::new(fake), socket_path());
        let serving = serve(fake.clone(), &path);
        let rig = Rig {
            vm,
            fake,
            path,
            serving,
        };
        let frontend = unless_late(connect(&rig.path, options))?;
        Some((rig, frontend))
    }

    /// Ends the backend, once it has a frontend, and returns when it is gone.
    pub(crate) fn kill(&mut self) {
        self.shut();
        self.gone();
    }

    /// Ends the backend's connection, once it has one.
    pub(crate) fn shut(&self) {
        self.serving.1.recv().unwrap().shutdown();
    }

    /// Returns when the backend is gone.
    pub(crate) fn gone(&self) {
        while !self.serving.0.is_finished() {
            std::thread::yield_now();
        }
    }

    /// Starts the next backend, which loses nothing.
    pub(crate) fn revive(&mut self) {
        self.vm.lock().unwrap().lost = |_| Lost::No;
        self.serving = serve(self.fake.clone(), &self.path);
    }

    /// The VM is in this phase, with these vCPUs done if it is RESTORING.
    pub(crate) fn set(&self, phase: Phase, done: &[u32]) {
        let epoch = self.vm.lock().unwrap().epoch();
        self.set_epoch(phase, epoch, done, 0);
    }

    /// As [`set`](Self::set), in a restore with AUTORUN.
    pub(crate) fn set_autorun(&self, done: &[u32]) {
        let epoch = self.vm.lock().unwrap().epoch();
        self.set_epoch(Phase::Restoring, epoch, done, restore_flags::AUTORUN);
    }

    pub(crate) fn set_epoch(&self, phase: Phase, epoch: u64, done: &[u32], flags: u32) {
        let mut vm = self.vm.lock().unwrap();
        vm.reference = reference((vm.vcpus, vm.options), phase, epoch, done, flags);
    }

    pub(crate) fn lose(&self, lost: fn(Op) -> Lost) {
        self.vm.lock().unwrap().lost = lost;
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
