//! The devices as vhost-user sees them: rings in, model call, rings out.
//!
//! A device ([`TimerDevice`], [`ClockDevice`]) lives as long as the process. A `Session` lives as long as one
//! frontend's connection to it; `vhost-user-backend` calls it, on the connection's request thread for
//! control messages and on its one worker thread for everything that becomes readable: kicks, the
//! device's alarm, and the connection's own wake-up. What all sessions have is in `link`; a ring while
//! it is served, in `ring`.
//!
//! This is the only place that knows vhost-user, and where the crate's traps are kept from
//! everyone else: an error or a panic in `handle_event` ends
//! the worker for good, so nothing there returns one but the order to stop; a ring stays
//! memory that the frontend owns after GET_VRING_BASE, so every use of it asks first whether it
//! is started and enabled; and a ring whose indices make no sense is stopped, not retried.

mod clock;
mod timer;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost_user_backend::bitmap::BitmapReplace;
use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::mmap::NewBitmap;
use vmm_sys_util::eventfd::EventFd;

use crate::state::file::StateFileError;
pub(crate) use crate::vhost_user::vring::Memory;
#[doc(hidden)]
pub use crate::vhost_user::vring::Vring;
pub(crate) use clock::ClockSession;
pub use clock::{ClockConfig, ClockDevice, UtcKind};
pub use timer::TimerDevice;
pub(crate) use timer::TimerSession;

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel makes no timerfd.
    #[error("Making a timerfd failed")]
    Alarm(#[source] io::Error),
    /// The state file cannot be used.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
}

/// What every device offers.
const VIRTIO_FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// One frontend's connection to a device.
pub(crate) trait Session:
    VhostUserBackend<
        Bitmap: BitmapReplace + NewBitmap + Clone + Send + Sync,
        Vring: Clone + Send + Sync,
    > + Sized
    + 'static
{
    /// The device.
    type Device: Send + Sync;

    /// A session over the memory that its connection will share. `ended` is written when it can
    /// serve no more; its worker looks for requests for so long before it sleeps.
    fn new(
        device: &Arc<Self::Device>,
        memory: Memory<Self::Bitmap>,
        ended: EventFd,
        poll_max: Duration,
    ) -> io::Result<Self>;

    /// Lets the worker hear of the device's alarm and of the session's wake-up.
    fn attach(&self, worker: &VringEpollHandler<Arc<Self>>) -> io::Result<()>;

    /// Stoppable the worker, and whatever waits.
    fn stop(&self);

    /// Whether the worker was told to end.
    fn stopping(&self) -> bool;

    /// The frontend is gone.
    fn disconnected(&self);
}
