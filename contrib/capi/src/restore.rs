//! Restores: the plain operations, and a restore as an object.

#![expect(unsafe_code, reason = "exports symbols; reads the caller's arrays")]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use vhost_user_timer_frontend::{Restore, RestoreOptions, SavedVm, SavedVmError, VcpuRestore};

use crate::apply::{closure, vut_apply_fn};
use crate::border::{Failure, border};
use crate::connect::{frontend, vut_frontend};
use crate::operations::abi;
use crate::pointer::{given, put};
use crate::registers::{saved_vcpus, vut_vcpu};
use crate::types::{VUT_FOREVER, deadline, flags, vm_options, vut_run};

/// Flag of a restore: it ends in RUNNING, not in PAUSED; in ARMED for a VM with VUT_CONFIRM.
pub const VUT_RESTORE_AUTORUN: u32 = 1;
/// Flag of a restore: the vCPUs' counts must be equal; else the largest count is the VM's.
pub const VUT_RESTORE_STRICT: u32 = 2;

/// How a restore is opened. All zero is a plain restore, for which NULL stands as well.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vut_restore_options {
    /// How long vCPUs wait for the missing ones, ns; then their waits end with -ETIMEDOUT.
    /// 0 and VUT_FOREVER: no time-out.
    pub timeout_ns: u64,
    /// If not 0: the wall-clock time since this instant is added to the counts. CLOCK_REALTIME, ns
    /// since 1970, of the save.
    pub elapsed_since_ns: u64,
    /// VUT_RESTORE_*.
    pub flags: u32,
    /// For vut_restore_begin(): what a VM that is NEW is configured with (VUT_CONFIRM,
    /// VUT_ONE_OFFSET). One that is configured already must have at least these.
    pub vm_flags: u32,
}

impl vut_restore_options {
    fn read(options: Option<&Self>) -> Result<RestoreOptions, Failure> {
        let Some(options) = options else {
            return Ok(RestoreOptions::default());
        };
        let flags = flags(options.flags, VUT_RESTORE_AUTORUN | VUT_RESTORE_STRICT)?;
        let mut read = RestoreOptions::default()
            .autorun(flags & VUT_RESTORE_AUTORUN != 0)
            .strict(flags & VUT_RESTORE_STRICT != 0)
            .vm(vm_options(options.vm_flags)?);
        if options.elapsed_since_ns != 0 {
            read = read.elapsed_since(options.elapsed_since_ns);
        }
        if !matches!(options.timeout_ns, 0 | VUT_FOREVER) {
            read = read.timeout(Duration::from_nanos(options.timeout_ns));
        }
        Ok(read)
    }
}

/// Opens a restore of all the VM's vCPUs, and with it a new epoch. In PAUSED, RESTORING and ARMED.
/// For a caller that says itself which vCPU is done (vut_set_vm()). (RESTORE_BEGIN)
///
/// @param options  NULL for a plain restore; `vm_flags` is not used
/// @param epoch    where the new epoch goes; may be NULL
/// @return 0; -EBUSY in NEW and RUNNING; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_begin_raw(
    frontend: Option<&vut_frontend>,
    options: Option<&vut_restore_options>,
    epoch: Option<&mut MaybeUninit<u64>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        let options = vut_restore_options::read(options)?;
        put(epoch, queue.restore_begin(options, deadline(timeout_ns))?);
        Ok(())
    })
}

/// Drops the open restore: the VM is PAUSED, as it was before, and vCPUs that wait get -ECANCELED.
/// In RESTORING and the ARMED of a restore. (RESTORE_ABORT)
///
/// @return 0; -EBUSY in another phase; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_abort_raw(frontend: Option<&vut_frontend>, timeout_ns: u64) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        Ok(queue.restore_abort(deadline(timeout_ns))?)
    })
}

/// A restore that is open in the backend. Opaque.
///
/// vut_restore_begin() opens one. Each vCPU's thread calls vut_restore_vcpu_run(), which returns
/// when the vCPU may run; one more thread calls vut_restore_apply() for a VM with VUT_CONFIRM, or
/// vut_restore_wait(). If one vCPU fails, the restore is aborted, every thread gets that vCPU's
/// error, and no vCPU runs.
pub struct vut_restore {
    /// `None` once it was aborted by the caller. Dropped before the parts: an abort is no failure
    /// of a vCPU.
    restore: Mutex<Option<Restore>>,
    /// By index.
    vcpus: Box<[Mutex<VcpuRestore>]>,
}

const _: () = {
    const fn is_shared_by_threads<T: Send + Sync>() {}
    is_shared_by_threads::<vut_frontend>();
    is_shared_by_threads::<vut_restore>();
};

/// The value, unless another thread is in a call with it.
fn alone<'a, T>(mutex: &'a Mutex<T>, call: &str) -> Result<MutexGuard<'a, T>, Failure> {
    match mutex.try_lock() {
        Ok(value) => Ok(value),
        // What a panic leaves is the library's own, which is whole at any instant.
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => Err(Failure::new(
            libc::EBUSY,
            format!("another thread is in {call}"),
        )),
    }
}

impl vut_restore {
    /// Calls something that one thread at a time may do.
    fn alone<T>(
        &self,
        call: impl FnOnce(&mut Restore) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut restore = alone(&self.restore, "a call for the whole restore")?;
        let restore = restore.as_mut().ok_or_else(|| {
            Failure::new(
                libc::ECANCELED,
                "the restore was aborted by vut_restore_abort()",
            )
        })?;
        call(restore)
    }
}

fn restore(restore: Option<&vut_restore>) -> Result<&vut_restore, Failure> {
    given(restore, "restore")
}

/// Opens a restore of a saved VM: configures the VM if it is NEW, and begins a new epoch, which
/// every request of the restore names. In NEW, PAUSED, RESTORING and ARMED.
///
/// For a VM with VUT_CONFIRM the restore ends in ARMED, whatever the flags. Takes `timeout_ns` of
/// struct vut_options at most.
///
/// @param abi        VUT_ABI_*
/// @param frequency  the saved VM's counter frequency, Hz; not 0
/// @param vcpus      every vCPU of the VM, by index from 0 on, as vut_get_vm() gives them
/// @param count      how many vCPUs
/// @param options    NULL for a plain restore
/// @param restore    where the restore goes; NULL goes there after an error
/// @return 0; -EINVAL where the backend is configured for another VM, and for vCPUs that are not
///         each there once in order; -EBUSY where the VM is RUNNING; or an error of every request
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_restore_begin(
    frontend: Option<&vut_frontend>,
    abi: u8,
    frequency: u64,
    vcpus: *const vut_vcpu,
    count: u32,
    options: Option<&vut_restore_options>,
    restore: Option<&mut MaybeUninit<*mut vut_restore>>,
) -> c_int {
    border(|| {
        let to = given(restore, "restore")?;
        to.write(std::ptr::null_mut());
        let frontend = self::frontend(frontend)?.frontend();
        // SAFETY: the caller's promise.
        let vcpus = unsafe { saved_vcpus(vcpus, count) }?;
        let frequency = NonZeroU64::new(frequency).ok_or(SavedVmError::Frequency)?;
        let saved = SavedVm::new(self::abi(abi)?, frequency, vcpus)?;
        let restore = frontend.restore(&saved, vut_restore_options::read(options)?)?;
        let vcpus = restore.vcpus().map(Mutex::new).collect();
        let restore = Mutex::new(Some(restore));
        to.write(Box::into_raw(Box::new(vut_restore { restore, vcpus })));
        Ok(())
    })
}

/// Brings one vCPU's registers back, and waits for all the others, and for vut_restore_apply()
/// where the VM has VUT_CONFIRM. Returns when the vCPU may run, and not before. For the vCPU's
/// thread; threads of different vCPUs call it at once.
///
/// After -ETIMEDOUT of the time limit, and after an apply callback failed, it may be called again
/// and goes on where it was.
///
/// @param vcpu  index
/// @param run   where the counts and offsets that all vCPUs run with go; may be NULL
/// @return 0; -ENXIO for an index past the VM's vCPUs; -ETIMEDOUT at the time limit, and where the
///         restore's own time-out passed; what the apply callback returned; -ECANCELED after
///         vut_restore_abort(); -ESTALE where a new restore began; -EBUSY where another thread is
///         in this call for this vCPU; the error of the vCPU by which the restore failed, which the
///         text names; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_vcpu_run(
    restore: Option<&vut_restore>,
    vcpu: u32,
    run: Option<&mut MaybeUninit<vut_run>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let vcpus = &self::restore(restore)?.vcpus;
        let part = vcpus.get(vcpu as usize).ok_or_else(|| {
            let text = format!("vCPU {vcpu}: the restore has {} vCPUs", vcpus.len());
            Failure::new(libc::ENXIO, text)
        })?;
        let mut part = alone(part, "vut_restore_vcpu_run() for this vCPU")?;
        put(run, part.run(deadline(timeout_ns))?);
        Ok(())
    })
}

/// Brings the registers of all vCPUs back by one request: for a caller that has them in one place.
/// vut_restore_vcpu_run() then only waits.
///
/// @return 0; -EBUSY where another thread is in a call for the whole restore, and where the VM runs
///         already; or as vut_set_vm() with `done`, and then the restore stays open
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_bring_all_back(
    restore: Option<&vut_restore>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let restore = self::restore(restore)?;
        restore.alone(|restore| Ok(restore.bring_all_back(deadline(timeout_ns))?))
    })
}

/// Waits until every vCPU has its registers back. Then the VM is RUNNING with VUT_RESTORE_AUTORUN,
/// else PAUSED; one with VUT_CONFIRM is ARMED, and waits for vut_restore_apply().
///
/// @return 0; -ETIMEDOUT at the time limit: the restore goes on, and may be waited for again; the
///         error of the vCPU that failed first, which the text names: the restore is aborted; what
///         the apply callback returned, where the last vut_restore_apply() failed; -EBUSY where
///         another thread is in a call for the whole restore; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_wait(restore: Option<&vut_restore>, timeout_ns: u64) -> c_int {
    border(|| {
        let restore = self::restore(restore)?;
        restore.alone(|restore| Ok(restore.wait(deadline(timeout_ns))?))
    })
}

/// Waits until every vCPU has its registers back and the VM is ARMED, has `apply` put the offsets
/// into the hypervisor, and confirms them. Then every vCPU runs.
///
/// After an error of `apply` no vCPU runs, and every vut_restore_vcpu_run() returns the same. Call
/// this again, or abort. `apply` is called once for each ARMED: not again where only the
/// confirmation was lost or late.
///
/// @param apply   puts the offsets in
/// @param opaque  goes to `apply`
/// @param run     where counts and offsets of the confirmation go: what every vCPU gets. May be
///                NULL
/// @return 0; what `apply` returned; -EINVAL for a VM without VUT_CONFIRM; or as vut_resume_with()
///         and vut_restore_wait()
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_apply(
    restore: Option<&vut_restore>,
    apply: vut_apply_fn,
    opaque: *mut c_void,
    run: Option<&mut MaybeUninit<vut_run>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let restore = self::restore(restore)?;
        let apply = closure(apply, opaque)?;
        let confirmed = restore.alone(|restore| Ok(restore.apply(deadline(timeout_ns), apply)?))?;
        put(run, confirmed);
        Ok(())
    })
}

/// Aborts the restore, unless it is complete: the VM is PAUSED, as it was before, and every
/// vut_restore_vcpu_run() ends with -ECANCELED. Takes `timeout_ns` of struct vut_options at most.
///
/// @return 0, also where it was aborted before; -EBUSY where another thread is in a call for the
///         whole restore
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_abort(restore: Option<&vut_restore>) -> c_int {
    border(|| {
        let restore = &self::restore(restore)?.restore;
        drop(alone(restore, "a call for the whole restore")?.take());
        Ok(())
    })
}

/// Frees the restore, and aborts it as vut_restore_abort() does. No other thread may be in a call
/// with it. Before or after vut_close() of its frontend.
///
/// @param restore  NULL does nothing
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_free(restore: Option<Box<vut_restore>>) {
    border(|| {
        drop(restore);
        Ok(())
    });
}
