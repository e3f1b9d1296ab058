//! What can go wrong, said so that a VMM's log tells what was tried and on what.

use std::io;
use std::path::PathBuf;

use vhost_user_timer_protocol::{Abi, Op, Phase, Register, Status, VERSION};

/// Why a call to the frontend library failed.
///
/// After [`Disconnected`](Error::Disconnected), [`ShutDown`](Error::ShutDown),
/// [`StateLost`](Error::StateLost) and [`Protocol`](Error::Protocol) the queue is of no more use;
/// the VM in the backend is untouched by that. After the others it goes on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The backend's socket could not be connected to.
    #[error("Cannot connect to the backend at {}", path.display())]
    Connect {
        /// Where the backend was looked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A system call of this process failed.
    #[error("Cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A vhost-user message failed, or the backend refused it.
    #[error("The vhost-user message {message} failed")]
    Control {
        /// The message's name.
        message: &'static str,
        /// Why.
        source: vhost::Error,
    },
    /// The backend does not offer what this library cannot do without.
    #[error("The backend does not offer {0}")]
    MissingFeature(&'static str),
    /// The device's config space makes no sense.
    #[error("The backend's config space has {what}")]
    Config {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The backend speaks another version of the timer protocol.
    #[error("The backend speaks version {0} of the timer protocol, this library {VERSION}")]
    Version(u32),
    /// An option or argument is out of its range.
    #[error("{0}")]
    InvalidArgument(&'static str),
    /// No slot of the queue is free (or not the one large buffer, for GET_VM and SET_VM).
    #[error("Request queue {queue} is full")]
    QueueFull {
        /// The virtqueue's index.
        queue: u16,
    },
    /// The deadline passed.
    #[error("The backend did not answer {what} in time")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
    },
    /// A [`ShutdownHandle`](super::ShutdownHandle) was used, or the frontend was closed.
    #[error("The frontend was shut down")]
    ShutDown,
    /// The backend is gone, and has not come back within the patience of
    /// [`Reconnect`](super::Reconnect), if there was any.
    #[error("The backend closed the connection")]
    Disconnected,
    /// The backend that came back does not have the VM. It is a new process without the former
    /// one's state file.
    #[error("The backend came back without the VM's state: {0}")]
    StateLost(&'static str),
    /// The connection was lost before the request was answered. It was asked again and then
    /// refused, which may be because it had been done the first time. GET_INFO and GET_REGS
    /// tell how things are.
    #[error(
        "It is not known whether a request was done before the connection was lost; its repetition: {0}"
    )]
    Uncertain(Refusal),
    /// The device state was not transferred.
    #[error("The device state was not {0}")]
    DeviceState(&'static str),
    /// The backend refused a request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The backend broke the rules of virtio or of the timer protocol. All that was in flight
    /// on that queue fails with this.
    #[error("The backend broke the protocol on queue {queue}: {fault}")]
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
}

/// A request that the backend refused. It has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The operation.
    pub op: Op,
    /// The vCPU it was about; `None` for a VM-wide operation.
    pub vcpu: Option<u32>,
    /// Why.
    pub status: Status,
    /// More about it; the meaning depends on the status.
    pub detail: u32,
    /// The VM's epoch at that time.
    pub epoch: u64,
    /// For GET_REGS and SET_REGS with [`Status::UnknownRegister`] or [`Status::Invalid`]: the
    /// KVM id of the register that was refused.
    pub register: Option<u64>,
}

impl Refusal {
    /// For [`Status::Incomplete`]: the registers that the vCPU still lacks.
    pub fn missing_registers(&self) -> impl Iterator<Item = Register> + use<> {
        let detail = match self.status {
            Status::Incomplete => self.detail,
            _ => 0,
        };
        Register::ALL
            .into_iter()
            .filter(move |register| detail & register.present_bit() != 0)
    }
}

/// The register of an id in either ABI: a refused id may well be the wrong one's.
fn register_of(id: u64) -> Option<Register> {
    [Abi::Arm64, Abi::Arm]
        .into_iter()
        .find_map(|abi| Register::from_id(id, abi).ok())
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.op)?;
        if let Some(vcpu) = self.vcpu {
            write!(f, " of vCPU {vcpu}")?;
        }
        write!(f, " was refused: {}", self.status)?;
        let detail = self.detail;
        match self.status {
            Status::UnknownRegister | Status::Invalid => match self.register {
                Some(id) => {
                    write!(f, ", entry {detail}: ")?;
                    match register_of(id) {
                        Some(register) => write!(f, "{register}"),
                        None => write!(f, "register {id:#018x}"),
                    }
                }
                None if detail != 0 => write!(f, ", entry {detail}"),
                None => Ok(()),
            },
            Status::Incomplete => {
                for (n, register) in self.missing_registers().enumerate() {
                    write!(f, "{}{register}", if n == 0 { ": " } else { ", " })?;
                }
                Ok(())
            }
            Status::Busy => match Phase::from_code(detail) {
                Some(Phase::New) => write!(f, ": {}", Phase::New),
                // The wire gives the phase and a restore's missing vCPUs in one number.
                Some(phase @ (Phase::Paused | Phase::Running)) => {
                    write!(f, ": {phase}, or RESTORING with {detail} vCPUs missing")
                }
                _ => write!(f, ": RESTORING, {detail} vCPUs missing"),
            },
            Status::TooBig => write!(f, ": {detail} bytes needed"),
            Status::TimedOut => write!(f, ": {detail} vCPUs missing (missing_vcpus tells which)"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}

/// What a backend did that it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// On the ring itself.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// An answer has a length that its operation's does not have.
    #[error("{len} bytes are no answer to {op}")]
    AnswerLength {
        /// The operation.
        op: Op,
        /// The answer's length, header included.
        len: usize,
    },
    /// An answer's content makes no sense.
    #[error("the answer to {op} has {what}")]
    AnswerContent {
        /// The operation.
        op: Op,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An event of a length that no event has.
    #[error("{len} bytes are no event")]
    EventLength {
        /// Its length.
        len: u32,
    },
}

/// What a device did on a ring that it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// It used more chains than it had.
    #[error("used.idx says {used} chains where {in_flight} are in flight")]
    UsedIndex {
        /// By used.idx.
        used: u16,
        /// What it had.
        in_flight: u16,
    },
    /// It used a chain that is not in flight.
    #[error("used descriptor {id} is not in flight")]
    UsedId {
        /// The used entry's id.
        id: u32,
    },
    /// It says that it wrote more than there is room for.
    #[error("used descriptor {id} with {len} bytes written has room for {writable}")]
    UsedLen {
        /// The used entry's id.
        id: u32,
        /// The used entry's length.
        len: u32,
        /// How many bytes of it are writable.
        writable: u32,
    },
}

/// What ends a queue: an [`Error`] that everyone waiting on it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    Disconnected,
    ShutDown,
    StateLost(&'static str),
    MissingFeature(&'static str),
    Version(u32),
    Protocol { queue: u16, fault: Fault },
}

impl Failure {
    /// What of an attempt to reconnect rules out that another one goes better.
    pub(super) fn for_good(error: &Error) -> Option<Self> {
        match *error {
            Error::ShutDown => Some(Failure::ShutDown),
            Error::StateLost(what) => Some(Failure::StateLost(what)),
            Error::MissingFeature(what) => Some(Failure::MissingFeature(what)),
            Error::Version(version) => Some(Failure::Version(version)),
            _ => None,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Disconnected => Error::Disconnected,
            Failure::ShutDown => Error::ShutDown,
            Failure::StateLost(what) => Error::StateLost(what),
            Failure::MissingFeature(what) => Error::MissingFeature(what),
            Failure::Version(version) => Error::Version(version),
            Failure::Protocol { queue, fault } => Error::Protocol { queue, fault },
        }
    }
}
