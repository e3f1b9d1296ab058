//! Why a state file cannot be used.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use vhost_user_timer_counter::{CounterId, Source, SourceError};

/// A counter as an error names it.
fn named(counter: &CounterId) -> String {
    let CounterId { source, frequency } = counter;
    match Source::from_code(*source) {
        Some(source) => format!("--counter-source {source} at {frequency} Hz"),
        None => format!("a host counter of code {source}"),
    }
}

/// Why a state file cannot be used. Nothing in the file was changed then, unless the system refused
/// in the midst of making a new one.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The system refuses.
    #[error("{what} the state file {} failed", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it.
    #[error("the state file {} is in use by another backend; each VM needs its own", .0.display())]
    InUse(PathBuf),
    /// Its VM counts by another counter than the one that was asked for.
    #[error(
        "the state file {} was written with {}, and this backend has {}; restart with the original \
         --counter-source, or with --counter-source auto, or delete the file to start over",
        path.display(), named(wrote), named(given)
    )]
    OtherCounter {
        /// Which file.
        path: PathBuf,
        /// By what its VM counts.
        wrote: CounterId,
        /// What was asked for.
        given: CounterId,
    },
    /// Its VM counts by a counter that this host does not have any more.
    #[error(
        "the state file {} was written with --counter-source {counter}, which this host cannot read; \
         delete the file to start over, without the VM's time",
        path.display()
    )]
    NoCounter {
        /// Which file.
        path: PathBuf,
        /// By what its VM counts.
        counter: Source,
        /// Why it cannot be read.
        source: SourceError,
    },
    /// Its VM counts by a source of a later version.
    #[error(
        "the state file {} was written with a host counter that this backend does not know (code \
         {code}); restart the version that wrote it, or delete the file to start over",
        path.display()
    )]
    UnknownCounter {
        /// Which file.
        path: PathBuf,
        /// The source's code.
        code: u32,
    },
    /// It is something else, and not to be overwritten.
    #[error("the file {} is not a state file of a vhost-user-timer backend; name another", .0.display())]
    Foreign(PathBuf),
    /// Its VM is too large.
    #[error(
        "the state file {} has a VM with {vcpus} vCPUs, and this backend takes {max_vcpus}; restart \
         with --max-vcpus {vcpus}, or delete the file to start over",
        path.display()
    )]
    Vcpus {
        /// Which file.
        path: PathBuf,
        /// How many vCPUs its VM has.
        vcpus: u32,
        /// The most that this backend takes.
        max_vcpus: u32,
    },
    /// It is not what a backend leaves behind.
    #[error(
        "the state file {} is damaged ({what}); delete it to start over, without the VM's time",
        path.display()
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

impl StateFileError {
    pub(super) fn io(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| StateFileError::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// The error of a file in which this is wrong.
    pub(super) fn damaged(path: &Path, what: &dyn Display) -> Self {
        StateFileError::Damaged {
            path: path.to_owned(),
            what: what.to_string(),
        }
    }
}
