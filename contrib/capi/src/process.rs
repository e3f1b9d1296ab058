//! The process of a backend that this library launched.

#![expect(unsafe_code, reason = "exports symbols")]

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::os::unix::process::ExitStatusExt;

use crate::border::{Failure, border};
use crate::connect::{frontend, vut_frontend};
use crate::pointer::put;
use crate::types::deadline;

/// The process id of a backend that vut_spawn() launched. After an outage it is another one.
///
/// @return the id, positive; -EINVAL where the backend was not launched by vut_spawn(); -ESRCH
///         where it ended and was reaped
#[unsafe(no_mangle)]
pub extern "C" fn vut_pid(frontend: Option<&vut_frontend>) -> c_int {
    let mut pid = 0;
    let failed = border(|| {
        let running = self::frontend(frontend)?.backend()?.pid();
        pid = running
            .and_then(|pid| c_int::try_from(pid).ok())
            .ok_or_else(|| Failure::new(libc::ESRCH, "the backend has ended and was reaped"))?;
        Ok(())
    });
    if failed == 0 { pid } else { failed }
}

/// Waits until a backend that vut_spawn() launched has ended, and reaps it.
///
/// @param status      where its status goes, as of waitpid() (WIFEXITED(), ...); may be NULL
/// @param timeout_ns  how long to wait, ns; 0 to ask only
/// @return 0; -ETIMEDOUT where it still runs; -EINVAL where the backend was not launched by
///         vut_spawn()
#[unsafe(no_mangle)]
pub extern "C" fn vut_exit_status(
    frontend: Option<&vut_frontend>,
    status: Option<&mut MaybeUninit<c_int>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let backend = self::frontend(frontend)?.backend()?;
        let ended = backend
            .exit_status(deadline(timeout_ns))
            .ok_or_else(|| Failure::new(libc::ETIMEDOUT, "the backend still runs"))?;
        put(status, ended.into_raw());
        Ok(())
    })
}
