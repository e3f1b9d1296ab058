//! A vCPU, and the threads that run vCPUs.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_SYSTEM_EVENT_RESET;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::error::{Context, Error};
use crate::guest::DOORBELL;

/// A vCPU that is not in the guest. A thread takes it along to run it.
pub(crate) struct Vcpu {
    pub(crate) index: u32,
    pub(crate) fd: VcpuFd,
}

/// Why a vCPU left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It was asked to.
    Stopped,
    /// The guest called PSCI SYSTEM_RESET.
    Reset,
}

impl Vcpu {
    pub(crate) fn new(index: u32, fd: VcpuFd) -> Self {
        Vcpu { index, fd }
    }

    /// Runs the guest until the vCPU is asked to stop.
    ///
    /// A vCPU stops only when KVM_RUN fails with EINTR, even if it is asked to stop while an access
    /// of a device is handled here. KVM completes such an access, and moves the PC past it, at the
    /// *next* KVM_RUN. That one returns at once, because `immediate_exit` is set. So the registers
    /// that are saved are those after a whole instruction.
    fn run(&mut self, doorbell: &Doorbell) -> Result<Exit, Error> {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::MmioWrite(DOORBELL, _)) => doorbell.ring(),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Ok(Exit::Reset),
                Ok(exit) => {
                    let vcpu = self.index;
                    return Err(Error::new(format!("vCPU {vcpu} left the guest: {exit:?}")));
                }
                Err(error) if error.errno() == libc::EINTR => {
                    if self.fd.get_kvm_run().immediate_exit != 0 {
                        self.fd.set_kvm_immediate_exit(0);
                        return Ok(Exit::Stopped);
                    }
                }
                Err(error) => return Err(error).context("KVM_RUN"),
            }
        }
    }
}

/// The flag that makes KVM_RUN return at once, for a thread that is not the vCPU's.
struct Stop(*mut u8);

#[expect(
    unsafe_code,
    reason = "another thread writes one byte of the vCPU's kvm_run"
)]
mod stop {
    use super::*;

    // SAFETY: it is used by `raise` only.
    unsafe impl Send for Stop {}

    impl Stop {
        pub(super) fn of(vcpu: &mut Vcpu) -> Self {
            Stop(&raw mut vcpu.fd.get_kvm_run().immediate_exit)
        }

        /// Makes the next KVM_RUN return at once, or the one that a signal interrupts.
        pub(super) fn raise(&self) {
            // SAFETY: the byte is in the mapping of the VcpuFd. Its thread owns the VcpuFd, and
            // gives it back when it is joined, which is after this.
            let flag = unsafe { AtomicU8::from_ptr(self.0) };
            flag.store(1, Ordering::SeqCst);
        }
    }
}

/// What the guest's vCPUs ring: something is new on the board.
#[derive(Clone, Default)]
struct Doorbell(Arc<(Mutex<u64>, Condvar)>);

impl Doorbell {
    fn ring(&self) {
        *self.0.0.lock().expect("no thread panics with it") += 1;
        self.0.1.notify_all();
    }

    /// Waits until `condition` is true, which is asked again at each ring, or until the deadline.
    pub(crate) fn wait_until(&self, deadline: Instant, condition: impl Fn() -> bool) {
        let mut rings = self.0.0.lock().expect("no thread panics with it");
        while !condition() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.0.1.wait_timeout(rings, left.min(POLL));
            (rings, _) = waited.expect("no thread panics with it");
        }
    }
}

/// How long the guest may take for anything.
const LIMIT: Duration = Duration::from_secs(30);
/// For conditions that no ring announces.
const POLL: Duration = Duration::from_millis(100);

/// vCPUs that are in the guest, or about to be.
#[must_use = "the threads run until they are stopped"]
pub(crate) struct Running {
    threads: Vec<Thread>,
    doorbell: Doorbell,
}

struct Thread {
    stop: Stop,
    handle: JoinHandle<(Vcpu, Result<Exit, Error>)>,
}

impl Running {
    pub(crate) fn new() -> Result<Self, Error> {
        extern "C" fn interrupt_a_system_call(
            _: i32,
            _: *mut libc::siginfo_t,
            _: *mut libc::c_void,
        ) {
        }
        register_signal_handler(SIGRTMIN(), interrupt_a_system_call)
            .context("set a signal handler")?;
        Ok(Running {
            threads: Vec::new(),
            doorbell: Doorbell::default(),
        })
    }

    /// Starts a vCPU's thread: it enters the guest when `enter` returns, unless with an error.
    pub(crate) fn start(
        &mut self,
        mut vcpu: Vcpu,
        enter: impl FnOnce(&mut Vcpu) -> Result<(), Error> + Send + 'static,
    ) {
        // A vCPU that left the guest by itself may have been asked to leave after that.
        vcpu.fd.set_kvm_immediate_exit(0);
        let stop = Stop::of(&mut vcpu);
        let doorbell = self.doorbell.clone();
        let handle = thread::spawn(move || {
            let ended = enter(&mut vcpu).and_then(|()| vcpu.run(&doorbell));
            if let Err(error) = &ended {
                // The other threads fail because this one did.
                error.report(&format!("vCPU {}: ", vcpu.index));
            }
            doorbell.ring();
            (vcpu, ended)
        });
        self.threads.push(Thread { stop, handle });
    }

    /// Waits until `condition` is true, for as long as all vCPUs are in the guest or on their way
    /// there. False if it is not.
    pub(crate) fn wait_until(&self, condition: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + LIMIT;
        self.doorbell
            .wait_until(deadline, || self.has_ended() || condition());
        condition()
    }

    /// Whether a vCPU has left the guest by itself.
    pub(crate) fn has_ended(&self) -> bool {
        self.threads
            .iter()
            .any(|thread| thread.handle.is_finished())
    }

    /// Makes every vCPU leave the guest, and returns them by index, and why each left.
    pub(crate) fn stop(self) -> Result<(Vec<Vcpu>, Vec<Exit>), Error> {
        for thread in &self.threads {
            thread.stop.raise();
            // A thread that is not in KVM_RUN finds the flag when it gets there.
            thread
                .handle
                .kill(SIGRTMIN())
                .context("signal a vCPU's thread")?;
        }
        let mut ended = self
            .threads
            .into_iter()
            .map(|thread| thread.handle.join().expect("a vCPU's thread panicked"))
            .map(|(vcpu, exit)| Ok((vcpu, exit?)))
            .collect::<Result<Vec<_>, Error>>()?;
        ended.sort_by_key(|(vcpu, _)| vcpu.index);
        Ok(ended.into_iter().unzip())
    }
}
