//! What is committed of the manual pages and completions is what the definitions say, and works.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhost_user_timer_manual::{files, root};

/// The files below this folder, as paths in the repository.
fn below(folder: &str) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(root().join(folder)).expect(folder) {
        let entry = entry.expect(folder);
        let path = Path::new(folder).join(entry.file_name());
        if entry.path().is_dir() {
            found.extend(below(path.to_str().expect("UTF-8")));
        } else {
            found.insert(path);
        }
    }
    found
}

#[test]
fn the_committed_pages_and_completions_are_those_of_the_command_lines() {
    let stale: Vec<_> = files()
        .into_iter()
        .filter(|(path, content)| {
            let committed = fs::read_to_string(root().join(path));
            committed.ok().as_ref() != Some(content)
        })
        .map(|(path, _)| path)
        .collect();
    assert!(
        stale.is_empty(),
        "run `make manual`, which renews {stale:?}"
    );
}

#[test]
fn nothing_else_is_among_them() {
    let made: BTreeSet<_> = files().into_iter().map(|(path, _)| path).collect();
    let mut committed = below("contrib/man");
    committed.extend(below("contrib/completions"));
    assert_eq!(committed, made);
}

/// The output of a program, or `None`, with a line that says so, where the machine has none.
fn run(program: &str, args: &[&str]) -> Option<(bool, String)> {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
        .env("LC_ALL", "C.UTF-8")
        .env("MANROFFSEQ", "")
        .env("MANWIDTH", "80");
    match command.output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            Some((
                output.status.success(),
                String::from_utf8_lossy(&text).into_owned(),
            ))
        }
        Err(error) => {
            println!("skipped: {program}: {error}");
            None
        }
    }
}

#[test]
fn groff_formats_each_page_without_a_warning() {
    for (path, _) in files() {
        if !path.starts_with("contrib/man") {
            continue;
        }
        let path = path.to_str().expect("UTF-8");
        // Terminal output, as man does it; -ww reports every kind of warning.
        let args = ["-man", "-Tutf8", "-ww", "-z", path];
        if let Some((ends_well, text)) = run("groff", &args) {
            assert!(ends_well && text.is_empty(), "{path}: {text}");
        }
    }
}

#[test]
fn man_shows_the_options_and_the_exit_codes() {
    let args = ["-l", "contrib/man/vhost-user-timer.1"];
    let Some((ends_well, text)) = run("man", &args) else {
        return;
    };
    assert!(ends_well, "{text}");
    for part in [
        "--socket-path <PATH>",
        "EXIT STATUS",
        "ENVIRONMENT",
        "EXAMPLES",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn bash_completes_an_option_and_a_command() {
    let complete = |program: &str, words: &str, last: &str| {
        let script = format!(
            "source contrib/completions/bash/{program}; COMP_WORDS=({program} {words} {last}); \
             COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); \
             function=$(complete -p {program}); function=${{function#*-F }}; \
             ${{function%% *}} {program} '{last}' '{words}'; echo \"${{COMPREPLY[@]}}\""
        );
        run("bash", &["--norc", "-c", &script])
    };
    for (program, words, last, all) in [
        ("vhost-user-timer", "", "--rtc-cl", "--rtc-clock\n"),
        (
            "vhost-user-timer",
            "--counter-source",
            "mono",
            "monotonic\n",
        ),
        ("vhost-user-timer-ctl", "", "du", "dump\n"),
    ] {
        if let Some(completed) = complete(program, words, last) {
            assert_eq!(
                completed,
                (true, all.to_owned()),
                "{program} {words} {last}"
            );
        }
    }
}
