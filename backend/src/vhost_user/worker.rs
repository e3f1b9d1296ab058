//! A connection's worker: the one thread that serves its rings, as the session's other threads know
//! it. What it does is in `serving`.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vm_memory::bitmap::Bitmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::sys::lock;
use crate::vhost_user::Vring;
use crate::vhost_user::door::Bell;
use crate::virtio::polling::Polling;

/// What a worker's threads share.
pub(super) struct Worker<B: Bitmap + 'static> {
    queues: u16,
    /// Set by the worker's first event.
    pub(super) vrings: OnceLock<Vec<Vring<B>>>,
    exit: Exit,
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
    pub(super) end: End,
}

impl<B: Bitmap + 'static> Worker<B> {
    pub(super) fn new(queues: u16, poll_max: Duration) -> io::Result<Self> {
        Ok(Worker {
            queues,
            vrings: OnceLock::new(),
            exit: Exit::new()?,
            wake: EventFd::new(EFD_NONBLOCK)?,
            unfinished: AtomicU32::new(0),
            stopping: AtomicBool::new(false),
            polling: Polling::new(poll_max.as_nanos().try_into().unwrap_or(u64::MAX)),
            poll_lock: Mutex::new(()),
            poll_interrupts: AtomicU32::new(0),
            unkicked: AtomicU32::new(0),
            empty_kicks: AtomicU32::new(0),
            end: End::new()?,
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

    /// Ends the thread, once it has nothing under way. Dropping the daemon does the same.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // Each fails only where the counter is full, and then the worker wakes as well. The first
        // ends its wait, the second its polling.
        let _ = self.exit.notifier.notify();
        let _ = self.wake.write(1);
    }

    /// What the crate's loop ends by.
    pub(super) fn exit_event(&self) -> Option<(EventConsumer, EventNotifier)> {
        lock(&self.exit.for_crate).take()
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

/// The end of the worker's thread, as the connection's door learns of it.
pub(super) struct End(Arc<(AtomicBool, Bell)>);

/// Says that the worker has ended when it is dropped, for whatever reason.
pub(super) struct EndOfWorker(Arc<(AtomicBool, Bell)>);

impl End {
    fn new() -> io::Result<Self> {
        Ok(End(Arc::new((AtomicBool::new(false), Bell::new()?))))
    }

    /// The door's bell.
    pub(super) fn bell(&self) -> &Bell {
        &self.0.1
    }

    /// Whether the worker has ended.
    pub(super) fn is_there(&self) -> bool {
        self.0.0.load(Ordering::Acquire)
    }

    /// For the worker's thread to keep.
    pub(super) fn when_dropped(&self) -> EndOfWorker {
        EndOfWorker(Arc::clone(&self.0))
    }
}

impl Drop for EndOfWorker {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Release);
        self.0.1.ring();
    }
}

/// The event by which the crate's loop ends.
struct Exit {
    notifier: EventNotifier,
    /// Made beforehand: without an exit event, dropping the daemon would wait without end.
    for_crate: Mutex<Option<(EventConsumer, EventNotifier)>>,
    /// The number of the consumer's descriptor.
    consumer: RawFd,
}

impl Exit {
    fn new() -> io::Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let (consumer, notifier) = new_event_consumer_and_notifier(flags)?;
        Ok(Exit {
            notifier: notifier.try_clone()?,
            consumer: consumer.as_raw_fd(),
            for_crate: Mutex::new(Some((consumer, notifier))),
        })
    }
}

impl Drop for Exit {
    /// The crate makes a number of its consumer, and never closes it (event_loop.rs,
    /// `VringEpollHandler::new`).
    #[expect(unsafe_code, reason = "the crate leaves the descriptor as a number")]
    fn drop(&mut self) {
        if lock(&self.for_crate).is_none() {
            // SAFETY: the crate took the consumer and gave up owning its descriptor, which is open
            // since then and which nobody else closes. The session, whose part this is, outlives
            // the crate's use of it.
            drop(unsafe { OwnedFd::from_raw_fd(self.consumer) });
        }
    }
}
