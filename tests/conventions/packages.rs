//! The packages of the published crates, and the texts of a release.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::crates::{Workspace, numbers, text};
use crate::root;

/// The crates that are published, in an order in which each comes after what it is built from.
const PUBLISHED: [&str; 7] = [
    "vhost-user-timer-protocol",
    "vhost-user-timer-counter",
    "vhost-user-timer-frontend",
    "vhost-user-timer-model",
    "vhost-user-timer",
    "vhost-user-timer-ctl",
    "vhost-user-timer-capi",
];

/// Of the registry's categories, those that fit. It refuses a package with an unknown one.
const CATEGORIES: [&str; 3] = ["virtualization", "hardware-support", "no-std"];

fn list<'a>(package: &'a Value, what: &str) -> Vec<&'a str> {
    let items = package[what].as_array().expect(what);
    items.iter().map(text).collect()
}

#[test]
fn exactly_these_crates_are_published_and_each_says_what_it_is() {
    let workspace = Workspace::read();
    let mut published = PUBLISHED.to_vec();
    published.sort_unstable();
    assert_eq!(Vec::from_iter(workspace.released()), published);
    for package in workspace.packages() {
        let name = text(&package["name"]);
        if !PUBLISHED.contains(&name) {
            continue;
        }
        assert!(text(&package["description"]).len() > 20, "{name}");
        assert_eq!(text(&package["readme"]), "README.md", "{name}");
        assert_eq!(text(&package["license"]), "Apache-2.0 OR BSD-3-Clause");
        let keywords = list(package, "keywords");
        assert!((1..=5).contains(&keywords.len()), "{name}: {keywords:?}");
        assert!(
            keywords.iter().all(|word| word.len() <= 20),
            "{name}: {keywords:?}"
        );
        for category in list(package, "categories") {
            assert!(CATEGORIES.contains(&category), "{name}: {category}");
        }
        // There is no public address yet. In a release, all three or none.
        let addresses = ["repository", "homepage", "documentation"];
        let given = addresses.map(|what| package[what].is_string());
        assert!(
            given.iter().all(|&is| is == given[0]),
            "{name}: {addresses:?}: {given:?}"
        );
    }
}

fn finds_packages_among_each_other() -> bool {
    let cargo = std::env::var_os("CARGO").expect("cargo runs this test");
    let output = Command::new(cargo).arg("--version").output();
    let version = output.expect("cargo --version").stdout;
    let version = String::from_utf8(version).expect("UTF-8");
    numbers(version.split(' ').nth(1).expect("a version")) >= (1, 90)
}

/// `cargo package` of all published crates, with these arguments. Returns what it prints.
fn package(arguments: &[&str]) -> (String, String) {
    let cargo = std::env::var_os("CARGO").expect("cargo runs this test");
    let mut command = Command::new(cargo);
    command.args(["package", "--offline", "--locked", "--allow-dirty"]);
    command.args(arguments).current_dir(root());
    for name in PUBLISHED {
        command.args(["--package", name]);
    }
    let output = command.output().expect("cargo package");
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("UTF-8"));
    assert!(output.status.success(), "{stderr}");
    (stdout, stderr)
}

#[test]
fn a_package_has_its_licences_and_no_test_data() {
    let (files, _) = package(&["--list"]);
    let files: Vec<_> = files.lines().collect();
    for file in [
        "Cargo.toml",
        "README.md",
        "LICENSE-APACHE",
        "LICENSE-BSD-3-Clause",
    ] {
        let packages = files.iter().filter(|&&name| name == file).count();
        assert_eq!(packages, PUBLISHED.len(), "{file}");
    }
    let of_tests = |name: &&&str| name.starts_with("tests/") || name.ends_with(".bin");
    let of_tests: Vec<_> = files.iter().filter(of_tests).collect();
    assert!(of_tests.is_empty(), "{of_tests:?}");
}

#[test]
fn a_package_is_made_without_a_warning() {
    if !finds_packages_among_each_other() {
        println!("skipped: packages that need each other are made by Cargo 1.90 and newer");
        return;
    }
    let target = tempfile::tempdir().expect("a folder");
    let folder = target.path().to_str().expect("UTF-8");
    let (_, stderr) = package(&["--no-verify", "--target-dir", folder]);
    let packaged = stderr
        .lines()
        .filter(|line| line.contains("Packaged "))
        .count();
    assert_eq!(packaged, PUBLISHED.len(), "{stderr}");
    let expected = |line: &&str| {
        // Tests are left out.
        line.contains("is not included in the published package")
            // There is no public address yet.
            || line.ends_with("manifest has no documentation, homepage or repository")
    };
    let unexpected: Vec<_> = stderr
        .lines()
        .filter(|line| line.starts_with("warning"))
        .filter(|line| !expected(line))
        .collect();
    assert!(unexpected.is_empty(), "{stderr}");
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).expect(path)
}

/// The number behind this text in a source file.
fn number(path: &str, before: &str) -> String {
    let source = read(path);
    let (_, rest) = source
        .split_once(before)
        .unwrap_or_else(|| panic!("{path}: no {before}"));
    rest.chars().take_while(char::is_ascii_digit).collect()
}

#[test]
fn the_changelogs_begin_with_the_version_that_is_built() {
    let workspace = Workspace::read();
    let version = text(&workspace.packages()[0]["version"]);
    assert!(
        workspace
            .packages()
            .iter()
            .all(|package| package["version"] == version)
    );
    let changelog = read("CHANGELOG.md");
    let headings: Vec<_> = changelog
        .lines()
        .filter_map(|line| line.strip_prefix("## "))
        .collect();
    let newest = headings.iter().find(|&&heading| heading != "Unreleased");
    let newest = newest.expect("a version");
    let date = newest.strip_prefix(&format!("{version} - "));
    let date = date.unwrap_or_else(|| panic!("{newest}: the crates have {version}"));
    let form: String = date
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    assert_eq!(form, "0000-00-00", "{date}");
    let debian = read("contrib/debian/changelog");
    let newest = format!("vhost-user-timer ({version}-1) ");
    assert!(debian.starts_with(&newest), "{debian}");
}

#[test]
fn the_changelog_has_the_versions_of_the_formats_that_the_code_has() {
    let changelog = read("CHANGELOG.md");
    let row = |name: &str| {
        let row = changelog
            .lines()
            .find(|line| line.starts_with(&format!("| {name}")));
        let row = row.unwrap_or_else(|| panic!("no row {name}"));
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let first = |cell: &str| cell.split([',', ';']).next().unwrap_or(cell).to_owned();
        let last = |cell: &str| cell.rsplit(", ").next().unwrap_or(cell).to_owned();
        // What is written, the oldest and the newest that are read.
        (first(cells[1]), first(cells[2]), last(cells[2]))
    };
    let wire = number("protocol/src/lib.rs", "pub const VERSION: u32 = ");
    assert_eq!(row("wire"), (wire.clone(), wire.clone(), wire));
    let header = "backend/src/state/file/header.rs";
    let newest = number(header, "pub const NEWEST_VERSION: u32 = ");
    let oldest = number(header, "pub const FIRST_VERSION: u32 = ");
    assert_eq!(row("state file"), (newest.clone(), oldest, newest));
    for (name, path) in [
        (
            "device-state stream of the timer",
            "backend/src/state/stream.rs",
        ),
        (
            "device-state stream of the clock",
            "backend/src/state/clock_stream.rs",
        ),
    ] {
        let newest = number(path, "    version: ");
        // A VM is written in the oldest version that can say all of it.
        assert_eq!(
            row(name),
            ("1".to_owned(), "1".to_owned(), newest),
            "{name}"
        );
    }
}
