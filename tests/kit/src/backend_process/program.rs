//! Which program is the backend.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

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
/// `NotFound`, with what to do about it, if there is none, or if another checkout that builds in
/// the same folder has built it.
pub fn find_program() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os(BACKEND_VARIABLE) {
        return Ok(path.into());
    }
    let this = std::env::current_exe()?;
    let program = this
        .ancestors()
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
        })?;
    let ours = std::env::var_os("CARGO_MANIFEST_DIR");
    match ours.and_then(|ours| other_checkout(&program, Path::new(&ours))) {
        None => Ok(program),
        Some(other) => {
            let text = format!(
                "{} was built from the checkout {}: build it again from this one, or give each \
                 checkout a CARGO_TARGET_DIR of its own",
                program.display(),
                other.display()
            );
            Err(io::Error::new(io::ErrorKind::NotFound, text))
        }
    }
}

/// Copies a program, so that it can be executed at once.
///
/// # Panics
///
/// If that fails.
pub fn copy_program(from: &Path, to: &Path) {
    by_shell("cp -- \"$1\" \"$2\"", &[from.as_os_str(), to.as_os_str()]);
}

/// Makes a shell script that can be executed at once.
///
/// # Panics
///
/// If that fails.
pub fn write_script(path: &Path, text: &str) {
    let script = "printf '#!/bin/sh\\n%s' \"$2\" >\"$1\" && chmod 700 \"$1\"";
    by_shell(script, &[path.as_os_str(), text.as_ref()]);
}

/// Has a process of its own write a program. What this process has open for writing, a child that
/// another thread starts has open as well until it executes its own program, and meanwhile the
/// system executes no such file (ETXTBSY).
fn by_shell(script: &str, args: &[&OsStr]) {
    let mut shell = Command::new("sh");
    let status = shell.args(["-e", "-c", script, "sh"]).args(args).status();
    assert!(status.is_ok_and(|status| status.success()), "{shell:?}");
}

/// The checkout that the program was built from, if our crate is not in it. Cargo lists the sources
/// in a file beside the program; a copied program has none.
fn other_checkout(program: &Path, our_crate: &Path) -> Option<PathBuf> {
    let sources = fs::read_to_string(program.with_extension("d")).ok()?;
    let main = sources
        .split_whitespace()
        .find_map(|source| source.strip_suffix("/backend/src/main.rs"))?;
    let checkout = Path::new(main);
    (checkout.is_absolute() && !our_crate.starts_with(checkout)).then(|| checkout.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_another_checkout_built_is_found_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join(PROGRAM);
        let record = |text: &str| fs::write(folder.path().join("vhost-user-timer.d"), text);
        let other = || other_checkout(&program, Path::new("/a/ours/tests"));

        assert_eq!(other(), None, "an installed program");
        record("/t/vhost-user-timer: /a/ours/backend/src/lib.rs /a/ours/backend/src/main.rs\n")
            .expect("a file");
        assert_eq!(other(), None, "our own");
        record("/t/vhost-user-timer: /a/other/backend/src/lib.rs /a/other/backend/src/main.rs\n")
            .expect("a file");
        assert_eq!(other(), Some("/a/other".into()));
    }
}
