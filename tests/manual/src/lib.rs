//! The manual pages and the shells' completions of the programs that users get.
//!
//! Options, their descriptions and the exit codes come from the programs' own definitions, as
//! `--help` does. What a page has beyond them is in its template, `src/*.1.in`.

mod page;

use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory as _};
use clap_complete::Shell;

/// One program, as its page and completions are made.
struct Program {
    command: Command,
    template: &'static str,
}

fn programs() -> [Program; 2] {
    [
        Program {
            command: vhost_user_timer::args::Args::command(),
            template: include_str!("vhost-user-timer.1.in"),
        },
        Program {
            command: vhost_user_timer_ctl::args::Args::command(),
            template: include_str!("vhost-user-timer-ctl.1.in"),
        },
    ]
}

/// Where a shell looks for a program's completions, in the folder of this repository.
fn completions_path(shell: Shell, program: &str) -> PathBuf {
    let folder = Path::new("contrib/completions");
    match shell {
        Shell::Zsh => folder.join("zsh").join(format!("_{program}")),
        Shell::Fish => folder.join("fish").join(format!("{program}.fish")),
        _ => folder.join("bash").join(program),
    }
}

/// Every generated file: its path in the repository, and its content.
///
/// # Panics
///
/// If a program's definition has no list of exit codes.
pub fn files() -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    for Program { command, template } in programs() {
        let name = command.get_name().to_owned();
        let page = Path::new("contrib/man").join(format!("{name}.1"));
        files.push((page, page::render(&command, template)));
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command.clone(), &name, &mut script);
            let script = String::from_utf8_lossy(&script).into_owned();
            files.push((completions_path(shell, &name), script));
        }
    }
    files
}

/// The repository's root. Cargo says at run time where this crate is.
///
/// # Panics
///
/// Where cargo does not run this.
pub fn root() -> PathBuf {
    let this = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this");
    let root = Path::new(&this).ancestors().nth(2);
    root.expect("tests/manual is two below").to_owned()
}
