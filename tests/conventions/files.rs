//! Which file of a crate may use which: no two files need each other.
//!
//! Files are read as text: their `use` declarations, and paths that begin with `crate` or `super`.
//! A file may use its folder's `mod.rs`, and that of a folder around it, which speak for what is
//! below them; and those may use what is below. Unit tests count for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::crates::{Graph, circular};
use crate::root;

/// A module's path in its crate; empty for the root.
type Module = Vec<String>;

/// The modules of a crate, each with its file's text.
fn modules(source: &Path) -> BTreeMap<Module, String> {
    fn walk(folder: &Path, module: &Module, found: &mut BTreeMap<Module, String>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path
                .file_stem()
                .and_then(|name| name.to_str())
                .expect("UTF-8");
            let child = [module.as_slice(), &[name.to_owned()]].concat();
            match (path.is_dir(), name) {
                (true, "tests" | "bin") | (false, "tests" | "main") => {}
                (true, _) => walk(&path, &child, found),
                (false, name) => {
                    let text = without_tests(&fs::read_to_string(&path).expect("UTF-8"));
                    let is_own = matches!(name, "mod" | "lib");
                    found.insert(if is_own { module.clone() } else { child }, text);
                }
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(source, &Vec::new(), &mut found);
    found
}

/// The text without comments and without the unit tests at its end.
fn without_tests(text: &str) -> String {
    let code = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(text);
    let lines = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or(line));
    lines.collect::<Vec<_>>().join("\n")
}

/// The paths of a tree of `use`: `a::{b, c::{d, e}}` is a::b, a::c::d and a::c::e.
fn paths(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, group)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or(tree);
        return vec![path.split_whitespace().collect()];
    };
    let group = group.trim_end().strip_suffix('}').unwrap_or(group);
    let mut depth = 0;
    let parts = group.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    let parts = parts.filter(|part| !part.trim().is_empty());
    parts
        .flat_map(|part| paths(&format!("{prefix}{}", part.trim())))
        .collect()
}

/// The paths that a file names, as far as they can lead to another file of its crate.
fn named(text: &str) -> Vec<String> {
    let uses = text.split(';').filter_map(|statement| {
        let words = statement.rsplit_once("use ")?;
        let starts = words.0.trim_end();
        let is_use = starts.is_empty() || starts.ends_with(['}', ']', ')', 'b']);
        is_use.then(|| paths(words.1))
    });
    let mut all: Vec<_> = uses.flatten().collect();
    let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let inline = text.split(|c| !is_path(c));
    let inline = inline.filter(|path| path.starts_with("crate::") || path.starts_with("super::"));
    all.extend(inline.map(str::to_owned));
    all
}

/// The module that a path leads to, seen from another one.
fn resolve(path: &str, from: &Module, modules: &BTreeMap<Module, String>) -> Option<Module> {
    let mut segments = path.split("::").peekable();
    let mut module = from.clone();
    match *segments.peek()? {
        "crate" => {
            module.clear();
            segments.next();
        }
        "super" => {
            while segments.next_if_eq(&"super").is_some() {
                module.pop();
            }
        }
        "self" => {
            segments.next();
        }
        _ => {}
    }
    for segment in segments {
        let child = [module.as_slice(), &[segment.to_owned()]].concat();
        if !modules.contains_key(&child) {
            break;
        }
        module = child;
    }
    (module != *from).then_some(module)
}

/// Which files of a crate use which, without those in which one is around the other.
fn graph(modules: &BTreeMap<Module, String>) -> Graph {
    let name = |module: &Module| module.join("::");
    modules
        .iter()
        .map(|(module, text)| {
            let targets = named(text).into_iter();
            let used = targets
                .filter_map(|path| resolve(&path, module, modules))
                .filter(|target| !target.starts_with(module) && !module.starts_with(target))
                .map(|target| name(&target))
                .collect::<BTreeSet<_>>();
            (name(module), used)
        })
        .collect()
}

#[test]
fn no_two_files_need_each_other() {
    for source in [
        "protocol/src",
        "protocol/counter/src",
        "protocol/frontend/src",
        "backend/src",
        "backend/ctl/src",
        "backend/model/src",
        "contrib/capi/src",
        "tests/kit/src",
        "tests/tools/src",
    ] {
        let modules = modules(&root().join(source));
        assert!(modules.len() > 2, "{source}");
        let circle = circular(graph(&modules));
        assert!(circle.is_empty(), "{source}: {circle:?}");
    }
}

#[test]
fn a_circle_of_files_is_found_however_they_name_each_other() {
    let module = |path: &str| path.split("::").map(str::to_owned).collect::<Module>();
    let modules = |a: &str, b: &str| {
        let files = [
            ("x", "pub mod a;"),
            ("x::a", a),
            ("x::b", b),
            ("x::c", "fn c() {}"),
        ];
        let files = files.map(|(path, text)| (module(path), without_tests(text)));
        BTreeMap::from(files)
    };
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    for a in [
        "use super::b::B;",
        "use std::io;\nuse crate::x::{b::{B, C}, c};",
        "fn f() -> crate::x::b::B { crate::x::b::B }",
        "#[cfg(unix)]\npub(crate) use crate::x::b as other;",
    ] {
        let circle = circular(graph(&modules(a, "use super::a;")));
        assert_eq!(circle, names(&["x::a", "x::b"]), "{a}");
    }
    for a in [
        "use super::X;",
        "// use super::b::B;",
        "use super::c;\n#[cfg(test)]\nmod tests {\n    use super::super::b;\n}",
    ] {
        let circle = circular(graph(&modules(a, "use super::a;")));
        assert_eq!(circle, names(&[]), "{a}");
    }
}
