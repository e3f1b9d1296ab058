//! What management software reads: `--print-capabilities`, the description of the program, and the
//! page that explains both.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use vhost_user_timer_kit::backend_process::find_program;

/// The options that QEMU's conventions and every program have.
const CONVENTIONAL: [&str; 5] = ["fd", "help", "print-capabilities", "socket-path", "version"];

/// What the program prints on standard output, and nothing else.
fn printed(args: &[&str]) -> String {
    let output = Command::new(find_program().unwrap())
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}");
    assert_eq!(output.stderr, b"", "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn capabilities() -> Value {
    serde_json::from_str(&printed(&["--print-capabilities"])).unwrap()
}

fn features() -> BTreeSet<String> {
    let features: Vec<String> = serde_json::from_value(capabilities()["features"].clone()).unwrap();
    let set: BTreeSet<_> = features.iter().cloned().collect();
    assert_eq!(set.len(), features.len(), "twice in {features:?}");
    set
}

/// The long options that `--help` lists, without their dashes.
fn options() -> BTreeSet<String> {
    let help = printed(&["--help"]);
    let lines = help.lines().map(str::trim_start);
    let options = lines.filter(|line| line.starts_with('-'));
    let long = options.filter_map(|line| line.split_once("--"));
    let name = |(_, rest): (&str, &str)| {
        let end = rest.find(|c: char| c != '-' && !c.is_ascii_alphanumeric());
        rest[..end.unwrap_or(rest.len())].to_owned()
    };
    long.map(name).collect()
}

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/qemu")
}

#[test]
fn print_capabilities_is_json_on_stdout_and_other_options_are_ignored() {
    let plain = printed(&["--print-capabilities"]);
    for args in [
        &["--print-capabilities", "--socket-path=/nowhere/at/all"][..],
        &["--no-such-option", "--print-capabilities", "--max-vcpus=0"],
        &[
            "--fd=77",
            "--socket-path=x",
            "--print-capabilities",
            "stray",
        ],
    ] {
        assert_eq!(printed(args), plain);
    }
    let capabilities = capabilities();
    let members: Vec<_> = capabilities.as_object().unwrap().keys().collect();
    assert_eq!(members, ["features", "type"]);
}

#[test]
fn each_option_beyond_qemus_conventions_is_a_feature() {
    let options = options();
    for option in CONVENTIONAL {
        assert!(options.contains(option), "--{option} is not in --help");
    }
    let conventional = CONVENTIONAL.map(str::to_owned).into();
    let beyond: BTreeSet<_> = options.difference(&conventional).cloned().collect();
    assert!(beyond.is_subset(&features()), "{beyond:?}");
}

#[test]
fn each_feature_is_an_option_or_is_described() {
    let page = fs::read_to_string(folder().join("DISCOVERY.md")).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let described: BTreeSet<_> = rows
        .map(|row| row.split_once('`').unwrap().0.to_owned())
        .collect();
    let options = options();
    let parts: BTreeSet<_> = features().difference(&options).cloned().collect();
    assert_eq!(parts, described);
}

#[test]
fn the_description_is_of_the_type_that_the_program_prints() {
    let description = fs::read(folder().join("50-vhost-user-timer.json")).unwrap();
    let description: Value = serde_json::from_slice(&description).unwrap();
    assert_eq!(description["type"], capabilities()["type"]);
}
