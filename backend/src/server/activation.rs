//! Sockets that a service manager made and passed to this process: `sd_listen_fds(3)`.
//!
//! The variables are untrusted text. They stay in the environment: this process starts no other.

use std::ffi::OsString;
use std::os::fd::RawFd;

/// The first descriptor that is passed. The others follow.
const FIRST: RawFd = 3;

/// How much of a variable an error shows.
const SHOWN: usize = 200;

/// As an error of a passed descriptor names where its number comes from.
pub(crate) const LISTEN_FDS: &str = "LISTEN_FDS, descriptor";

/// The sockets that were passed, by the device that is served on them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// The timer device's.
    pub timer: Option<RawFd>,
    /// The clock device's.
    pub clock: Option<RawFd>,
}

/// Why it is not clear which sockets were passed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ActivationError {
    /// A variable has no number.
    #[error("{variable}={value:?}: not a number; a service manager sets this (sd_listen_fds(3))")]
    NotANumber {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// The number of names is another one than that of sockets.
    #[error(
        "LISTEN_FDS={fds}, and LISTEN_FDNAMES={names:?} names another number of sockets; pass \
         one name for each"
    )]
    Count {
        /// How many sockets there are.
        fds: i32,
        /// The names.
        names: String,
    },
    /// The names do not tell which socket is which device's.
    #[error(
        "LISTEN_FDS={fds} with the names {names:?}: which socket is which device's is not clear; \
         name one \"timer\" and the other \"clock\" (FileDescriptorName= in systemd.socket(5))"
    )]
    Names {
        /// How many sockets there are.
        fds: i32,
        /// The names.
        names: String,
    },
}

impl Passed {
    /// What this process was passed, by its environment. Nothing, where the variables are meant for
    /// another process.
    ///
    /// # Errors
    ///
    /// [`ActivationError`] where the variables contradict each other or are no numbers.
    pub fn from_environment() -> Result<Self, ActivationError> {
        Self::parse(std::process::id(), std::env::var_os)
    }

    fn parse(
        own_pid: u32,
        variable: impl Fn(&'static str) -> Option<OsString>,
    ) -> Result<Self, ActivationError> {
        let text = |name| variable(name).map(|value| value.to_string_lossy().into_owned());
        let number = |name| -> Result<Option<i32>, ActivationError> {
            let Some(value) = text(name) else {
                return Ok(None);
            };
            match value.parse() {
                Ok(number @ 0..) => Ok(Some(number)),
                _ => Err(ActivationError::NotANumber {
                    variable: name,
                    value: shown(&value),
                }),
            }
        };
        let meant_for = number("LISTEN_PID")?;
        if meant_for.and_then(|pid| u32::try_from(pid).ok()) != Some(own_pid) {
            return Ok(Self::default());
        }
        let fds = number("LISTEN_FDS")?.unwrap_or(0);
        let names = text("LISTEN_FDNAMES");
        let contradiction = |names: &str| ActivationError::Names {
            fds,
            names: shown(names),
        };
        let names = names.as_deref();
        let split: Vec<_> = names.map_or_else(Vec::new, |names| names.split(':').take(3).collect());
        if let Some(names) = names
            && (1..=2).contains(&fds)
            && usize::try_from(fds) != Ok(split.len())
        {
            let names = shown(names);
            return Err(ActivationError::Count { fds, names });
        }
        match (fds, split.as_slice()) {
            (0, _) => Ok(Self::default()),
            (1, ["clock"]) => Ok(Passed {
                timer: None,
                clock: Some(FIRST),
            }),
            // systemd's own name for a socket without one is its unit's.
            (1, _) => Ok(Passed {
                timer: Some(FIRST),
                clock: None,
            }),
            (2, ["timer", "clock"]) => Ok(Passed {
                timer: Some(FIRST),
                clock: Some(FIRST + 1),
            }),
            (2, ["clock", "timer"]) => Ok(Passed {
                timer: Some(FIRST + 1),
                clock: Some(FIRST),
            }),
            _ => Err(contradiction(names.unwrap_or_default())),
        }
    }
}

/// Why sockets that the environment names are not this process's, where it names any: a launcher
/// that forks, or starts the program by a shell, passes the number of another process.
pub fn passed_to_another() -> Option<String> {
    let text = |name| std::env::var_os(name).map(|value| shown(&value.to_string_lossy()));
    meant_for_another(std::process::id(), text)
}

fn meant_for_another(
    own_pid: u32,
    variable: impl Fn(&'static str) -> Option<String>,
) -> Option<String> {
    let fds = variable("LISTEN_FDS")?;
    let meant_for = match variable("LISTEN_PID") {
        None => "LISTEN_PID is not set".to_owned(),
        Some(pid) if pid == own_pid.to_string() => return None,
        Some(pid) => format!("LISTEN_PID={pid}"),
    };
    Some(format!(
        "LISTEN_FDS={fds} is ignored: this process is {own_pid}, and {meant_for}"
    ))
}

/// The beginning of a text that may be long.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_for_another_process_are_known_by_its_number() {
        let why = |fds: Option<&str>, pid: Option<&str>| {
            meant_for_another(4711, |name| match name {
                "LISTEN_FDS" => fds.map(str::to_owned),
                _ => pid.map(str::to_owned),
            })
        };
        assert_eq!(why(None, Some("1")), None);
        assert_eq!(why(Some("1"), Some("4711")), None);
        assert_eq!(
            why(Some("2"), None).unwrap(),
            "LISTEN_FDS=2 is ignored: this process is 4711, and LISTEN_PID is not set"
        );
        assert_eq!(
            why(Some("1"), Some("1")).unwrap(),
            "LISTEN_FDS=1 is ignored: this process is 4711, and LISTEN_PID=1"
        );
    }

    const PID: u32 = 4711;

    /// Parses these variables, beside a `LISTEN_PID` that is this process's.
    fn parse(variables: &[(&str, &str)]) -> Result<Passed, ActivationError> {
        Passed::parse(PID, |name| {
            let given = variables.iter().find(|(given, _)| *given == name);
            let own = (name == "LISTEN_PID").then_some("4711");
            given.map(|(_, value)| *value).or(own).map(OsString::from)
        })
    }

    fn passed(timer: Option<RawFd>, clock: Option<RawFd>) -> Result<Passed, ActivationError> {
        Ok(Passed { timer, clock })
    }

    #[test]
    fn without_the_variables_or_with_another_process_id_nothing_is_passed() {
        assert_eq!(Passed::parse(PID, |_| None), Ok(Passed::default()));
        assert_eq!(parse(&[]), Ok(Passed::default()));
        for pid in ["4712", "0", "1"] {
            let passed = parse(&[("LISTEN_PID", pid), ("LISTEN_FDS", "1")]);
            assert_eq!(passed, Ok(Passed::default()), "{pid}");
        }
        assert_eq!(parse(&[("LISTEN_FDS", "0")]), Ok(Passed::default()));
        let no_pid = Passed::parse(PID, |name| (name == "LISTEN_FDS").then(|| "1".into()));
        assert_eq!(no_pid, Ok(Passed::default()));
    }

    #[test]
    fn one_socket_is_the_timers_unless_it_is_named_clock() {
        assert_eq!(parse(&[("LISTEN_FDS", "1")]), passed(Some(3), None));
        for (name, timer, clock) in [
            ("timer", Some(3), None),
            ("vhost-user-timer@vm1.socket", Some(3), None),
            ("", Some(3), None),
            ("clock", None, Some(3)),
        ] {
            let variables = [("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", name)];
            assert_eq!(parse(&variables), passed(timer, clock), "{name}");
        }
    }

    #[test]
    fn two_sockets_are_told_apart_by_their_names_in_either_order() {
        for (names, timer, clock) in [("timer:clock", 3, 4), ("clock:timer", 4, 3)] {
            let variables = [("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", names)];
            assert_eq!(parse(&variables), passed(Some(timer), Some(clock)));
        }
    }

    #[test]
    fn names_that_do_not_say_which_is_which_are_an_error_that_lists_them() {
        for (fds, names) in [
            ("2", "timer:timer"),
            ("2", "clock:clock"),
            ("2", "timer:other"),
            ("3", "timer:clock:clock"),
            ("2147483647", "timer"),
        ] {
            let error = parse(&[("LISTEN_FDS", fds), ("LISTEN_FDNAMES", names)]).unwrap_err();
            assert!(matches!(error, ActivationError::Names { .. }), "{error}");
            assert!(error.to_string().contains(names), "{error}");
        }
        let unnamed = parse(&[("LISTEN_FDS", "2")]).unwrap_err();
        assert!(matches!(unnamed, ActivationError::Names { .. }));
    }

    #[test]
    fn a_name_too_many_or_too_few_is_an_error() {
        for (fds, names) in [("1", "timer:clock"), ("2", "timer"), ("2", "a:b:c")] {
            let error = parse(&[("LISTEN_FDS", fds), ("LISTEN_FDNAMES", names)]).unwrap_err();
            assert!(matches!(error, ActivationError::Count { .. }), "{error}");
        }
    }

    #[test]
    fn a_number_that_is_none_is_an_error_that_names_the_variable_and_shows_little_of_it() {
        let long = "9".repeat(10_000);
        for variable in ["LISTEN_PID", "LISTEN_FDS"] {
            for value in ["", "x", "-1", "1 ", "2147483648", &long] {
                let error = parse(&[(variable, value)]).unwrap_err().to_string();
                assert!(error.contains(variable), "{error}");
                assert!(error.len() < 2 * SHOWN, "{error}");
            }
        }
    }
}
