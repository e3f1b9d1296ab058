//! The programs are where cargo builds them, not always in `target`.

use crate::{make, root, run};

/// The commands of `make demo` and `make hostile`, which are not run.
fn commands(name: &str, value: &str) -> String {
    let (ends_well, text) = run(make()
        .args(["--dry-run", "demo", "hostile"])
        .env(name, value));
    assert!(ends_well, "{text}");
    text
}

fn assert_uses(text: &str, target: &str) {
    for program in [
        "release/mock-frontend",
        "release/vhost-user-timer",
        "debug/hostile",
    ] {
        let program = format!("'{target}/{program}'");
        assert!(text.contains(&program), "no {program}: {text}");
    }
}

#[test]
fn make_runs_the_programs_where_cargo_builds_them() {
    let root = root();
    let root = root.to_str().expect("UTF-8");
    assert_uses(
        &commands("CARGO_TARGET_DIR", "/elsewhere/a b"),
        "/elsewhere/a b",
    );
    // Relative to the repository, whatever starts cargo and wherever.
    let relative = commands("CARGO_TARGET_DIR", "built");
    assert_uses(&relative, &format!("{root}/built"));
    // As build.target-dir of a configuration of cargo.
    assert_uses(
        &commands("CARGO_BUILD_TARGET_DIR", "/configured"),
        "/configured",
    );
}
