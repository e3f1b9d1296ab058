//! The kinds of an [`Error`](super::Error), for callers that act on them.

use std::fmt;
use std::time::Duration;

use vhost_user_timer_protocol::{Abi, CounterSource, MAX_MESSAGE};

use crate::{Info, MAX_REGS, VmOptions};

/// A feature that the backend does not offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Feature {
    /// Virtio 1.0 and later.
    #[error("VIRTIO_F_VERSION_1")]
    VirtioVersion1,
    /// Negotiation of vhost-user's own features.
    #[error("VHOST_USER_F_PROTOCOL_FEATURES")]
    ProtocolFeatures,
    /// More than one queue.
    #[error("VHOST_USER_PROTOCOL_F_MQ")]
    Mq,
    /// A config space; [`Options::reconnect`](crate::Options::reconnect) and
    /// [`Frontend::config`](crate::Frontend::config) need it.
    #[error("VHOST_USER_PROTOCOL_F_CONFIG")]
    Config,
    /// RESET_DEVICE.
    #[error("VHOST_USER_PROTOCOL_F_RESET_DEVICE")]
    ResetDevice,
    /// Saving and loading a device state.
    #[error("VHOST_USER_PROTOCOL_F_DEVICE_STATE")]
    DeviceState,
    /// Request queues: as many as [`Options::request_queues`](crate::Options::request_queues), or
    /// one.
    #[error("{wanted} request queues, but {offered}")]
    RequestQueues {
        /// How many are needed.
        wanted: u16,
        /// How many the backend serves.
        offered: u16,
    },
    /// All that the previous backend on this connection offered.
    #[error("all that the previous backend did")]
    SameAsBefore,
}

impl Feature {
    /// Whether only some calls need the feature, and the queues do not.
    pub(super) fn is_optional(self) -> bool {
        matches!(
            self,
            Feature::Config | Feature::ResetDevice | Feature::DeviceState
        )
    }
}

/// An option or argument that is out of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidArgument {
    /// [`Options::queue_size`](crate::Options::queue_size).
    #[error("queue size {0}: must be a power of two from 4 to 1024")]
    QueueSize(u16),
    /// [`Options::event_buffers`](crate::Options::event_buffers).
    #[error("{0} event buffers: must be a power of two from 2 to 1024")]
    EventBuffers(u16),
    /// [`Options::request_queues`](crate::Options::request_queues).
    #[error("{0} request queues: must be 1 to 16")]
    RequestQueues(u16),
    /// [`Reconnect::delays`](crate::Reconnect::delays).
    #[error(
        "reconnect delays {first:?} and {max:?}: must be from 1 ms to 1 h, the first the shorter"
    )]
    ReconnectDelays {
        /// The first delay.
        first: Duration,
        /// The longest delay.
        max: Duration,
    },
    /// [`Options::reconnect`](crate::Options::reconnect) with a socket that is connected already.
    #[error(
        "cannot reconnect a socket that was connected elsewhere: \
         give the frontend a path, or a function that connects"
    )]
    ReconnectStream,
    /// [`Options::reconnect`](crate::Options::reconnect) with a backend that is spawned without a
    /// state file.
    #[error(
        "cannot reconnect to a backend without a state file, whose VM ends with it: \
         give the backend a state file"
    )]
    ReconnectWithoutState,
    /// A request for more than [`MAX_REGS`] registers.
    #[error("{0} registers in one request: must be at most {MAX_REGS}")]
    Registers(usize),
    /// A request, or its answer, of more than 256 KiB.
    #[error("a message of {0} bytes: must be at most {MAX_MESSAGE}")]
    MessageLength(usize),
    /// [`RestoreOptions::elapsed_since`](crate::RestoreOptions::elapsed_since) with 0: decades
    /// would be added to the guest's counts.
    #[error(
        "time elapsed since 0 ns, that is since 1970: give the CLOCK_REALTIME of the save \
         (SavedVm::realtime_ns), or do not ask for elapsed time"
    )]
    ElapsedSince1970,
    /// A [`Ticket`](crate::Ticket) whose answer was taken already.
    #[error("the ticket's answer was taken already")]
    SpentTicket,
    /// A [`HostClock`](crate::HostClock) that is not what the backend counts by.
    #[error("the backend's host counter is not the clock that was named")]
    HostClock,
    /// [`Restore::apply`](crate::Restore::apply) or
    /// [`Frontend::resume_with`](crate::Frontend::resume_with), for a VM that runs without
    /// confirmation.
    #[error(
        "the VM has no CONFIRM: it runs before offsets can be applied; configure it with \
         VmOptions::confirm"
    )]
    WithoutConfirm,
    /// [`Restore::finish`](crate::Restore::finish), for a VM with CONFIRM.
    #[error("the VM has CONFIRM: it does not run before its offsets are applied; call finish_with")]
    NeedsApply,
    /// A call inside of an `apply` closure that waits for the closure's end.
    #[error("an apply closure may not end the ARMED whose offsets it applies: return an error")]
    InsideApply,
    /// A saved VM, for a backend that is configured for another one.
    #[error("cannot restore a VM of {saved}: the backend has one of {backend}")]
    OtherVm {
        /// The VM that is saved.
        saved: VmShape,
        /// The VM that the backend has.
        backend: VmShape,
    },
}

/// A backend whose host counter is not the one that the caller needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub struct OtherCounter {
    /// What it must count by.
    pub expected: CounterSource,
    /// What it counts by.
    pub found: CounterSource,
    /// Its counter is anchored (SET_COUNTER_ANCHOR).
    pub anchored: bool,
}

impl OtherCounter {
    pub(crate) fn check(expected: CounterSource, info: &Info) -> Result<(), Self> {
        match info.source == expected && !info.anchored {
            true => Ok(()),
            false => Err(OtherCounter {
                expected,
                found: info.source,
                anchored: info.anchored,
            }),
        }
    }
}

impl fmt::Display for OtherCounter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OtherCounter { expected, .. } = self;
        let to_do = format_args!("start it with --counter-source {expected}");
        match self.found {
            _ if self.anchored => write!(
                f,
                "the backend's host counter is anchored (SET_COUNTER_ANCHOR), so its offsets are \
                 not those of {expected}: start over with a VM that is not anchored"
            ),
            CounterSource::NotTold => write!(
                f,
                "the backend does not report what it counts by, so its offsets may not be those of \
                 {expected}: use a backend that does, and {to_do}"
            ),
            found => write!(
                f,
                "the backend counts by {found}, so its offsets are not those of {expected}: {to_do}"
            ),
        }
    }
}

/// What CONFIGURE_VM fixes of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmShape {
    /// How many vCPUs.
    pub vcpus: u32,
    /// The ABI of the registers.
    pub abi: Abi,
    /// Counter frequency, Hz.
    pub frequency: u64,
    /// CONFIRM and ONE_OFFSET: of the saved VM, those that [`RestoreOptions::vm`](
    /// crate::RestoreOptions::vm) asks for.
    pub options: VmOptions,
}

impl fmt::Display for VmShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} vCPUs, {}, {} Hz",
            self.vcpus, self.abi, self.frequency
        )?;
        let VmOptions {
            confirm,
            one_offset,
        } = self.options;
        for (has, name) in [(confirm, "CONFIRM"), (one_offset, "ONE_OFFSET")] {
            if has {
                write!(f, ", {name}")?;
            }
        }
        Ok(())
    }
}

/// How it shows that a backend that came back does not have the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateLoss {
    /// The VM's epoch is earlier than one seen before.
    #[error("its epoch is {found}, after {seen}")]
    EarlierEpoch {
        /// The epoch that the backend has.
        found: u64,
        /// The latest epoch seen.
        seen: u64,
    },
    /// The VM was configured, and is not.
    #[error("its VM is not configured")]
    NotConfigured,
}

/// Why a device state was not transferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceStateError {
    /// The backend refused to save it.
    #[error("saved: the backend refused; its log says why")]
    SaveRefused,
    /// The backend refused to load it; the VM is as it was.
    #[error("loaded: the backend refused; its log says why")]
    LoadRefused,
    /// The backend refused the transfer that
    /// [`check_device_state`](crate::Frontend::check_device_state) waited for.
    #[error("transferred: the backend refused; its log says why")]
    TransferRefused,
    /// What the backend saved is longer than any device state.
    #[error("saved: it is longer than 4 MiB")]
    TooLong,
}

/// How a vhost-user message failed.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct ControlError(vhost::Error);

impl ControlError {
    pub(crate) fn new(error: vhost::Error) -> Self {
        ControlError(error)
    }

    /// Whether the message failed because the peer closed the connection.
    pub(crate) fn is_disconnect(&self) -> bool {
        use vhost::vhost_user::Error::{Disconnected, PartialMessage, SocketBroken};
        matches!(
            self.0,
            vhost::Error::VhostUserProtocol(Disconnected | PartialMessage | SocketBroken(_))
        )
    }

    /// Whether the backend carried the message's request out and failed, rather than the
    /// message.
    pub fn is_refusal(&self) -> bool {
        use vhost::vhost_user::Error::BackendInternalError;
        matches!(
            self.0,
            vhost::Error::VhostUserProtocol(BackendInternalError)
        )
    }
}
