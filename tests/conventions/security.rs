//! SECURITY.md names the test that shows each of its claims: `[name](path/to/file.rs)`.

use std::fs;

use crate::root;
use crate::text::links_with_text;

/// Whether a Rust file has a test of this name, or a scenario that `scenarios!` makes one of.
fn has_test(source: &str, name: &str) -> bool {
    let head = format!("fn {name}(");
    let scenario = format!("{name}:");
    let is_listed = |line: &str| line.trim().starts_with(&scenario);
    if source.contains("scenarios! {") && source.lines().any(is_listed) {
        return source.contains(&head);
    }
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        if line.starts_with("#[test]") {
            is_test = true;
        } else if line.starts_with(&head) {
            return is_test;
        } else if !line.starts_with("#[") {
            is_test = false;
        }
    }
    false
}

/// The tests that a text names, with their files.
fn tests_named(text: &str) -> Vec<(&str, &str)> {
    links_with_text(text)
        .filter(|(_, target)| target.ends_with(".rs"))
        .map(|(name, target)| (name.trim_matches('`'), target))
        .collect()
}

#[test]
fn every_test_that_security_names_exists() {
    let page = fs::read_to_string(root().join("SECURITY.md")).expect("SECURITY.md");
    let named = tests_named(&page);
    assert!(named.len() > 20, "{named:?}");
    let missing: Vec<_> = named
        .into_iter()
        .filter(|(name, target)| {
            let source = fs::read_to_string(root().join(target));
            !source.is_ok_and(|source| has_test(&source, name))
        })
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_row_about_a_peer_names_a_test_or_says_why_there_is_none() {
    let page = fs::read_to_string(root().join("SECURITY.md")).expect("SECURITY.md");
    let rows = rows_without_a_test(&page);
    assert!(rows.is_empty(), "{rows:#?}");
}

/// The rows of tables with a column "shown by" whose last cell has neither a test nor a reason.
fn rows_without_a_test(page: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut is_shown_by = false;
    for line in page.lines() {
        if !line.starts_with('|') {
            is_shown_by = false;
        } else if line.trim_end().ends_with("| shown by |") {
            is_shown_by = true;
        } else if is_shown_by && !line.starts_with("|---") {
            let cell = line.trim_end().trim_end_matches('|').rsplit('|').next();
            let cell = cell.unwrap_or_default().trim();
            if tests_named(cell).is_empty() && !cell.starts_with("not shown:") {
                found.push(line);
            }
        }
    }
    found
}

#[test]
fn a_test_is_told_from_a_function_and_a_row_without_one_is_found() {
    let source = "#[test]\n#[cfg(unix)]\nfn it_holds() {}\nfn helper() {}\n    #[test]\n    fn in_a_module() {}\n";
    for (name, is_test) in [
        ("it_holds", true),
        ("in_a_module", true),
        ("helper", false),
        ("it_hold", false),
        ("holds", false),
    ] {
        assert_eq!(has_test(source, name), is_test, "{name}");
    }
    let source = "scenarios! {\n    binary {\n        it_is: \"1.1\";\n    }\n}\nfn it_is() {}\nfn it() {}\n";
    assert!(has_test(source, "it_is") && !has_test(source, "it"));
    let page = "| a | shown by |\n|---|---|\n| b | [`t`](x.rs) |\n| c | nothing |\n| d | not shown: why |\n";
    assert_eq!(rows_without_a_test(page), ["| c | nothing |"]);
    assert_eq!(tests_named(page), [("t", "x.rs")]);
}
