//! What the compiler does not see: the width of comments, and where the documents' links lead.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::root;

/// The last column of a comment, as rustfmt's of code.
const WIDTH: usize = 100;

/// Every file of the repository with one of these extensions.
fn files(extensions: &[&str]) -> Vec<PathBuf> {
    fn walk(folder: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .expect("UTF-8");
            if path.is_dir() {
                // Not where cargo builds, which it marks.
                if name != ".git" && !path.join("CACHEDIR.TAG").exists() {
                    walk(&path, extensions, found);
                }
            } else if extensions.iter().any(|extension| name.ends_with(extension)) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), extensions, &mut found);
    found.sort();
    assert!(!found.is_empty(), "{extensions:?}");
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Whether this line is a comment that is too wide. A table's row cannot be broken.
fn is_too_wide(line: &str, marker: &str) -> bool {
    let comment = line.trim_start();
    let is_row = comment.trim_start_matches(['/', '!', ' ']).starts_with('|');
    comment.starts_with(marker) && !is_row && line.chars().count() > WIDTH
}

#[test]
fn no_comment_is_wider_than_100_columns() {
    let mut wide = Vec::new();
    for (extensions, marker) in [(&[".rs"][..], "//"), (&[".toml", ".sh", "Makefile"], "#")] {
        for path in files(extensions) {
            for (number, line) in (1..).zip(read(&path).lines()) {
                if is_too_wide(line, marker) {
                    wide.push(format!("{}:{number}", path.display()));
                }
            }
        }
    }
    assert!(
        wide.is_empty(),
        "{} comments:\n{}",
        wide.len(),
        wide.join("\n")
    );
}

#[test]
fn the_width_of_a_comment_counts_characters_and_its_indentation() {
    let of = |width: usize| format!("    /// {}", "é".repeat(width - 8));
    assert!(!is_too_wide(&of(100), "//"));
    assert!(is_too_wide(&of(101), "//"));
    assert!(!is_too_wide(&of(101).replace("/// ", "/// | "), "//"));
    assert!(!is_too_wide(&of(101).replace("///", "let"), "//"));
}

/// Words that a reader has to stop at, and what CONTRIBUTING.md has for them.
const WORDS: [(&str, &str); 6] = [
    ("afresh", "again"),
    ("anew", "again"),
    ("for ever", "forever"),
    ("in vain", "without result"),
    ("likewise", "the same"),
    ("whoever", "the thread that, the VMM that"),
];

/// The first of [`WORDS`] in a text, whatever its case.
fn unwanted(text: &str) -> Option<&'static str> {
    let text = text.to_lowercase();
    let words: Vec<_> = text.split(|c: char| !c.is_alphanumeric()).collect();
    let is_in = |word: &str| {
        let parts: Vec<_> = word.split(' ').collect();
        words.windows(parts.len()).any(|window| window == parts)
    };
    WORDS.iter().map(|(word, _)| *word).find(|word| is_in(word))
}

#[test]
fn no_text_has_a_word_that_contributing_replaces() {
    let mut found = Vec::new();
    for path in files(&[".rs", ".md", ".sh", ".toml", "Makefile"]) {
        // These two name the words.
        if path.ends_with("CONTRIBUTING.md") || path.ends_with("conventions/text.rs") {
            continue;
        }
        for (number, line) in (1..).zip(read(&path).lines()) {
            if let Some(word) = unwanted(line) {
                found.push(format!("{}:{number}: {word}", path.display()));
            }
        }
    }
    assert!(
        found.is_empty(),
        "{} places:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn an_unwanted_word_is_found_as_a_word_only() {
    assert_eq!(unwanted("It begins Anew."), Some("anew"));
    assert_eq!(unwanted("waits for ever, in vain"), Some("for ever"));
    assert_eq!(unwanted("a renewed wait, for every vCPU"), None);
}

#[test]
fn contributing_says_what_to_write_instead() {
    let page = read(&root().join("CONTRIBUTING.md"));
    for (word, instead) in WORDS {
        assert!(page.contains(&format!("| {word} | {instead} |")), "{word}");
    }
}

/// The anchor that a Markdown heading has.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = heading
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// A document's links as text and target, but for those to elsewhere.
pub(crate) fn links_with_text(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let links = text.split("](").zip(text.split("](").skip(1));
    let links = links.filter_map(|(before, after)| {
        let (_, text) = before.rsplit_once('[')?;
        Some((text, after.split(')').next()?))
    });
    links.filter(|(_, target)| !target.contains("://") && !target.contains(char::is_whitespace))
}

/// The targets of a document's links, but for those to elsewhere.
fn links(text: &str) -> impl Iterator<Item = &str> {
    links_with_text(text).map(|(_, target)| target)
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    let mut dead = Vec::new();
    for path in files(&[".md"]) {
        let text = read(&path);
        let folder = path.parent().expect("a folder");
        for link in links(&text) {
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                path.clone()
            } else {
                folder.join(file)
            };
            let leads = if fragment.is_empty() {
                target.exists()
            } else {
                target.is_file() && {
                    let text = read(&target);
                    let headings = text.lines().filter(|line| line.starts_with('#'));
                    let anchors: HashSet<_> = headings.map(anchor).collect();
                    anchors.contains(fragment)
                }
            };
            if !leads {
                dead.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(
        dead.is_empty(),
        "{} links:\n{}",
        dead.len(),
        dead.join("\n")
    );
}

#[test]
fn a_headings_anchor_is_what_a_forge_makes_of_it() {
    assert_eq!(anchor("## 9. Time page"), "9-time-page");
    assert_eq!(anchor("### `panic = \"abort\"`"), "panic--abort");
    assert_eq!(
        anchor("# How to add a clock source"),
        "how-to-add-a-clock-source"
    );
}
