//! What a device is to the protocol.

use std::error::Error;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicBool;

use crate::vhost_user::{DirtyBitmap, Vring};
use crate::virtio::Memory;
use crate::virtio::chain::{ChainBuffer, ChainLimits};
use crate::virtio::ring::{RingScratch, Stop, WhenIdle};

/// Why a device neither saves nor loads its state. It goes to the log: the frontend only learns
/// that the backend refused.
pub(crate) type StateError = Box<dyn Error + Send + Sync>;

/// A device behind one or more frontends, of which one is connected at a time.
///
/// A device lives as long as the process. It is called on two threads of a connection: on the
/// request thread for control messages, and on the worker for everything else. Calls with a
/// [`Turn`] hold the connection's rings; the device takes its own lock inside of them.
pub(crate) trait Device: Send + Sync + 'static {
    /// What is written to the shared memory: logged for a migration
    /// ([`DirtyLog`](crate::vhost_user::DirtyLog)), or not (`()`).
    type Bitmap: DirtyBitmap;
    /// What the device keeps of one connection's rings, such as chains it has yet to answer.
    type InFlight: Default + Send;

    /// As the log calls it.
    const NAME: &'static str;
    /// The largest ring, descriptors: a power of two.
    const MAX_QUEUE_SIZE: u16;
    /// How much of a chain is request and response.
    const CHAIN_LIMITS: ChainLimits;
    /// Feature bits of this kind of device.
    const FEATURES: u64;
    /// Whether there is a configuration space.
    const HAS_CONFIG: bool;

    /// How many queues there are: 1 to 32.
    fn queues(&self) -> u16;

    /// Which of them requests come by; these are polled.
    fn request_queues(&self) -> Range<u16>;

    /// Becomes readable when the device's alarm goes off.
    fn alarm_fd(&self) -> RawFd;

    /// When the alarm goes off, ns of CLOCK_MONOTONIC; `u64::MAX` where it does not, or follows
    /// another clock. Polling ends then; an alarm on another clock waits for the end of polling.
    fn alarm_at(&self) -> u64;

    /// Serves one queue, and carries out what came of it. Called again at once after
    /// [`Stop::EffectsPending`], and after the other queues had their turn after
    /// [`Stop::BatchFull`].
    fn serve(&self, turn: &mut Turn<'_, Self>, queue: u16, when_idle: WhenIdle) -> Stop;

    /// The alarm went off.
    fn time_passed(&self, turn: &mut Turn<'_, Self>);

    /// A queue is being stopped (GET_VRING_BASE). After this the device leaves the ring alone.
    fn stop_queue(&self, turn: &mut Turn<'_, Self>, queue: u16);

    /// The driver accepted these features.
    fn set_features(&self, _features: u64) {}

    /// RESET_DEVICE.
    fn reset(&self, turn: &mut Turn<'_, Self>);

    /// The configuration space.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The shared memory has changed.
    fn memory_changed(&self, _memory: &Memory<Self::Bitmap>) {}

    /// The device's state as a stream, for another host.
    fn save(&self) -> Result<Vec<u8>, StateError>;

    /// Takes the state of such a stream. On an error nothing has changed.
    fn load(&self, turn: &mut Turn<'_, Self>, stream: &[u8]) -> Result<(), StateError>;

    /// A ring is about to be enabled. The frontend waits for as long as this takes; it must return
    /// soon after `canceled` is set and [`wake_held`](Self::wake_held) was called.
    fn before_enabling(&self, _canceled: &AtomicBool) {}

    /// Wakes threads in [`before_enabling`](Self::before_enabling), to look at `canceled`.
    fn wake_held(&self) {}

    /// The frontend is gone.
    fn disconnected(&self) {}
}

/// One connection's rings, for the time of one call to the device.
pub(crate) struct Turn<'a, D: Device + ?Sized> {
    /// The memory that the frontend shares.
    pub(crate) memory: &'a Memory<D::Bitmap>,
    /// The rings, by queue; none before the worker has started.
    pub(crate) vrings: &'a [Vring<D::Bitmap>],
    /// The chain that was taken last.
    pub(crate) chain: &'a mut ChainBuffer,
    pub(crate) scratch: &'a mut RingScratch,
    pub(crate) in_flight: &'a mut D::InFlight,
    /// Queues to come back to, as bits.
    pub(super) unfinished: u32,
}

impl<'a, D: Device + ?Sized> Turn<'a, D> {
    /// A queue's ring.
    pub(crate) fn vring(&self, queue: u16) -> Option<&'a Vring<D::Bitmap>> {
        self.vrings.get(usize::from(queue))
    }

    /// Has the worker serve this queue once the others had their turn.
    pub(crate) fn serve_later(&mut self, queue: u16) {
        self.unfinished |= 1 << queue;
    }
}
