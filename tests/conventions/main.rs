//! What the repository asks of itself beyond what the compiler and clippy check.

mod crates;
mod files;
mod packages;
mod security;
mod text;

use std::path::PathBuf;

/// The workspace's root. Cargo says at run time where this crate is.
fn root() -> PathBuf {
    let this = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test");
    let this = PathBuf::from(this);
    this.parent().expect("a crate of the workspace").to_owned()
}
