//! Children that unit tests start, beside tests that open a file which another test may not have
//! locked.
//!
//! A child has every descriptor of this process until it executes its program. So a file that a
//! test has closed may still be locked by the child of another test.

use std::io;
use std::process::{Command, Output, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

static STARTING: RwLock<()> = RwLock::new(());

/// No child is being started while the result lives.
pub(crate) fn none_starts() -> RwLockReadGuard<'static, ()> {
    STARTING.read().unwrap_or_else(PoisonError::into_inner)
}

/// [`Command::output`].
pub(crate) fn output(command: &mut Command) -> io::Result<Output> {
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let starting = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    // It returns when the child has executed its program.
    let child = command.spawn();
    drop(starting);
    child?.wait_with_output()
}
