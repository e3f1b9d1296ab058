//! Which crate may depend on which: ARCHITECTURE.md, "Crates".

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

use crate::root;

/// What `cargo metadata` says about the workspace's crates.
pub(crate) struct Workspace {
    packages: Vec<Value>,
}

/// An edge of the crate graph.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Dependency {
    name: String,
    /// Of the code itself, not of its tests.
    released: bool,
    /// A crate of the workspace.
    own: bool,
}

pub(crate) type Graph = BTreeMap<String, BTreeSet<String>>;

/// The packages that `cargo metadata` lists.
fn packages(args: &[&str]) -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").expect("cargo runs this test");
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--offline"])
        .args(args)
        .current_dir(root())
        .output()
        .expect("cargo metadata");
    assert!(output.status.success(), "{output:?}");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    metadata["packages"].as_array().expect("packages").clone()
}

impl Workspace {
    pub(crate) fn read() -> Self {
        Workspace {
            packages: packages(&["--no-deps"]),
        }
    }

    pub(crate) fn packages(&self) -> &[Value] {
        &self.packages
    }

    /// Every crate of the workspace with its dependencies.
    fn crates(&self) -> impl Iterator<Item = (&str, Vec<Dependency>)> {
        self.packages.iter().map(|package| {
            let dependencies = package["dependencies"].as_array().expect("dependencies");
            let dependencies = dependencies
                .iter()
                .map(|dependency| Dependency {
                    name: text(&dependency["name"]).to_owned(),
                    released: dependency["kind"] != "dev",
                    own: dependency["path"].is_string(),
                })
                .collect();
            (text(&package["name"]), dependencies)
        })
    }

    /// The crates of the workspace, and on which of them each depends.
    fn graph(&self) -> Graph {
        self.crates()
            .map(|(name, dependencies)| {
                let own = dependencies.into_iter().filter(|to| to.own);
                (name.to_owned(), own.map(|to| to.name).collect())
            })
            .collect()
    }

    /// What the crate is built from, that is without what its tests use.
    fn built_from(&self, name: &str) -> BTreeSet<String> {
        let (_, dependencies) = self
            .crates()
            .find(|(candidate, _)| *candidate == name)
            .unwrap_or_else(|| panic!("no crate {name}"));
        let released = dependencies.into_iter().filter(|to| to.released);
        released.map(|to| to.name).collect()
    }

    /// The crates that are published or installed.
    pub(crate) fn released(&self) -> BTreeSet<&str> {
        let released = self.packages.iter().filter(|p| p["publish"].is_null());
        released.map(|package| text(&package["name"])).collect()
    }
}

pub(crate) fn text(value: &Value) -> &str {
    value.as_str().expect("a string")
}

/// The nodes that are part of a circle, or lead to one.
pub(crate) fn circular(mut graph: Graph) -> BTreeSet<String> {
    loop {
        let free: Vec<_> = graph
            .iter()
            .filter(|(_, to)| to.iter().all(|name| !graph.contains_key(name)))
            .map(|(name, _)| name.clone())
            .collect();
        if free.is_empty() {
            return graph.into_keys().collect();
        }
        for name in free {
            graph.remove(&name);
        }
    }
}

#[test]
fn no_crate_depends_on_itself_not_even_by_its_tests() {
    assert_eq!(circular(Workspace::read().graph()), BTreeSet::new());
}

#[test]
fn a_circle_is_found_wherever_it_is() {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let graph = |edges: &[(&str, &[&str])]| {
        let edges = edges.iter();
        edges
            .map(|(name, to)| ((*name).to_owned(), set(to)))
            .collect()
    };
    let line = graph(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])]);
    assert_eq!(circular(line), BTreeSet::new());
    let itself = graph(&[("a", &["a"]), ("b", &[])]);
    assert_eq!(circular(itself), set(&["a"]));
    let below = graph(&[("a", &["b"]), ("b", &["c"]), ("c", &["b"]), ("d", &[])]);
    assert_eq!(circular(below), set(&["a", "b", "c"]));
}

#[test]
fn the_protocol_the_counters_and_the_model_are_built_from_little() {
    let workspace = Workspace::read();
    for (name, may) in [
        ("vhost-user-timer-protocol", &["thiserror", "zerocopy"][..]),
        (
            "vhost-user-timer-counter",
            &[
                "raw-cpuid",
                "rustix",
                "thiserror",
                "vhost-user-timer-protocol",
            ],
        ),
        (
            "vhost-user-timer-model",
            &["thiserror", "vhost-user-timer-protocol", "zerocopy"],
        ),
    ] {
        let may = may.iter().map(|name| (*name).to_owned()).collect();
        let too_many: Vec<_> = workspace
            .built_from(name)
            .difference(&may)
            .cloned()
            .collect();
        assert!(too_many.is_empty(), "{name} depends on {too_many:?}");
    }
}

#[test]
fn nothing_that_is_released_is_built_from_a_test_crate() {
    let workspace = Workspace::read();
    let released = workspace.released();
    assert!(released.contains("vhost-user-timer"), "{released:?}");
    let graph = workspace.graph();
    for &name in &released {
        for dependency in workspace.built_from(name) {
            let own = graph.contains_key(&dependency);
            let is_released = released.contains(&*dependency);
            assert!(!own || is_released, "{name} depends on {dependency}");
        }
    }
}

#[test]
fn the_backend_is_not_built_from_the_frontend_nor_the_frontend_from_the_backend() {
    let workspace = Workspace::read();
    let backend = workspace.built_from("vhost-user-timer");
    assert!(!backend.contains("vhost-user-timer-frontend"));
    let frontend = workspace.built_from("vhost-user-timer-frontend");
    assert!(!frontend.contains("vhost-user-timer"));
    assert!(!frontend.contains("vhost-user-timer-model"));
}

#[test]
fn the_protocol_and_the_model_have_neither_std_nor_unsafe_code() {
    for library in ["protocol/src/lib.rs", "backend/model/src/lib.rs"] {
        let source = std::fs::read_to_string(root().join(library)).expect(library);
        let has = |attribute| source.lines().any(|line| line == attribute);
        // Their own tests may use std.
        let no_std = has("#![no_std]") || has("#![cfg_attr(not(test), no_std)]");
        assert!(no_std, "{library}");
        assert!(has("#![forbid(unsafe_code)]"), "{library}");
    }
}

/// The numbers of a version of Rust: 1.89 is (1, 89).
pub(crate) fn numbers(version: &str) -> (u32, u32) {
    let mut numbers = version.split('.').map(|part| part.parse().expect(version));
    (numbers.next().expect(version), numbers.next().unwrap_or(0))
}

#[test]
fn no_dependency_wants_a_newer_compiler_than_the_workspace() {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let all = packages(&["--filter-platform", &platform]);
    let own = Workspace::read();
    let ours = numbers(text(&own.packages[0]["rust_version"]));
    let newer: Vec<_> = all
        .iter()
        .filter(|package| {
            package["rust_version"]
                .as_str()
                .is_some_and(|v| numbers(v) > ours)
        })
        .map(|package| format!("{} {}", package["name"], package["rust_version"]))
        .collect();
    assert!(all.len() > own.packages.len());
    assert!(newer.is_empty(), "{newer:?}");
}
