//! The series for QEMU is made of the files that the tests run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SENDER: &str = "Ada Example <ada@example.org>";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../qemu")
}

/// Runs `format-series` into a new directory.
fn format(sender: Option<&str>) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let output = run(directory.path(), sender);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    directory
}

fn run(directory: &Path, sender: Option<&str>) -> Output {
    let mut command = Command::new(folder().join("format-series"));
    command.arg(directory).args(sender);
    command.output().expect("format-series")
}

/// The mails in their order.
fn mails(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("the directory");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a mail").path()).collect();
    paths.sort();
    let read = |path: &PathBuf| fs::read_to_string(path).expect("a mail");
    paths.iter().map(read).collect()
}

/// What a mail makes of nothing at this path in QEMU.
fn added(mail: &str, path: &str) -> String {
    let header = format!("--- /dev/null\n+++ b/{path}\n");
    let (_, diff) = mail.split_once(&header).expect(path);
    let lines = diff.lines().skip(1);
    let lines = lines.map_while(|line| line.strip_prefix('+'));
    lines.flat_map(|line| [line, "\n"]).collect()
}

#[test]
fn the_series_has_the_files_of_the_folder() {
    let directory = format(Some(SENDER));
    let all = mails(directory.path()).concat();
    for (file, path) in [
        ("vhost-user-timer.c", "hw/arm/vhost-user-timer.c"),
        ("vhost-user-timer.h", "include/hw/arm/vhost-user-timer.h"),
        (
            "docs/vhost-user-timer.rst",
            "docs/system/arm/vhost-user-timer.rst",
        ),
    ] {
        let ours = fs::read_to_string(folder().join(file)).expect(file);
        assert!(added(&all, path) == ours, "{file}");
    }
}

#[test]
fn every_patch_of_the_newest_qemu_is_a_mail_that_git_can_apply() {
    let directory = format(Some(SENDER));
    let mails = mails(directory.path());
    let series = fs::read_to_string(folder().join("patches/series")).expect("the list");
    let lines = series.lines().filter(|line| !line.starts_with('#'));
    let newest: Vec<_> = lines.filter(|line| !line.contains(" before ")).collect();
    let count = newest.len();
    assert_eq!(mails.len(), count + 1);
    for (number, mail) in mails.iter().enumerate() {
        let subject = format!("\nSubject: [PATCH {number}/{count}] ");
        assert!(mail.contains(&subject), "{subject}\n{mail}");
        assert!(mail.contains(&format!("From: {SENDER}\n")), "{mail}");
        assert!(!mail.contains("@SENDER@"), "{mail}");
    }
    for (name, mail) in newest.iter().zip(&mails[1..]) {
        assert!(mail.contains(&format!("\n\nSigned-off-by: {SENDER}\n---\n")));
        let name = name.split(' ').next().expect("a name");
        let patch = fs::read_to_string(folder().join("patches").join(name)).expect(name);
        let (_, diff) = patch.split_once("\n---\n").expect(name);
        let diff = diff.replace("@SENDER@", SENDER);
        assert!(mail.contains(diff.trim_end()), "{name}");
    }
    let patches = fs::read_dir(directory.path()).expect("the directory");
    let patches = patches.map(|entry| entry.expect("a mail").path());
    // It reads every hunk, and fails where the counts are not what follows.
    let check = Command::new("git")
        .args(["apply", "--numstat"])
        .args(patches.filter(|path| !path.ends_with("0000-cover-letter.patch")))
        .current_dir("/")
        .output()
        .expect("git");
    let error = String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success(), "{error}");
}

#[test]
fn without_a_sender_there_is_a_placeholder_that_cannot_be_sent() {
    let directory = format(None);
    for mail in mails(directory.path()) {
        assert!(mail.contains("\nFrom: @SENDER@\n"), "{mail}");
    }
}

#[test]
fn a_directory_with_an_earlier_series_is_refused() {
    let directory = format(None);
    let output = run(directory.path(), None);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("is not empty"));
}
