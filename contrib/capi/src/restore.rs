//! Restores: the plain operations, and a restore as an object.

#![expect(unsafe_code, reason = "exports symbols")]

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::time::Duration;

use vhost_user_timer_frontend::RestoreOptions;

use crate::border::{Failure, border};
use crate::connect::{frontend, vut_frontend};
use crate::pointer::put;
use crate::types::{VUT_FOREVER, deadline, flags, vm_options};

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
