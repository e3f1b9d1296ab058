//! What an operator does first: install the programs, and follow README.md.

mod documents;
mod files;
mod target_folder;

use std::path::PathBuf;
use std::process::Command;

/// The repository's root. Cargo says at run time where this crate is.
fn root() -> PathBuf {
    let this = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test");
    let this = PathBuf::from(this);
    this.parent().expect("a crate of the workspace").to_owned()
}

/// Runs a command in the repository. Returns whether it succeeded, and what it printed.
fn run(command: &mut Command) -> (bool, String) {
    let output = command.current_dir(root()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A `make` of its own, that has nothing of one that may run this test.
fn make() -> Command {
    let mut make = Command::new("make");
    make.arg("--no-print-directory");
    for variable in [
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_TARGET_DIR",
        "DESTDIR",
        "MAKEFLAGS",
        "MFLAGS",
        "PREFIX",
    ] {
        make.env_remove(variable);
    }
    make
}
