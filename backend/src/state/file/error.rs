//! Why a state file cannot be used.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use vhost_user_timer_counter::{CounterId, Source, SourceError};

use crate::state::file::header::{FIRST_VERSION, NEWEST_VERSION};
use crate::sys::folder_of;

/// A counter as an error names it.
fn named(counter: &CounterId) -> String {
    let CounterId { source, frequency } = counter;
    match Source::from_code(*source) {
        Some(source) => format!("--counter-source {source} at {frequency} Hz"),
        None => format!("a host counter of code {source}"),
    }
}

/// Ticks as seconds, to the microsecond.
fn seconds(ticks: u64, frequency: u64) -> String {
    let micros = u128::from(ticks) * 1_000_000 / u128::from(frequency.max(1));
    format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
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
    /// There is no folder for it.
    #[error(
        "the state file {}: there is no folder {}; make the folder, or name another file",
        .0.display(),
        folder_of(.0).display()
    )]
    NoFolder(PathBuf),
    /// The path is a link, behind which another process could put another file.
    #[error("the state file {} is a symbolic link; name the file itself", .0.display())]
    Link(PathBuf),
    /// It is something else, and not to be overwritten.
    #[error("the file {} is not a state file of a vhost-user-timer backend; name another", .0.display())]
    Foreign(PathBuf),
    /// A program of another version wrote it.
    #[error(
        "the state file {} has version {version}, and this backend reads versions {FIRST_VERSION} to \
         {NEWEST_VERSION}; restart the version that wrote it, or delete the file to start over, \
         without the VM's time",
        path.display()
    )]
    OtherVersion {
        /// Which file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Another user owns it, and so can change it at any time.
    #[error(
        "the state file {} belongs to user {owner}, and this backend runs as user {user}; change the \
         file's owner to {user}, or name another file",
        path.display()
    )]
    OtherOwner {
        /// Which file.
        path: PathBuf,
        /// Whose it is, a user id.
        owner: u32,
        /// As which user this process runs, a user id.
        user: u32,
    },
    /// Other users may write it, and so change it at any time.
    #[error(
        "the state file {} has mode {mode:04o}, so its group or others can change it; take that away \
         with chmod go-w, or name another file",
        path.display()
    )]
    Writable {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Its pages may come from another process or host.
    #[error(
        "the state file {} lies on {kind}, whose pages may come from another process or host, so that \
         a change of the VM could wait for them; name a file on tmpfs or a local disk",
        path.display()
    )]
    FarFileSystem {
        /// Which file.
        path: PathBuf,
        /// The file system's type.
        kind: String,
    },
    /// The host counter is less than it was.
    #[error(
        "the state file {} was last changed at host count {wrote}, and the counter now reads {reads}: \
         it went back by {} s, as in another time namespace or on a host that was itself restored; \
         restart where the file was written, or delete the file to start over, without the VM's time",
        path.display(), seconds(wrote.wrapping_sub(*reads), *frequency)
    )]
    WentBack {
        /// Which file.
        path: PathBuf,
        /// The VM's host count at the last change, ticks.
        wrote: u64,
        /// The VM's host count now, ticks.
        reads: u64,
        /// Ticks per second, at least 1.
        frequency: u64,
    },
    /// Its VM has another frequency than the only one that is accepted.
    #[error(
        "the state file {} has a VM with a counter frequency of {vm} Hz, and this backend was started \
         with --counter-frequency {only}; restart with --counter-frequency {vm} or without the \
         option, or delete the file to start over",
        path.display()
    )]
    Frequency {
        /// Which file.
        path: PathBuf,
        /// The VM's, Hz.
        vm: u64,
        /// The only one that is accepted, Hz.
        only: u64,
    },
    /// Its guest's clock does something else at a leap second than the one that was asked for.
    #[error(
        "the state file {} has a guest's clock with --rtc-clock {wrote}, and this backend was started \
         with --rtc-clock {given}; restart with --rtc-clock {wrote} or without the option, or delete \
         the file to start over",
        path.display()
    )]
    OtherClock {
        /// Which file.
        path: PathBuf,
        /// The option's value for the clock in the file.
        wrote: String,
        /// The option's value.
        given: String,
    },
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
