//! A connection's worker: the one thread that serves its rings, as the session's other threads know
//! it. What it does is in `serving`.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vm_memory::bitmap::Bitmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vhost_user::Vring;
use crate::virtio::polling::Polling;

/// What a worker's threads share.
pub(super) struct Worker<B: Bitmap + 'static> {
    queues: u16,
    /// Set by the worker's first event.
    pub(super) vrings: OnceLock<Vec<Vring<B>>>,
    /// Wakes the worker: to start, to serve `unfinished` queues, or to stop.
    pub(super) wake: EventFd,
    /// Queues with requests left for later, as bits.
    pub(super) unfinished: AtomicU32,
    stopping: AtomicBool,
    pub(super) polling: Polling,
    /// Held while polling ring memory without the rings' locks.
    pub(super) poll_lock: Mutex<()>,
    /// Threads that wait for polling to be interrupted.
    pub(super) poll_interrupts: AtomicU32,
    /// Queues whose drivers do not kick because the worker polls, as bits.
    pub(super) unkicked: AtomicU32,
    /// Consecutive kicks without a chain.
    pub(super) empty_kicks: AtomicU32,
    /// Written when the worker ends, for whatever reason.
    pub(super) ended: EventFd,
}

impl<B: Bitmap + 'static> Worker<B> {
    pub(super) fn new(queues: u16, ended: EventFd, poll_max: Duration) -> io::Result<Self> {
        Ok(Worker {
            queues,
            vrings: OnceLock::new(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            unfinished: AtomicU32::new(0),
            stopping: AtomicBool::new(false),
            polling: Polling::new(poll_max.as_nanos().try_into().unwrap_or(u64::MAX)),
            poll_lock: Mutex::new(()),
            poll_interrupts: AtomicU32::new(0),
            unkicked: AtomicU32::new(0),
            empty_kicks: AtomicU32::new(0),
            ended,
        })
    }

    /// A mask of queues for each thread: all of them on one.
    pub(super) fn queues_per_thread(&self) -> Vec<u64> {
        vec![u64::MAX >> (64 - self.queues)]
    }

    /// The worker's identifiers of the wake-up and the alarm. The crate reserves those up to the
    /// number of queues.
    pub(super) fn wake_id(&self) -> u16 {
        self.queues + 1
    }

    pub(super) fn alarm_id(&self) -> u16 {
        self.queues + 2
    }

    pub(super) fn attach<T: VhostUserBackend>(
        &self,
        handler: &VringEpollHandler<T>,
        alarm: RawFd,
    ) -> io::Result<()> {
        handler.register_listener(self.wake.as_raw_fd(), EventSet::IN, self.wake_id().into())?;
        handler.register_listener(alarm, EventSet::IN, self.alarm_id().into())?;
        self.wake.write(1)?;
        self.vrings.wait();
        Ok(())
    }

    /// Ends the thread. The crate has an exit event for that, but leaks a descriptor for each.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // Fails only where the counter is full, and then the worker wakes as well.
        let _ = self.wake.write(1);
    }

    pub(super) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// The rings, by queue; none before the worker has started.
    pub(super) fn vrings(&self) -> &[Vring<B>] {
        self.vrings.get().map_or(&[], Vec::as_slice)
    }

    /// The rings of these queues, given as bits.
    pub(super) fn vrings_of(&self, queues: u32) -> impl Iterator<Item = &Vring<B>> {
        let all = self.vrings().iter();
        all.enumerate()
            .filter(move |(queue, _)| queues & (1 << queue) != 0)
            .map(|(_, vring)| vring)
    }

    /// Serves these queues, as bits, once the others had their turn.
    pub(super) fn serve_later(&self, queues: u32) {
        self.unfinished.fetch_or(queues, Ordering::Relaxed);
        let _ = self.wake.write(1);
    }
}
