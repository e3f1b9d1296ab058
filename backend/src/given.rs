//! The options that a command line gives, for the log's first line.
//!
//! They come from clap's own account of what it parsed, so an option that is added is in the log
//! without further ado.

use std::ffi::OsStr;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command};

/// The options that were given and differ from their defaults, in the order of `--help`.
pub(crate) fn given(command: &Command, matches: &ArgMatches) -> String {
    let mut given = Vec::new();
    for option in command.get_arguments() {
        let id = option.get_id().as_str();
        if matches.value_source(id) != Some(ValueSource::CommandLine) {
            continue;
        }
        let Some(name) = option.get_long() else {
            continue;
        };
        if !option.get_action().takes_values() {
            given.push(format!("--{name}"));
            continue;
        }
        let values: Vec<_> = matches.get_raw(id).into_iter().flatten().collect();
        if !is_default(option, &values) {
            given.extend(
                values
                    .iter()
                    .map(|value| format!("--{name}={}", quoted(value))),
            );
        }
    }
    given.join(" ")
}

fn is_default(option: &Arg, values: &[&OsStr]) -> bool {
    let default = option.get_default_values().iter();
    !values.is_empty()
        && default
            .map(|value| value.as_os_str())
            .eq(values.iter().copied())
}

/// A value that is one word, whatever is in it.
fn quoted(value: &OsStr) -> String {
    let text = value.to_string_lossy();
    let plain = |letter: char| !letter.is_whitespace() && !letter.is_control() && letter != '"';
    match !text.is_empty() && text.chars().all(plain) {
        true => text.into_owned(),
        false => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::args::Args;

    fn of(args: &[&str]) -> String {
        let command = Args::command();
        let all = [&["vhost-user-timer"], args].concat();
        let matches = command.clone().try_get_matches_from(all).unwrap();
        given(&command, &matches)
    }

    #[test]
    fn only_options_that_differ_from_their_defaults_are_given() {
        assert_eq!(of(&["--fd=3"]), "--fd=3");
        let all = [
            "--max-vcpus=8",
            "--log-level=info",
            "--fd",
            "3",
            "--poll-max-us=200",
        ];
        assert_eq!(of(&all), "--fd=3 --max-vcpus=8");
    }

    #[test]
    fn a_value_is_one_word_of_one_line() {
        let path = "--socket-path=/a b\n\"c";
        assert_eq!(of(&[path]), r#"--socket-path="/a b\n\"c""#);
        assert_eq!(
            of(&["--fd=3", "--name=vm-\u{fc}"]),
            "--fd=3 --name=vm-\u{fc}"
        );
    }
}
