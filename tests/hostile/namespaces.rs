//! What a host must let a test do that mounts a file system or changes a clock for itself alone.

use std::path::Path;
use std::process::{Command, Stdio};

/// A user namespace and a mount namespace, as unshare(1) has them.
pub(crate) const MOUNTS: &[&str] = &["-Urm"];

/// Whether this host lets the test make such namespaces. Says so where it does not.
pub(crate) fn can_unshare(options: &[&str]) -> bool {
    let tried = Command::new("unshare")
        .args(options)
        .arg("true")
        .stderr(Stdio::null())
        .status();
    let can = tried.is_ok_and(|status| status.success());
    if !can {
        eprintln!("skipped: this host lets nobody unshare {options:?}");
    }
    can
}

/// Whether this host lets the test mount a FUSE file system. Says so where it does not.
pub(crate) fn can_mount_fuse() -> bool {
    let has_device = Path::new("/dev/fuse").exists();
    if !has_device {
        eprintln!("skipped: this host has no /dev/fuse");
    }
    has_device && can_unshare(MOUNTS)
}
