//! The commands in the documents work as they are pasted.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vhost_user_timer_kit::backend_process::find_program;

use crate::{root, run};

/// What is between one ```` ```sh ```` and its end.
struct Block {
    /// The document, and the line where the block begins.
    place: String,
    text: String,
}

fn documents(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            let hidden = path
                .file_name()
                .is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
            // Nor where cargo builds, which it marks.
            if !hidden && !path.join("CACHEDIR.TAG").exists() {
                documents(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
}

/// The blocks of every document.
fn blocks() -> Vec<Block> {
    let root = root();
    let mut paths = Vec::new();
    documents(&root, &mut paths);
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let document = fs::read_to_string(&path).expect("a document");
        let mut open: Option<Block> = None;
        for (line, text) in (1..).zip(document.lines()) {
            match &mut open {
                Some(_) if text == "```" => found.extend(open.take()),
                Some(block) => block.text += &format!("{text}\n"),
                None if text == "```sh" => {
                    let document = path.strip_prefix(&root).expect("below the root");
                    let place = format!("{}:{line}", document.display());
                    open = Some(Block {
                        place,
                        text: String::new(),
                    });
                }
                None => {}
            }
        }
        assert!(open.is_none(), "{}: a block has no end", path.display());
    }
    assert!(found.len() > 20);
    found
}

/// The commands of a block, each with its words. Comments, `&` and line breaks are gone.
fn commands(block: &Block) -> Vec<Vec<String>> {
    let text = block.text.replace("\\\n", " ");
    let lines = text.lines().map(|line| {
        let words = line
            .split_whitespace()
            .take_while(|word| !word.starts_with('#'));
        words
            .filter(|word| *word != "&")
            .map(str::to_owned)
            .collect::<Vec<_>>()
    });
    lines.filter(|words| !words.is_empty()).collect()
}

/// The program as it was built: the backend beside which it is, or the test.
fn program(name: &str) -> PathBuf {
    if name == "vhost-user-timer" {
        return find_program().expect("the backend");
    }
    let test = std::env::current_exe().expect("this test");
    let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    let places = [
        profile.join(name),
        profile.with_file_name("release").join(name),
    ];
    let program = places.into_iter().find(|program| program.is_file());
    program.unwrap_or_else(|| panic!("no {name}: cargo build -p {name}"))
}

/// The long options of a program and of its commands.
fn options(name: &str) -> BTreeSet<String> {
    let page = fs::read_to_string(root().join(format!("contrib/man/{name}.1"))).expect(name);
    let page = page.replace("\\-", "-");
    let words = page.split(|c: char| !(c.is_ascii_lowercase() || c == '-'));
    words
        .filter(|word| word.starts_with("--"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn each_command_in_a_document_names_what_there_is() {
    let makefile = fs::read_to_string(root().join("Makefile")).expect("Makefile");
    let lock = fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock");
    let mut wrong = Vec::new();
    let mut checked = 0;
    for block in blocks() {
        let (parses, text) = run(Command::new("bash").args(["-n", "-c", &block.text]));
        if !parses {
            wrong.push(format!("{}: {text}", block.place));
        }
        for words in commands(&block) {
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            let words = words.strip_prefix(&["sudo"]).unwrap_or(&words);
            checked += 1;
            let fails = match words {
                [
                    name @ ("vhost-user-timer" | "vhost-user-timer-ctl"),
                    rest @ ..,
                ] => {
                    let have = options(name);
                    let named = rest.iter().filter(|word| word.starts_with("--"));
                    let mut named = named.map(|word| word.split('=').next().unwrap_or(word));
                    named
                        .find(|option| !have.contains(*option))
                        .map(|option| format!("no option {option}"))
                }
                ["make", targets @ ..] => {
                    // In contrib/qemu it is QEMU's make. After the targets come variables.
                    let of_ours = !block.place.starts_with("contrib/qemu/");
                    let targets = targets.iter().take_while(|word| !word.contains('='));
                    let mut targets = targets.filter(|_| of_ours);
                    let missing = |target: &&&str| !makefile.contains(&format!("\n{target}:"));
                    targets
                        .find(missing)
                        .map(|target| format!("no target {target}"))
                }
                ["cargo", rest @ ..] => {
                    let mut pairs = rest
                        .windows(2)
                        .filter(|pair| matches!(pair[0], "-p" | "--package"));
                    let missing =
                        |pair: &&[&str]| !lock.contains(&format!("name = \"{}\"", pair[1]));
                    pairs
                        .find(missing)
                        .map(|pair| format!("no crate {}", pair[1]))
                }
                [file, ..] if file.starts_with("contrib/") || file.starts_with("tests/") => {
                    let missing = !root().join(file).is_file();
                    missing.then(|| format!("no file {file}"))
                }
                _ => {
                    checked -= 1;
                    None
                }
            };
            wrong.extend(fails.map(|what| format!("{}: {what}", block.place)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(checked > 30, "{checked}");
}

/// What is made for one VM, in each document.
const FOLDER: &str = "/tmp/vm1";

#[test]
fn a_command_that_needs_the_vm_s_folder_comes_after_the_one_that_makes_it() {
    for block in blocks() {
        let commands = commands(&block);
        let starts = |words: &Vec<String>| words[0] == "vhost-user-timer";
        let Some(start) = commands.iter().position(starts) else {
            continue;
        };
        let uses = commands[start].iter().any(|word| word.contains("/vm1/"));
        let makes =
            commands[..start].contains(&["mkdir", "-p", FOLDER].map(str::to_owned).to_vec());
        assert!(!uses || makes, "{}: no mkdir -p {FOLDER}", block.place);
        // What follows connects, so the socket must be there.
        if commands.len() > start + 1 {
            assert_eq!(commands[start + 1][0], "until", "{}", block.place);
        }
    }
}

#[test]
fn the_first_backend_of_the_readme_answers_as_it_is_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).expect("a folder");
    for name in ["vhost-user-timer", "vhost-user-timer-ctl"] {
        std::os::unix::fs::symlink(program(name), bin.join(name)).expect("a link");
    }
    let first = blocks().into_iter().find(|block| {
        block.place.starts_with("README.md") && block.text.contains("vhost-user-timer ")
    });
    let first = first.expect("a block that starts the backend");
    // Of its own for this test; the commands are those that stand there.
    let vm = folder.path().join("vm1");
    let script = first.text.replace(FOLDER, vm.to_str().expect("UTF-8"));
    let path = std::env::var("PATH").expect("PATH");
    // Where a command fails, or the socket never comes, the backend ends as well.
    let (ends_well, text) = run(Command::new("timeout")
        .args(["--kill-after=5", "30", "bash", "-e", "-c"])
        .arg(format!(
            "trap 'kill $! 2>/dev/null || true' EXIT\n{script}wait $!"
        ))
        .env("PATH", format!("{}:{path}", bin.display())));
    assert!(ends_well, "{script}{text}");
    for part in ["phase           NEW\n", "Ending on SIGTERM"] {
        assert!(text.contains(part), "no {part:?}: {script}{text}");
    }
    assert!(vm.join("state").is_file());
}
