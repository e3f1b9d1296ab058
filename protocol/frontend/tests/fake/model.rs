//! A VM as far as repeating requests goes: phases, epochs, who is done. It can do a request and
//! keep the answer to itself, as a backend does that is killed just then.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vhost_user_backend::ShutdownHandle;
use vhost_user_timer_frontend::{Frontend, Options};
use vhost_user_timer_protocol::request::{Body, Request};
use vhost_user_timer_protocol::wire::{self, RequestHeader, restore_flags};
use vhost_user_timer_protocol::{Op, Phase, Status};
use zerocopy::{FromBytes, IntoBytes};

use super::{Fake, answer, info, run_of, serve, socket_path};

pub(crate) const VCPUS: u32 = 4;

/// When a request is lost with its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Never.
    No,
    /// After it was done.
    Done,
    /// Before it was looked at.
    Unseen,
}

pub(crate) struct Vm {
    pub(crate) phase: Phase,
    pub(crate) epoch: u64,
    pub(crate) autorun: bool,
    pub(crate) done: Vec<u32>,
    /// How often something was written, by SET_REGS or SET_VM.
    pub(crate) writes: u32,
    /// Requests as they came: operation, and epoch in the header.
    pub(crate) log: Vec<(Op, u64)>,
    /// What is lost on this connection.
    pub(crate) lost: fn(Op) -> Lost,
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
        let (status, body) = match self.perform(bytes, header.epoch.get()) {
            Ok(body) => (Status::Ok, body?),
            Err(status) => (status, Vec::new()),
        };
        let mut bytes = answer(status, self.phase.code(), &body);
        bytes[8..16].copy_from_slice(&self.epoch.to_le_bytes());
        (lost == Lost::No).then_some(bytes)
    }

    /// The answer's body; `None` to wait.
    fn perform(&mut self, bytes: &[u8], epoch: u64) -> Result<Option<Vec<u8>>, Status> {
        let request = Request::parse(bytes)?;
        if epoch != 0 && epoch != self.epoch {
            return Err(Status::Stale);
        }
        let in_phases = |phases: &[Phase]| match phases.contains(&self.phase) {
            true => Ok(()),
            false => Err(Status::Busy),
        };
        let mut body = Vec::new();
        match request.body {
            Body::GetInfo => body = self.info().as_bytes().to_vec(),
            Body::ConfigureVm(_) if self.phase == Phase::New => self.phase = Phase::Paused,
            Body::SetVm(vcpus) => {
                in_phases(&[Phase::Restoring])?;
                if vcpus.iter().any(|v| self.done.contains(&v.vcpu.get())) {
                    return Err(Status::Busy);
                }
                self.writes += 1;
            }
            Body::Pause { .. } => {
                in_phases(&[Phase::Paused, Phase::Running])?;
                self.phase = Phase::Paused;
                body = run_of(0).as_bytes().to_vec();
            }
            Body::Resume => {
                in_phases(&[Phase::Paused, Phase::Running])?;
                self.phase = Phase::Running;
                body = run_of(0).as_bytes().to_vec();
            }
            Body::RestoreBegin(begin) => {
                in_phases(&[Phase::Paused, Phase::Restoring])?;
                self.autorun = begin.flags.get() & restore_flags::AUTORUN != 0;
                self.phase = Phase::Restoring;
                self.epoch += 1;
                self.done.clear();
            }
            Body::RestoreAbort => {
                in_phases(&[Phase::Restoring])?;
                self.phase = Phase::Paused;
            }
            Body::SetRegs(_) => {
                // As if there were a count among them.
                in_phases(&[Phase::Paused, Phase::Restoring])?;
                self.writes += 1;
                body = vec![0; 8];
            }
            Body::RestoreDone => {
                in_phases(&[Phase::Restoring])?;
                if !self.done.contains(&request.vcpu) {
                    self.done.push(request.vcpu);
                }
                let remaining = VCPUS - self.done.len() as u32;
                if remaining == 0 {
                    let autorun = self.autorun;
                    self.phase = if autorun {
                        Phase::Running
                    } else {
                        Phase::Paused
                    };
                }
                body = [remaining, 0].as_bytes().to_vec();
            }
            Body::WaitRun => {
                if self.phase != Phase::Running {
                    return Ok(None);
                }
                body = run_of(request.vcpu).as_bytes().to_vec();
            }
            _ => {}
        }
        Ok(Some(body))
    }

    fn info(&self) -> wire::Info {
        wire::Info {
            phase: self.phase.code().into(),
            epoch: self.epoch.into(),
            vcpus: VCPUS.into(),
            ..info()
        }
    }

    /// How often an operation came.
    pub(crate) fn count(&self, op: Op) -> usize {
        self.log.iter().filter(|(is, _)| *is == op).count()
    }
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

    pub(crate) fn with(options: Options, change: impl FnOnce(&mut Fake)) -> (Self, Frontend) {
        let vm = Arc::new(Mutex::new(Vm {
            phase: Phase::Paused,
            epoch: 7,
            autorun: false,
            done: Vec::new(),
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
        let frontend = Frontend::connect(&path, options).unwrap();
        let rig = Rig {
            vm,
            fake,
            path,
            serving,
        };
        (rig, frontend)
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

    pub(crate) fn set(&self, phase: Phase, done: &[u32]) {
        let mut vm = self.vm.lock().unwrap();
        vm.phase = phase;
        vm.done = done.to_vec();
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
