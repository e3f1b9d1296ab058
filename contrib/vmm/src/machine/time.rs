//! The VM's time: what a VMM does with the backend, and what to copy from here.
//!
//! | when | here | on which thread |
//! |---|---|---|
//! | the VM is made | [`Time::start`], [`Time::configure`] | one |
//! | no vCPU runs any more | [`Time::pause`], [`Time::save`] | one |
//! | before each vCPU's first KVM_RUN of a restore | [`enter_restored`] | each vCPU's |
//! | before each vCPU's first KVM_RUN of a resume | [`enter_resumed`] | each vCPU's |
//! | when all wait | [`ReadBack::apply`], called by the library | one |

use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvm_ioctls::VmFd;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vhost_user_timer_frontend::kvm::{self, Applied, BestEffort, KvmError};
use vhost_user_timer_frontend::{
    Abi, Backend, CounterSource, Frontend, Info, Options, Phase, Reconnect, RegValue, Register,
    RequestQueue, Run, SavedVm, SpawnOptions, VcpuRestore, VmOptions,
};

use super::error::{Context, Error};
use super::registers;
use super::vcpu::Vcpu;

/// How long anything may take. A VMM knows better.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// The backend of one VM.
pub(crate) struct Time {
    backend: Link,
    /// Where the state file is.
    _state: Option<TempDir>,
}

enum Link {
    /// A process of ours, which ends with us.
    Spawned(Backend),
    /// A process that others launched.
    Connected(Frontend),
}

/// Where a backend comes from.
pub(crate) enum Source {
    /// Launch this program. If it is to be replaced when it dies, it needs a state file.
    Program { path: PathBuf, survives: bool },
    /// Connect to this socket.
    Socket(PathBuf),
}

impl Time {
    /// Launches the backend of a VM, or connects to it.
    pub(crate) fn start(source: &Source) -> Result<Self, Error> {
        match source {
            Source::Program { path, survives } => Self::spawn(path, *survives),
            Source::Socket(path) => Self::connect(path),
        }
    }

    fn spawn(program: &Path, survives: bool) -> Result<Self, Error> {
        // KVM makes the guest's counter of the counter that the host reads as CNTVCT_EL0.
        let mut options = SpawnOptions::default()
            .arg("--counter-source=cntvct")
            .arg("--log-level=warn");
        let mut frontend = frontend_options();
        let state = survives.then(tempfile::tempdir).transpose();
        let state = state.context("make a directory for the state file")?;
        if let Some(directory) = &state {
            frontend = frontend.reconnect(Reconnect::default().patience(LIMIT));
            options = options.state_file(directory.path().join("timer"));
        }
        let options = options.frontend(frontend);
        let backend = Backend::spawn(program, options).context("launch the backend")?;
        Ok(Time {
            backend: Link::Spawned(backend),
            _state: state,
        })
    }

    /// A VM that the backend has already is stopped: its VMM has died.
    fn connect(socket: &Path) -> Result<Self, Error> {
        let frontend =
            Frontend::connect(socket, frontend_options()).context("connect to the backend")?;
        let phase = frontend.config().context("read the phase")?.phase;
        if matches!(phase, Phase::Running | Phase::Armed) {
            frontend.queue().pause(LIMIT).context("PAUSE")?;
        }
        Ok(Time {
            backend: Link::Connected(frontend),
            _state: None,
        })
    }

    pub(crate) fn frontend(&self) -> &Frontend {
        match &self.backend {
            Link::Spawned(backend) => backend.frontend(),
            Link::Connected(frontend) => frontend,
        }
    }

    /// Makes the backend's VM, with [`VmOptions::KVM`]: KVM has one offset for both counts, and
    /// nobody is to run before the offset is in KVM. A KVM that takes no offset needs
    /// [`counts_into_kvm`](Self::counts_into_kvm) and a VM without these options. The guest's
    /// counter begins at `count`; most VMMs leave it at 0.
    pub(crate) fn configure(
        &self,
        vcpus: u32,
        options: VmOptions,
        count: u64,
    ) -> Result<(), Error> {
        let queue = self.frontend().queue();
        queue
            .configure_with(vcpus, Abi::Arm64, None, options, LIMIT)
            .context("CONFIGURE_VM")?;
        let count = RegValue::new(Register::TimerCnt.id(Abi::Arm64), count);
        queue
            .set_regs(0, &[count], LIMIT)
            .map(drop)
            .context("set the count")
    }

    /// Stops the VM's time, once no vCPU is in the guest. With `keep_counting` only the VM stops:
    /// the guest finds that time has passed.
    pub(crate) fn pause(&self, keep_counting: bool) -> Result<Run, Error> {
        let queue = self.frontend().queue();
        match keep_counting {
            false => queue.pause(LIMIT),
            true => queue.pause_vm_only(LIMIT),
        }
        .context("PAUSE")
    }

    /// The VM's timers after [`pause`](Self::pause): the timers that KVM has, and the count at
    /// which the backend stopped. KVM's own counts have gone on since.
    pub(crate) fn save(&self, vcpus: &[Vcpu], paused: &Run) -> Result<SavedVm, Error> {
        let info = self.frontend().config().context("read the VM's shape")?;
        let vcpus = vcpus.iter().map(|vcpu| &vcpu.fd);
        kvm::save_vm(vcpus, paused, &info).context("save the timers")
    }

    /// For Linux before 6.4: puts the counts of a paused VM into KVM by `vcpu`, one after the
    /// other, and resumes the VM's time from where KVM has taken them. Only the order in this
    /// function keeps the vCPUs from running before.
    pub(crate) fn counts_into_kvm(&self, vcpu: ReadBack) -> Result<(BestEffort, Run), Error> {
        let queue = self.frontend().queue();
        let info = queue.info(LIMIT).context("GET_INFO")?;
        let counts = kvm::set_counts(&vcpu.0, &info).context("put the counts into KVM")?;
        queue
            .set_counter_offset(counts.offset, LIMIT)
            .context("SET_COUNTER_OFFSET")?;
        let run = queue.resume(LIMIT).context("RESUME")?;
        Ok((counts, run))
    }

    /// Kills the backend; the library launches the next one when it needs it.
    pub(crate) fn kill_backend(&self) -> Result<(), Error> {
        let Link::Spawned(backend) = &self.backend else {
            return Err(Error::new(
                "--kill-backend: needs --backend, not --timer-socket",
            ));
        };
        let pid = backend.pid().and_then(|pid| Pid::from_raw(pid as i32));
        let pid = pid.ok_or_else(|| Error::new("kill the backend: it has ended by itself"))?;
        kill_process(pid, Signal::KILL).context("kill the backend")
    }
}

/// The backend must count as KVM does. An emulated host takes its time.
fn frontend_options() -> Options {
    Options::default()
        .host_counter(CounterSource::Cntvct)
        .timeout(LIMIT)
}

/// Puts a restored vCPU into KVM and waits until it may run. The counts are not put in: a thread
/// that does so moves the time of the whole VM.
pub(crate) fn enter_restored(
    vcpu: &Vcpu,
    state: &registers::State,
    part: &mut VcpuRestore,
) -> Result<Run, Error> {
    registers::load(vcpu, state)?;
    kvm::restore_vcpu(&vcpu.fd, part.registers()).context("restore the timers")?;
    part.run(LIMIT).context("wait until the vCPU may run")
}

/// Waits until a vCPU that was paused may run. KVM still has its registers.
pub(crate) fn enter_resumed(vcpu: u32, queue: &RequestQueue) -> Result<Run, Error> {
    queue
        .wait_run(vcpu, LIMIT)
        .context("wait until the vCPU may run")
}

/// The vCPU by which [`apply`](Self::apply) sees that the offset is in KVM.
///
/// It is a descriptor, because a thread has the [`Vcpu`] by then. That thread is in no ioctl: it
/// waits until it may run.
#[derive(Clone, Copy)]
pub(crate) struct ReadBack(RawFd);

impl ReadBack {
    pub(crate) fn by(vcpu: &Vcpu) -> Self {
        ReadBack(vcpu.fd.as_raw_fd())
    }

    /// Puts the offset of an ARMED VM into KVM.
    pub(crate) fn apply(self, vm: &VmFd, info: &Info) -> Result<Applied, KvmError> {
        kvm::apply(vm, &self.0, info)
    }
}
