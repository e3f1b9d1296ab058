//! What can go wrong for the mock frontend itself. A promise that the backend breaks is not an
//! error but a result, and is reported as one.

use std::process::ExitStatus;
use std::{fmt, io};

use vhost_user_timer_frontend as frontend;

use vhost_user_timer_kit::race::RaceError;

/// Why the demo could not be played to its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No backend could be started.
    #[error("cannot start a backend")]
    Launch(#[source] io::Error),
    /// A request, or a connection, failed.
    #[error("cannot {what} on the {side}")]
    Vmm {
        /// What was tried.
        what: &'static str,
        /// On which backend.
        side: Side,
        /// Why it failed.
        source: frontend::Error,
    },
    /// A vCPU could not be restored.
    #[error("cannot restore vCPU {vcpu} on the {side}")]
    Restore {
        /// Which vCPU.
        vcpu: u32,
        /// On which backend.
        side: Side,
        /// Why it failed.
        source: RaceError,
    },
    /// A guest's interrupt handler could not program its timer.
    #[error("cannot program a timer of vCPU {vcpu} on the {side}")]
    Guest {
        /// Which vCPU.
        vcpu: u32,
        /// On which backend.
        side: Side,
        /// Why it failed.
        source: frontend::Error,
    },
    /// A backend ended unexpectedly, or with an unexpected status.
    #[error("the {side}'s backend ended with {status}{}", Log(log))]
    BackendEnded {
        /// Which backend.
        side: Side,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to stderr.
        log: String,
    },
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// One of the demo's two backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the VM runs first.
    Source,
    /// Where it is moved to.
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Source => "source",
            Side::Destination => "destination",
        })
    }
}

/// The last line of a backend's log, as the end of a sentence.
struct Log<'a>(&'a str);

impl fmt::Display for Log<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.lines().last() {
            Some(line) => write!(f, "; its last log line: {line}"),
            None => f.write_str("; it logged nothing"),
        }
    }
}

/// An error and each of its causes, in one line.
pub(super) struct Chain<'a>(pub(super) &'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
