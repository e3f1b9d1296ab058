//! Requests about the whole VM.

#![expect(unsafe_code, reason = "exports symbols; reads the caller's arrays")]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::num::NonZeroU64;

use vhost_user_timer_frontend::Abi;

use crate::apply::{closure, vut_apply_fn};
use crate::border::{Failure, border};
use crate::connect::{frontend, vut_frontend};
use crate::pointer::{array_mut, put};
use crate::types::{deadline, flags, vm_options, vut_info, vut_run};

/// Flag of vut_pause(): the VM's time goes on, only the VM stops (KEEP_COUNTING).
pub const VUT_PAUSE_KEEP_COUNTING: u32 = 1;

pub(crate) fn abi(code: u8) -> Result<Abi, Failure> {
    Abi::from_code(code)
        .ok_or_else(|| Failure::argument(format!("abi {code}: must be one of VUT_ABI_*, 0 or 1")))
}

/// Reads what the VM is like. In any phase. (GET_INFO)
///
/// @param info  where the answer goes; may be NULL
/// @return 0, or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_info(
    frontend: Option<&vut_frontend>,
    info: Option<&mut MaybeUninit<vut_info>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        put(info, &queue.info(deadline(timeout_ns))?);
        Ok(())
    })
}

/// Fixes the VM's vCPUs, ABI, counter frequency and options. NEW -> PAUSED; the same values again
/// are accepted in every phase. (CONFIGURE_VM)
///
/// @param vcpus      1 to `max_vcpus` of struct vut_info
/// @param abi        VUT_ABI_*
/// @param frequency  Hz, 1 to 10^10; 0 for the backend's own
/// @param vm_flags   VUT_CONFIRM, VUT_ONE_OFFSET
/// @return 0; -EINVAL for values out of range; -EBUSY for a VM that is configured with others; or
///         an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_configure(
    frontend: Option<&vut_frontend>,
    vcpus: u32,
    abi: u8,
    frequency: u64,
    vm_flags: u32,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        let (abi, options) = (self::abi(abi)?, vm_options(vm_flags)?);
        let frequency = NonZeroU64::new(frequency);
        Ok(queue.configure_with(vcpus, abi, frequency, options, deadline(timeout_ns))?)
    })
}

/// Says what the VMM's host counter is: it read `count` when CLOCK_MONOTONIC read `monotonic_ns`.
/// Frozen counts stay, a counting clock keeps its offset. In PAUSED. (SET_COUNTER_ANCHOR)
///
/// @param monotonic_ns  ns
/// @param count         ticks
/// @return 0; -EBUSY in another phase; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_set_anchor(
    frontend: Option<&vut_frontend>,
    monotonic_ns: u64,
    count: u64,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        Ok(queue.set_counter_anchor(monotonic_ns, count, deadline(timeout_ns))?)
    })
}

/// Sets both offsets to `offset`, lets both clocks count, and pins the offsets: writes of counts
/// are ignored until the next restore begins. In PAUSED and RESTORING. (SET_COUNTER_OFFSET)
///
/// @param offset  host count - guest count, modulo 2^64, ticks
/// @return 0; -EBUSY in another phase; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_set_counter_offset(
    frontend: Option<&vut_frontend>,
    offset: u64,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        Ok(queue.set_counter_offset(offset, deadline(timeout_ns))?)
    })
}

/// Stops the VM's time. RUNNING or ARMED -> PAUSED; in PAUSED it changes nothing. (PAUSE)
///
/// @param flags  0 or VUT_PAUSE_KEEP_COUNTING
/// @param run    where counts and offsets at this instant go; may be NULL
/// @return 0; -EBUSY in NEW and RESTORING; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_pause(
    frontend: Option<&vut_frontend>,
    flags: u32,
    run: Option<&mut MaybeUninit<vut_run>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        let deadline = deadline(timeout_ns);
        let paused = match self::flags(flags, VUT_PAUSE_KEEP_COUNTING)? {
            0 => queue.pause(deadline)?,
            _ => queue.pause_vm_only(deadline)?,
        };
        put(run, paused);
        Ok(())
    })
}

/// Lets the VM's time go on. PAUSED -> RUNNING, or ARMED in a VM with VUT_CONFIRM; in RUNNING and
/// ARMED it changes nothing. (RESUME)
///
/// @param run  where counts and offsets at this instant go; may be NULL
/// @return 0; -EBUSY in NEW and RESTORING; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_resume(
    frontend: Option<&vut_frontend>,
    run: Option<&mut MaybeUninit<vut_run>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        put(run, queue.resume(deadline(timeout_ns))?);
        Ok(())
    })
}

/// RESUME, `apply`, CONFIRM_RUN: lets the time of a VM with VUT_CONFIRM go on, and lets its vCPUs
/// run once its offsets are where the guest's counter is made.
///
/// After an error of `apply` the VM stays ARMED and no vCPU runs: call this again to try again, or
/// vut_pause() to give up. `apply` is called once for each ARMED: not again where only the
/// confirmation was lost or late, and not in RUNNING.
///
/// @param apply   puts the offsets in
/// @param opaque  goes to `apply`
/// @param run     where counts and offsets of the confirmation go: what every waiting vCPU gets.
///                May be NULL
/// @return 0; what `apply` returned; -EINVAL for a VM without VUT_CONFIRM; -EMEDIUMTYPE where the
///         backend does not count by `host_counter` of the options; -EBUSY where another thread
///         paused the VM meanwhile, and in NEW and RESTORING; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_resume_with(
    frontend: Option<&vut_frontend>,
    apply: vut_apply_fn,
    opaque: *mut c_void,
    run: Option<&mut MaybeUninit<vut_run>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let frontend = self::frontend(frontend)?.frontend();
        let apply = closure(apply, opaque)?;
        put(run, frontend.resume_with(deadline(timeout_ns), apply)?);
        Ok(())
    })
}

/// Says that these offsets are where the guest's counter is made. ARMED -> RUNNING; in RUNNING it
/// changes nothing. vut_resume_with() and vut_restore_apply() do this. (CONFIRM_RUN)
///
/// @param cntvoff  the virtual offset that was applied, ticks
/// @param cntpoff  the physical offset that was applied, ticks
/// @param run      where counts and offsets of the confirmation go; may be NULL
/// @return 0; -EINVAL for offsets that are not the VM's; -EBUSY in another phase; or an error of
///         every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_confirm_run(
    frontend: Option<&vut_frontend>,
    cntvoff: u64,
    cntpoff: u64,
    run: Option<&mut MaybeUninit<vut_run>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        let confirmed = queue.confirm_run(cntvoff, cntpoff, deadline(timeout_ns))?;
        put(run, confirmed);
        Ok(())
    })
}

/// Returns when the vCPU may run, and not before. Any number of threads may wait. After -ETIMEDOUT
/// of the time limit a thread may wait again. (WAIT_RUN)
///
/// @param vcpu  index
/// @param run   where the counts and offsets that the vCPU starts with go; may be NULL
/// @return 0; -ETIMEDOUT at the time limit, and where the restore's own time-out passed;
///         -ECANCELED where a restore was aborted; -ESTALE where a new restore began; -ENXIO for an
///         index past the VM's vCPUs; -EBUSY in NEW; what an apply callback returned, where the
///         offsets were not applied; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_wait_run(
    frontend: Option<&vut_frontend>,
    vcpu: u32,
    run: Option<&mut MaybeUninit<vut_run>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.frontend().queue_of(vcpu);
        put(run, queue.wait_run(vcpu, deadline(timeout_ns))?);
        Ok(())
    })
}

/// Finds the vCPUs that are missing in the open restore, in order; none if no restore is open. It
/// takes one request per vCPU: for a message after a restore that timed out, not for polling.
///
/// @param vcpus  room for `len` indices
/// @param len    how many entries `vcpus` has; more missing vCPUs are counted only
/// @param count  where the number of missing vCPUs goes; may be NULL
/// @return 0, or an error of every request
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_missing_vcpus(
    frontend: Option<&vut_frontend>,
    vcpus: *mut u32,
    len: usize,
    count: Option<&mut MaybeUninit<u32>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        // SAFETY: the caller's promise.
        let vcpus = unsafe { array_mut::<MaybeUninit<u32>>(vcpus.cast(), len, "vcpus") }?;
        let missing = queue.missing_vcpus(deadline(timeout_ns))?;
        for (to, vcpu) in vcpus.iter_mut().zip(&missing) {
            to.write(*vcpu);
        }
        put(count, missing.len() as u32);
        Ok(())
    })
}

/// Resets the device: the VM is NEW again, its epoch stays. (RESET_DEVICE)
///
/// Takes `timeout_ns` of the options at most.
///
/// @return 0; -EOPNOTSUPP where the backend cannot be reset; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_reset_device(frontend: Option<&vut_frontend>) -> c_int {
    border(|| Ok(self::frontend(frontend)?.frontend().reset_device()?))
}
