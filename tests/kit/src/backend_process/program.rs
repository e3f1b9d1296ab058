//! Which program is the backend.

use std::io;
use std::path::PathBuf;

/// The environment variable that names the backend program.
pub const BACKEND_VARIABLE: &str = "VHOST_USER_TIMER";

/// The backend program's file name.
pub(super) const PROGRAM: &str = "vhost-user-timer";

/// The backend program: what the environment variable `VHOST_USER_TIMER` names, or else the
/// nearest `vhost-user-timer` in the directory of this executable or one above it. For a test
/// that is the build's own directory, `target/<profile>`.
///
/// # Errors
///
/// `NotFound`, with what to do about it, if there is none.
pub fn find_program() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os(BACKEND_VARIABLE) {
        return Ok(path.into());
    }
    let this = std::env::current_exe()?;
    this.ancestors()
        .skip(1)
        // `target/<profile>/deps/test` has it one above; an installed program beside itself.
        .take(2)
        .map(|directory| directory.join(PROGRAM))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| {
            let text = format!(
                "no {PROGRAM} beside {}: build it (cargo build -p {PROGRAM}) or set \
                 {BACKEND_VARIABLE} to its path",
                this.display()
            );
            io::Error::new(io::ErrorKind::NotFound, text)
        })
}
