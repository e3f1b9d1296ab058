//! What can go wrong.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use vhost_user_timer_frontend as frontend;

/// Why the backend's VM could not be shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The backend accepted the connection, or has it in its backlog, and does not answer.
    #[error(
        "the backend at {} does not answer; it serves one frontend at a time, so check whether \
         a VMM is connected to it, and whether this is the socket of its timer device",
        .0.display()
    )]
    Busy(PathBuf),
    /// The backend could not be reached.
    #[error(transparent)]
    Unreachable(frontend::Error),
    /// The backend could not be asked.
    #[error("cannot {what}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: frontend::Error,
    },
    /// What was found out cannot be printed.
    #[error("printing to stdout failed")]
    Print(#[source] io::Error),
    /// The backend's VM has no vCPUs yet.
    #[error("the VM is not configured yet (phase NEW), so there is nothing to dump")]
    NotConfigured,
}

impl Error {
    pub(crate) fn failed_to(what: &'static str) -> impl Fn(frontend::Error) -> Self {
        move |source| Error::Failed { what, source }
    }

    /// The error and each of its causes, in one line.
    pub(crate) fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text += &format!(": {error}");
            cause = error.source();
        }
        text
    }
}
