//! The whole VM as the backend's own opaque bytes.

#![expect(unsafe_code, reason = "exports symbols; reads the caller's arrays")]

use std::ffi::c_int;
use std::mem::MaybeUninit;

use crate::border::border;
use crate::connect::{frontend, vut_frontend};
use crate::pointer::{array, give_bytes, given, put, take_bytes};
use crate::sigpipe::Sigpipe;
use crate::types::deadline;

/// Saves the VM as the backend's device state: opaque bytes for a migration stream, at most 4 MiB.
/// Not in NEW, and not while a restore is open. (SET_DEVICE_STATE_FD, SPEC.md section 10)
///
/// @param data  where a buffer goes that vut_buffer_free() frees; NULL goes there after an error
/// @param len   where the buffer's length goes, bytes
/// @return 0; -EREMOTEIO where the backend refuses (its log says why); -EFBIG for more than 4 MiB;
///         -EOPNOTSUPP where it has no device state; or an error of every request
#[unsafe(no_mangle)]
pub extern "C" fn vut_device_state_save(
    frontend: Option<&vut_frontend>,
    data: Option<&mut MaybeUninit<*mut u8>>,
    len: Option<&mut MaybeUninit<usize>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let (to, to_len) = (given(data, "data")?, given(len, "len")?);
        to.write(std::ptr::null_mut());
        to_len.write(0);
        let frontend = self::frontend(frontend)?.frontend();
        let state = frontend.save_device_state(deadline(timeout_ns))?;
        let (data, len) = give_bytes(state);
        put(Some(to), data);
        put(Some(to_len), len);
        Ok(())
    })
}

/// Loads a device state. The VM is RESTORING then, in a new epoch, with every vCPU's registers
/// staged: each must be done (vut_restore_done(), vut_set_vm()). In NEW and PAUSED.
///
/// @param data  the bytes; whatever they are, the worst is -EREMOTEIO
/// @param len   how many
/// @return 0; -EREMOTEIO where the backend refuses, and then the VM is as it was (its log says
///         why); -EOPNOTSUPP where it has no device state; or an error of every request
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_device_state_load(
    frontend: Option<&vut_frontend>,
    data: *const u8,
    len: usize,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let frontend = self::frontend(frontend)?.frontend();
        // SAFETY: the caller's promise.
        let state = unsafe { array(data, len, "data") }?;
        // The state goes through a pipe, which the backend may close at any time.
        let _held = Sigpipe::hold();
        Ok(frontend.load_device_state(state, deadline(timeout_ns))?)
    })
}

/// Frees a buffer of this library.
///
/// @param data  NULL does nothing
/// @param len   the buffer's length, as the library gave it
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_buffer_free(data: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { take_bytes(data, len) }
}
