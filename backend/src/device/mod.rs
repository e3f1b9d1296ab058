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

use crate::state::file::StateFileError;
pub use clock::{ClockConfig, ClockDevice, GuestTime, GuestTimeGuard, UtcKind};
pub use timer::TimerDevice;
#[cfg(test)]
pub(crate) use timer::persist;

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel makes no timerfd.
    #[error("creating a timerfd failed")]
    Alarm(#[source] io::Error),
    /// The state file cannot be used.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
}
