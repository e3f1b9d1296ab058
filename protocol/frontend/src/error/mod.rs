//! What can go wrong, said so that a VMM's log tells what was tried and on what.

mod fault;
mod kinds;
mod refusal;

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

use vhost_user_timer_protocol::{Op, Status, VERSION};

pub use fault::{ContentFault, Fault, RingFault};
pub use kinds::{
    ControlError, DeviceStateError, Feature, InvalidArgument, OtherCounter, StateLoss, VmShape,
};
pub use refusal::Refusal;

use crate::{ApplyFailure, RestoreFailure, SavedVmError};

/// Why a call to the frontend library failed.
///
/// Some errors end the queue that they came from; [`ends_queue`](Error::ends_queue) tells. The VM
/// in the backend is untouched by that. After the others the queue goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The backend's socket could not be connected to.
    #[error("cannot connect to the backend at {}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The backend program could not be started.
    #[error("cannot start the backend program {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The backend program ended before it served this frontend. It writes to stderr why: of this
    /// process, unless [`SpawnOptions::prepare`](crate::SpawnOptions::prepare) sets another.
    #[error(
        "the backend program {} ended before it served, with {status}: its stderr says why",
        program.display()
    )]
    BackendEnded {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
    },
    /// A system call of this process failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A vhost-user message failed, or the backend refused it.
    #[error("the vhost-user message {message} failed")]
    Control {
        /// The message's name.
        message: &'static str,
        /// Why.
        source: ControlError,
    },
    /// The backend does not offer what is needed.
    #[error("the backend does not offer {0}")]
    MissingFeature(Feature),
    /// The device's config space has a value that this version does not know.
    #[error("the backend's config space has {0}")]
    Config(ContentFault),
    /// The backend speaks another version of the timer protocol.
    #[error("the backend speaks version {0} of the timer protocol, this library {VERSION}")]
    Version(u32),
    /// An option or argument is out of its range.
    #[error(transparent)]
    InvalidArgument(#[from] InvalidArgument),
    /// What is to be a saved VM is none.
    #[error(transparent)]
    SavedVm(#[from] SavedVmError),
    /// No slot of the queue is free (or not the one large buffer, for GET_VM and SET_VM).
    #[error("request queue {queue} is full")]
    QueueFull {
        /// The virtqueue's index.
        queue: u16,
    },
    /// The deadline passed.
    #[error("the backend did not answer {what} in time")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
    },
    /// A [`ShutdownHandle`](crate::ShutdownHandle) was used, or the frontend was closed.
    #[error("the frontend was shut down")]
    ShutDown,
    /// The backend is gone. With [`Reconnect`](crate::Reconnect): and has not come back within
    /// its patience.
    #[error("the backend closed the connection; its log says why")]
    Disconnected,
    /// The backend that came back does not have the VM: it is a new process without the state
    /// file of the previous one.
    #[error("the backend came back without the VM's state: {0}")]
    StateLost(StateLoss),
    /// The connection was lost before the request was answered. The request was sent again and
    /// refused, perhaps because it had been carried out the first time. GET_INFO and GET_REGS
    /// tell the VM's state.
    #[error(
        "it is not known whether a request was carried out before the connection was lost; \
         sent again: {0}"
    )]
    Uncertain(Refusal),
    /// The device state was not transferred.
    #[error("the device state was not {0}")]
    DeviceState(DeviceStateError),
    /// A vCPU failed before all had their registers back, so the restore was aborted.
    #[error(transparent)]
    Restore(#[from] RestoreFailure),
    /// A vCPU's part of a restore was dropped, as by a thread that panics, before the vCPU had its
    /// registers back.
    #[error("its part of the restore was dropped before its registers were back")]
    Abandoned,
    /// The offsets were not applied to the hypervisor. Nobody runs, and the VM stays ARMED:
    /// apply again, or give up.
    #[error(transparent)]
    Apply(#[from] ApplyFailure),
    /// The operation would end the ARMED whose offsets another thread applies just now. Submit it
    /// again later, or use a call that waits.
    #[error(
        "{op} was not submitted: another thread applies the VM's offsets; \
         submit it again, or use a call that waits"
    )]
    Applying {
        /// The operation.
        op: Op,
    },
    /// The backend's host counter is not what the hypervisor counts by
    /// ([`Options::host_counter`](crate::Options::host_counter)).
    #[error(transparent)]
    HostCounter(#[from] OtherCounter),
    /// The backend refused a request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The backend broke the rules of virtio or of the timer protocol. All that was in flight
    /// on that queue fails with this.
    #[error("the backend broke the protocol on queue {queue}: {fault}")]
    Protocol {
        /// The virtqueue's index.
        queue: u16,
        /// What it did.
        fault: Fault,
    },
}

impl Error {
    /// The refusal, if that is what this is.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Error::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// The status of the backend's answer, if it refused the request.
    pub fn status(&self) -> Option<Status> {
        self.refusal().map(|refusal| refusal.status)
    }

    /// Whether the queue, ticket or event stream that returned this is of no more use: every
    /// request in flight and every later one fails with the same.
    ///
    /// True of [`Disconnected`](Self::Disconnected), [`ShutDown`](Self::ShutDown),
    /// [`StateLost`](Self::StateLost), [`Version`](Self::Version),
    /// [`HostCounter`](Self::HostCounter), [`Protocol`](Self::Protocol), and of
    /// [`MissingFeature`](Self::MissingFeature) where a backend that came back offers less than a
    /// queue needs; not where only the call that failed needs the feature.
    pub fn ends_queue(&self) -> bool {
        match self {
            Error::Disconnected
            | Error::ShutDown
            | Error::StateLost(_)
            | Error::Version(_)
            | Error::HostCounter(_)
            | Error::Protocol { .. } => true,
            Error::MissingFeature(feature) => !feature.is_optional(),
            Error::Connect { .. }
            | Error::Spawn { .. }
            | Error::BackendEnded { .. }
            | Error::Io { .. }
            | Error::Control { .. }
            | Error::Config(_)
            | Error::InvalidArgument(_)
            | Error::SavedVm(_)
            | Error::QueueFull { .. }
            | Error::TimedOut { .. }
            | Error::Uncertain(_)
            | Error::Restore(_)
            | Error::Abandoned
            | Error::Apply(_)
            | Error::Applying { .. }
            | Error::DeviceState(_)
            | Error::Refused(_) => false,
        }
    }
}

/// What ends a queue: an [`Error`] that everyone waiting on it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    Disconnected,
    ShutDown,
    StateLost(StateLoss),
    MissingFeature(Feature),
    Version(u32),
    HostCounter(OtherCounter),
    Protocol { queue: u16, fault: Fault },
}

impl Failure {
    /// The failure of an attempt to reconnect after which another attempt is pointless.
    pub(crate) fn for_good(error: &Error) -> Option<Self> {
        match *error {
            Error::ShutDown => Some(Failure::ShutDown),
            Error::StateLost(loss) => Some(Failure::StateLost(loss)),
            Error::MissingFeature(feature) => Some(Failure::MissingFeature(feature)),
            Error::Version(version) => Some(Failure::Version(version)),
            Error::HostCounter(other) => Some(Failure::HostCounter(other)),
            _ => None,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Disconnected => Error::Disconnected,
            Failure::ShutDown => Error::ShutDown,
            Failure::StateLost(loss) => Error::StateLost(loss),
            Failure::MissingFeature(feature) => Error::MissingFeature(feature),
            Failure::Version(version) => Error::Version(version),
            Failure::HostCounter(other) => Error::HostCounter(other),
            Failure::Protocol { queue, fault } => Error::Protocol { queue, fault },
        }
    }
}

/// An error and its sources, joined as programs print them.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += ": ";
        text += &cause.to_string();
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
