//! The library as a program in C has it: `tests/c` is compiled by this machine's C compiler, with
//! warnings as errors, and run against a real backend.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;
use vhost_user_timer_kit::backend_process::find_program;

const SHARED: &str = "libvhost_user_timer.so";
const STATIC: &str = "libvhost_user_timer.a";
const SONAME: &str = "libvhost_user_timer.so.0";
const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The output of a command that must succeed.
fn run(command: &mut Command) -> Output {
    let program = command.get_program().to_owned();
    let output = command.output().unwrap_or_else(|error| {
        panic!("{program:?}: {error}: the tests of the C library need it, as Rust needs a linker")
    });
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
    output
}

/// The folder that has both libraries. An integration test has no library of these types built for
/// it, so they are built here.
fn libraries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").expect("cargo runs this test");
        let built = run(Command::new(cargo)
            .args([
                "build",
                "--locked",
                "--offline",
                "--lib",
                "--message-format=json",
            ])
            .args(["--package", "vhost-user-timer-capi"])
            // A relative CARGO_TARGET_DIR was relative to the workspace.
            .current_dir(here().ancestors().nth(2).expect("the workspace")));
        let messages = String::from_utf8(built.stdout).expect("UTF-8");
        let messages = messages
            .lines()
            .map(|line| -> Value { serde_json::from_str(line).expect("JSON") });
        let files: Vec<_> = messages
            .flat_map(|message| message["filenames"].as_array().cloned().unwrap_or_default())
            .filter_map(|name| name.as_str().map(PathBuf::from))
            .collect();
        let folder = |name| {
            let file = files.iter().find(|file| file.ends_with(name));
            let file = file.unwrap_or_else(|| panic!("{name} is not among {files:?}"));
            file.parent().expect("a folder").to_owned()
        };
        assert_eq!(folder(SHARED), folder(STATIC));
        folder(SHARED)
    })
}

/// A value of the template of the pkg-config file.
fn pkg_config(name: &str) -> Vec<String> {
    let template = fs::read_to_string(here().join("vhost-user-timer.pc.in")).expect("the template");
    let line = template.lines().find_map(|line| line.strip_prefix(name));
    let words = line.expect(name).split_whitespace();
    words.map(str::to_owned).collect()
}

/// Compiles the program with these options behind its sources.
fn compile(folder: &Path, options: impl IntoIterator<Item = OsString>) -> PathBuf {
    let program = folder.join("program");
    let sources = here().join("tests/c");
    let sources = fs::read_dir(sources)
        .expect("tests/c")
        .map(|entry| entry.expect("a file").path());
    let sources = sources.filter(|path| path.extension().is_some_and(|extension| extension == "c"));
    run(Command::new("cc")
        .args(["-std=c11", "-D_GNU_SOURCE", "-g", "-pthread"])
        .args(STRICT)
        .arg("-I")
        .arg(here().join("include"))
        .args(sources)
        .args(options)
        .arg("-o")
        .arg(&program));
    program
}

/// Compiles the program with the shared library, as it is once installed.
fn with_the_shared_library(folder: &Path, options: &[&str]) -> PathBuf {
    for name in [SHARED, SONAME] {
        std::os::unix::fs::symlink(libraries().join(SHARED), folder.join(name)).expect(name);
    }
    let mut options: Vec<OsString> = options.iter().map(OsString::from).collect();
    options.push("-L".into());
    options.push(folder.into());
    options.extend(
        pkg_config("Libs: -L${libdir}")
            .into_iter()
            .map(OsString::from),
    );
    compile(folder, options)
}

/// The tests of the program, in its sources.
fn tests() -> usize {
    let sources = fs::read_dir(here().join("tests/c")).expect("tests/c");
    let texts = sources.map(|source| fs::read_to_string(source.expect("a file").path()));
    let counts = texts.map(|text| text.expect("UTF-8").matches("    RUN(").count());
    counts.sum()
}

/// Runs the program, which prints the name of each test that has passed.
fn passes(program: &Path, folder: &Path) {
    let backend = find_program().expect("the backend");
    let output = run(Command::new(program)
        .arg(backend)
        .arg(folder)
        .env("LD_LIBRARY_PATH", folder)
        .env("ASAN_OPTIONS", "detect_leaks=1"));
    let passed = String::from_utf8_lossy(&output.stdout);
    print!("{passed}");
    assert_eq!(passed.lines().count(), tests(), "{passed}");
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

#[test]
fn a_program_in_c_lives_with_the_shared_library() {
    let folder = folder();
    let program = with_the_shared_library(folder.path(), &[]);
    let needed = run(Command::new("readelf").arg("-d").arg(&program));
    let needed = String::from_utf8_lossy(&needed.stdout);
    assert!(needed.contains(&format!("[{SONAME}]")), "{needed}");
    passes(&program, folder.path());
}

#[test]
fn a_program_in_c_lives_with_the_static_library() {
    let folder = folder();
    let mut options = vec![libraries().join(STATIC).into_os_string()];
    let private = pkg_config("Libs.private:");
    options.extend(private.into_iter().map(OsString::from));
    let program = compile(folder.path(), options);
    passes(&program, folder.path());
}

#[test]
fn the_address_sanitizer_finds_no_error_and_no_leak() {
    let folder = folder();
    let sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let program = with_the_shared_library(folder.path(), &sanitized);
    passes(&program, folder.path());
}

#[test]
fn the_shared_library_exports_its_calls_and_nothing_else() {
    let symbols = run(Command::new("nm")
        .args(["--dynamic", "--defined-only", "--format=just-symbols"])
        .arg(libraries().join(SHARED)));
    let mut exported: Vec<_> = std::str::from_utf8(&symbols.stdout)
        .expect("UTF-8")
        .lines()
        .collect();
    let header = fs::read_to_string(here().join("include/vhost_user_timer.h")).expect("the header");
    let code = header
        .split("*/")
        .filter_map(|part| part.split("/*").next());
    let mut declared: Vec<_> = code
        .flat_map(|part| part.match_indices('(').map(move |(at, _)| &part[..at]))
        .filter_map(|before| before.rsplit([' ', '*', '(']).next())
        .filter(|name| name.starts_with("vut_") && !name.ends_with(')'))
        .collect();
    exported.sort_unstable();
    declared.sort_unstable();
    assert!(declared.len() > 30, "{declared:?}");
    assert_eq!(exported, declared);
}

#[test]
fn the_header_is_one_of_cpp_as_well() {
    let folder = folder();
    let source = folder.path().join("program.cpp");
    let text = "#include \"vhost_user_timer.h\"\n\
                int main() { struct vut_info info; return vut_info(nullptr, &info, 0); }\n";
    fs::write(&source, text).expect("a source");
    run(Command::new("c++")
        .args(["-std=c++11", "-fsyntax-only"])
        .args(STRICT)
        .arg("-I")
        .arg(here().join("include"))
        .arg(&source));
}

#[test]
fn the_example_in_the_readme_compiles() {
    let folder = folder();
    let page = fs::read_to_string(here().join("README.md")).expect("README.md");
    let example = page
        .split("```c\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next());
    let source = folder.path().join("example.c");
    fs::write(&source, example.expect("an example")).expect("a source");
    run(Command::new("cc")
        .args(["-std=c11", "-c"])
        .args(STRICT)
        .arg("-I")
        .arg(here().join("include"))
        .arg(&source)
        .arg("-o")
        .arg(folder.path().join("example.o")));
}
