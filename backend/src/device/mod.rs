//! The devices: what they do with requests, and with time.
//!
//! - [`timer`](TimerDevice): the VMM's way to the VM's time.
//! - [`clock`](ClockDevice): the guest's way to the host's clocks, virtio-rtc.
//!
//! Both implement `vhost_user::Device`, and so know rings of requests, but nothing
//! of the protocol that sets the rings up.

mod clock;
mod timer;

use std::io;

use vhost_user_timer_counter::SourceError;

use crate::state::file::StateFileError;
pub use clock::{ClockConfig, ClockDevice, GuestTime, GuestTimeGuard, UtcKind};
#[cfg(test)]
pub(crate) use timer::persist;
pub use timer::{SourceChoice, TimerConfig, TimerDevice, VmStatus};

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel makes no timerfd.
    #[error("creating a timerfd failed")]
    Alarm(#[source] io::Error),
    /// This host has no such counter.
    #[error("{0}; use --counter-source monotonic")]
    Counter(SourceError),
    /// The state file cannot be used.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
}
