//! `make install` and `make uninstall`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use vhost_user_timer_kit::backend_process::find_program;

use crate::{root, run};

/// The backend as it is tested, and a stand-in for the other program, where `cargo` would have
/// built them.
fn built() -> TempDir {
    let target = tempfile::tempdir().expect("a folder");
    let release = target.path().join("release");
    fs::create_dir(&release).expect("a folder");
    let backend = find_program().expect("the backend");
    fs::copy(backend, release.join("vhost-user-timer")).expect("a copy");
    fs::write(release.join("vhost-user-timer-ctl"), "#!/bin/sh\n").expect("a program");
    target
}

/// `make`, which installs what is in this folder. There is no cargo.
fn make(target: &Path, arguments: &[&str]) -> (bool, String) {
    let target = format!("CARGO_TARGET_DIR={}", target.display());
    run(crate::make()
        .args(arguments)
        .arg(target)
        .arg("CARGO=/nonexistent/cargo"))
}

/// Every file below a folder, by its path there, with its mode.
fn installed(folder: &Path) -> BTreeMap<String, u32> {
    fn walk(top: &Path, folder: &Path, found: &mut BTreeMap<String, u32>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(top, &path, found);
            } else {
                let mode = path.metadata().expect("a file").permissions().mode() & 0o7777;
                let name = path
                    .strip_prefix(top)
                    .expect("below")
                    .to_str()
                    .expect("UTF-8");
                found.insert(format!("/{name}"), mode);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(folder, folder, &mut found);
    found
}

/// The files of `contrib/FOLDER` that have one of these endings, each with where it is installed.
fn of(folder: &str, endings: &[&str], destination: &str) -> Vec<(String, u32)> {
    let entries = fs::read_dir(root().join("contrib").join(folder)).expect(folder);
    let names = entries.map(|entry| {
        entry
            .expect("an entry")
            .file_name()
            .into_string()
            .expect("UTF-8")
    });
    let names = names.filter(|name| endings.iter().any(|ending| name.ends_with(ending)));
    names
        .map(|name| (format!("{destination}/{name}"), 0o644))
        .collect()
}

/// All that belongs to an installation below `/usr`.
fn expected() -> BTreeMap<String, u32> {
    let mut all = vec![
        ("/usr/bin/vhost-user-timer".to_owned(), 0o755),
        ("/usr/bin/vhost-user-timer-ctl".to_owned(), 0o755),
    ];
    all.extend(of("man", &[".1"], "/usr/share/man/man1"));
    all.extend(of(
        "completions/bash",
        &[""],
        "/usr/share/bash-completion/completions",
    ));
    all.extend(of(
        "completions/zsh",
        &[""],
        "/usr/share/zsh/site-functions",
    ));
    all.extend(of(
        "completions/fish",
        &[""],
        "/usr/share/fish/vendor_completions.d",
    ));
    all.extend(of(
        "systemd",
        &[".service", ".socket"],
        "/usr/lib/systemd/system",
    ));
    all.extend(of("qemu", &[".json"], "/usr/share/vhost-user-timer"));
    all.extend(of("apparmor", &["vhost-user-timer"], "/etc/apparmor.d"));
    all.into_iter().collect()
}

#[test]
fn an_installation_has_every_file_of_contrib_and_its_removal_none() {
    let (target, destination) = (built(), tempfile::tempdir().expect("a folder"));
    let destination = destination.path();
    let into = format!("DESTDIR={}", destination.display());
    let (ends_well, text) = make(target.path(), &["install", &into, "PREFIX=/usr"]);
    assert!(ends_well, "{text}");
    assert_eq!(installed(destination), expected());

    let program = destination.join("usr/bin/vhost-user-timer");
    let version = run(Command::new(program).arg("--version"));
    assert_eq!(
        version,
        (
            true,
            concat!("vhost-user-timer ", env!("CARGO_PKG_VERSION"), "\n").to_owned()
        )
    );

    let (ends_well, text) = make(target.path(), &["uninstall", &into, "PREFIX=/usr"]);
    assert!(ends_well, "{text}");
    assert_eq!(installed(destination), BTreeMap::new());
}

#[test]
fn units_and_descriptors_name_the_program_where_it_is_installed() {
    let (target, destination) = (built(), tempfile::tempdir().expect("a folder"));
    let destination = destination.path();
    let into = format!("DESTDIR={}", destination.display());
    let (ends_well, text) = make(target.path(), &["install", &into]);
    assert!(ends_well, "{text}");
    let files = installed(destination);
    // A profile is for a program in /usr/bin.
    assert!(
        files.keys().all(|name| name.starts_with("/usr/local/")),
        "{files:?}"
    );
    let of_place = |name: &&String| {
        [".service", ".socket", ".json"]
            .iter()
            .any(|ending| name.ends_with(ending))
    };
    let mut named = 0;
    for name in files.keys().filter(of_place) {
        let text = fs::read_to_string(destination.join(&name[1..])).expect("text");
        assert!(!text.contains("/usr/bin/"), "{name}: {text}");
        named += text.matches("/usr/local/bin/vhost-user-timer").count();
    }
    assert!(named > 0, "{files:?}");
}

#[test]
fn what_was_not_built_is_not_installed_and_the_error_says_what_to_do() {
    let (target, destination) = (built(), tempfile::tempdir().expect("a folder"));
    fs::remove_file(target.path().join("release/vhost-user-timer-ctl")).expect("removed");
    let into = format!("DESTDIR={}", destination.path().display());
    let (ends_well, text) = make(target.path(), &["install", &into]);
    assert!(!ends_well);
    assert!(
        text.contains("vhost-user-timer-ctl: run 'make build' first"),
        "{text}"
    );
    assert_eq!(installed(destination.path()), BTreeMap::new());
}

#[test]
fn a_prefix_that_is_not_absolute_is_refused() {
    let target = built();
    let (ends_well, text) = make(target.path(), &["install", "PREFIX=usr"]);
    assert!(!ends_well);
    assert!(
        text.contains("PREFIX=usr is not an absolute path"),
        "{text}"
    );
}
