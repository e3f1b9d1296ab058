//! What can go wrong with a guest.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a guest did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no environment to run it in.
    #[error("There is no QEMU environment in {}: {reason}", cache.display())]
    NoEnvironment {
        /// Where it would be.
        cache: PathBuf,
        /// Why it is not there, or what makes it.
        reason: String,
    },
    /// The system refused something.
    #[error("Cannot {what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Something took too long.
    #[error("No {what} within {limit:?}")]
    Late {
        /// What was waited for.
        what: String,
        /// For how long.
        limit: Duration,
    },
    /// QEMU closed a channel: it has ended, or is about to.
    #[error("QEMU closed its channel while {what} was waited for")]
    Closed {
        /// What was waited for.
        what: String,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {class}: {description}")]
    Refused {
        /// The QMP command.
        command: String,
        /// The class of the error.
        class: String,
        /// QEMU's description.
        description: String,
    },
    /// A command in the guest failed.
    #[error("`{command}` ended with status {status} in the guest: {text}")]
    Failed {
        /// The command.
        command: String,
        /// Its exit status.
        status: u8,
        /// What it printed.
        text: String,
    },
    /// An answer is not what it must be.
    #[error("Not {what}: {text:?}")]
    Malformed {
        /// What it must be.
        what: &'static str,
        /// What it is.
        text: String,
    },
    /// A guest did not migrate. It is still in the QEMU where it was.
    #[error("The guest did not migrate: {reason}\n--- the destination's QEMU\n{log}")]
    Migration {
        /// What the two QEMUs say.
        reason: String,
        /// What the destination's QEMU wrote to stderr.
        log: String,
    },
    /// The guest did not come up.
    #[error("The guest did not come up: {source}\n{log}")]
    Boot {
        /// Why.
        source: Box<Error>,
        /// The end of the kernel's log and of QEMU's output.
        log: String,
    },
}

impl Error {
    /// For [`io::Error`]s: what was tried.
    pub(super) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Error::System { what, source }
    }
}
