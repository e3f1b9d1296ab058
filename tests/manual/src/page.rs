//! One manual page: a template whose lines `@description@`, `@options@` and `@exit-status@`, and
//! whose word `@version@`, stand for what the program's own definition says.

use std::io::{self, Write};

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

const HEAD: &str =
    ".\\\" Made by `make manual` from the program's definition and a template: edit those.\n";

/// The page of a program.
pub(crate) fn render(command: &Command, template: &str) -> String {
    let version = command.get_version().unwrap_or_default();
    let man = Man::new(with_all_options(command));
    let mut page = HEAD.to_owned();
    for line in template.lines() {
        let section = match line {
            "@description@" => section(|out| man.render_description_section(out)),
            "@options@" => section(|out| man.render_options_section(out)),
            "@exit-status@" => exit_status(command),
            _ => line.replace("@version@", version) + "\n",
        };
        page.push_str(&section);
    }
    page
}

fn section(render: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> String {
    let mut bytes = Vec::new();
    render(&mut bytes).expect("a vector takes every byte");
    String::from_utf8(bytes).expect("a page is text")
}

/// The command with the options of its subcommands as its own, each once: they have one page.
fn with_all_options(command: &Command) -> Command {
    let mut all = command.clone();
    for subcommand in command.get_subcommands() {
        for option in subcommand.get_arguments() {
            if all
                .get_arguments()
                .all(|have| have.get_id() != option.get_id())
            {
                all = all.arg(option);
            }
        }
    }
    all
}

/// The section made from the list at the end of `--help`, whose lines are a code and its meaning.
fn exit_status(command: &Command) -> String {
    let help = command.get_after_help().expect("a list of exit codes");
    let help = help.to_string();
    let mut lines = help.lines();
    assert_eq!(lines.next(), Some("Exit status:"));
    let mut roff = Roff::new();
    roff.control("SH", ["EXIT STATUS"]);
    for line in lines {
        let (code, meaning) = line
            .trim()
            .split_once("  ")
            .expect("a code and its meaning");
        roff.control("TP", []);
        roff.text([bold(code)]);
        roff.text([roman(meaning)]);
    }
    section(|out| roff.to_writer(out))
}
