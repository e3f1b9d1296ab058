//! What can go wrong for the mock frontend itself. A promise that the backend breaks is not
//! among it: that is a result, and reported as one.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::{fmt, io};

use vhost_user_timer_frontend as frontend;

use vhost_user_timer_kit::race::RaceError;

/// Why the mock frontend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No backend could be started.
    #[error("Cannot start a backend")]
    Launch(#[source] io::Error),
    /// A backend did not do what the VMM asked of it.
    #[error("Cannot {what} on the {side}")]
    Vmm {
        /// What was tried.
        what: &'static str,
        /// On which backend.
        side: Side,
        /// Why it failed.
        source: frontend::Error,
    },
    /// A vCPU could not be restored.
    #[error("Cannot restore vCPU {vcpu} on the {side}")]
    Restore {
        /// Which vCPU.
        vcpu: u32,
        /// On which backend.
        side: Side,
        /// Why it failed.
        source: RaceError,
    },
    /// A vCPU's guest code could not handle its timer's interrupt.
    #[error("Cannot reprogram a timer of vCPU {vcpu} on the {side}")]
    Guest {
        /// Which vCPU.
        vcpu: u32,
        /// On which backend.
        side: Side,
        /// Why it failed.
        source: frontend::Error,
    },
    /// A backend ended when it should not have, or not as it should have.
    #[error("The {side}'s backend ended with {status}{}", Log(log))]
    BackendEnded {
        /// Which backend.
        side: Side,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to stderr.
        log: String,
    },
    /// The backend took the connection and then said nothing.
    #[error(
        "The backend at {} does not answer. It serves one frontend at a time: is another one, \
         a VMM, connected to it?",
        .0.display()
    )]
    Busy(PathBuf),
    /// A running backend could not be asked.
    #[error("Cannot {what}")]
    Inspect {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: frontend::Error,
    },
    /// The backend's VM has no vCPUs to show yet.
    #[error("The VM is not configured yet (phase NEW): there is nothing to dump")]
    NotConfigured,
    /// A thread could not be started.
    #[error("Cannot start a thread")]
    Thread(#[source] io::Error),
}

/// One of the two backends of the demonstration.
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

/// A backend's log as the end of a sentence.
struct Log<'a>(&'a str);

impl fmt::Display for Log<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.lines().last() {
            Some(line) => write!(f, "; the last that it wrote is: {line}"),
            None => f.write_str("; it wrote nothing"),
        }
    }
}

/// An error with everything that led to it, in one line.
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
