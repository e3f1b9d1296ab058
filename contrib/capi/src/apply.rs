//! The caller's function that puts a VM's offsets into the hypervisor.

use std::ffi::{c_int, c_void};

use vhost_user_timer_frontend::{ApplyError, Info};

use crate::border::Failure;
use crate::errno::CallbackError;
use crate::pointer::given;
use crate::types::vut_info;

/// Puts the offsets of an ARMED VM into the hypervisor: KVM_ARM_SET_COUNTER_OFFSET, or cntvoff of
/// every emulated CPU.
///
/// It is called on the thread of the call that it was given to, at most once in that call, while no
/// vCPU runs. Calls that end ARMED, or lead on from it, wait for its end on every other thread; on
/// this one they fail with -EDEADLK. Other calls are allowed. It must return: no longjmp(), no
/// exception.
///
/// @param info    the VM: `cntvoff` and `cntpoff` are what to put in; valid until it returns
/// @param opaque  what the call was given
/// @return 0; or a negative errno, and then no vCPU runs, and the call fails with that errno. Any
///         other value counts as -EIO
pub type vut_apply_fn = Option<extern "C" fn(info: *const vut_info, opaque: *mut c_void) -> c_int>;

/// The caller's function as the library takes it.
pub(crate) fn closure(
    apply: vut_apply_fn,
    opaque: *mut c_void,
) -> Result<impl FnOnce(&Info) -> Result<(), ApplyError>, Failure> {
    let apply = given(apply, "apply")?;
    Ok(move |info: &Info| match apply(&info.into(), opaque) {
        0 => Ok(()),
        error => Err(CallbackError::new(error).into()),
    })
}
