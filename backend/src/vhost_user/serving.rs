//! What a connection's worker does with its rings.
//!
//! `vhost-user-backend` runs the thread and its epoll set; it calls
//! [`handle_worker_event`](Session::handle_worker_event) for every kick, for the device's alarm and
//! for the session's own wake-up. An error from there ends the thread permanently, so the only
//! error is a kick descriptor that never becomes unreadable. At the end of the session the crate's
//! exit event ends the thread.

use std::cell::OnceCell;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use crate::sys::lock;
use crate::vhost_user::session::Session;
use crate::vhost_user::worker::EndOfWorker;
use crate::vhost_user::{Device, Vring};
use crate::virtio::polling::{self, RingToPoll, poll_rings};
use crate::virtio::region_cache::RegionCache;
use crate::virtio::ring::{Stop, WhenIdle, available_index};

/// Consecutive kicks without a chain after which the worker ends; any chain resets the count.
/// Without a limit, a kick descriptor that is always readable (a semaphore eventfd, for example)
/// would spin the worker.
const MAX_EMPTY_KICKS: u32 = 65_536;

/// A bit each.
const MAX_QUEUES: usize = u32::BITS as usize;

thread_local! {
    static END_OF_WORKER: OnceCell<EndOfWorker> = const { OnceCell::new() };
}

fn bits(queues: Range<u16>) -> u32 {
    queues.fold(0, |bits, queue| bits | 1 << queue)
}

fn queues_of(bits: u32) -> impl Iterator<Item = u16> {
    (0..MAX_QUEUES as u16).filter(move |queue| bits & (1 << queue) != 0)
}

impl<D: Device> Session<D> {
    /// Something that the worker waits for has happened. An error ends the worker permanently.
    pub(super) fn handle_worker_event(
        &self,
        event: u16,
        vrings: &[Vring<D::Bitmap>],
    ) -> io::Result<()> {
        let worker = &self.worker;
        if worker.vrings.get().is_none() {
            let _ = worker.vrings.set(vrings.to_vec());
        }
        END_OF_WORKER.with(|end| {
            end.get_or_init(|| {
                self.enter();
                worker.end.when_dropped()
            });
        });
        if worker.stopping() {
            // The crate's exit event is next.
            return Ok(());
        }
        match event {
            event if event == worker.wake_id() => self.woken()?,
            event if event == worker.alarm_id() => {
                self.turn(|device, turn| device.time_passed(turn));
            }
            queue => self.kicked(queue)?,
        }
        Ok(())
    }

    /// Serves a queue whose driver kicked, and whatever comes soon after.
    fn kicked(&self, queue: u16) -> io::Result<()> {
        let worker = &self.worker;
        let before = self.chains_taken();
        if self.device.request_queues().contains(&queue) {
            let window = worker.polling.kicked();
            self.serve_and_poll(1 << queue, window);
        } else {
            self.serve(queue, WhenIdle::AskForKick);
        }
        if self.chains_taken() != before {
            worker.empty_kicks.store(0, Ordering::Relaxed);
            return Ok(());
        }
        let empty = worker.empty_kicks.fetch_add(1, Ordering::Relaxed);
        log::trace!("Queue {queue} was kicked, and has no chain");
        if empty >= MAX_EMPTY_KICKS {
            return Err(io::Error::other(
                "Kick descriptor is always readable and no chain is available",
            ));
        }
        Ok(())
    }

    fn woken(&self) -> io::Result<()> {
        let worker = &self.worker;
        // Nothing to read: another wake-up took it along.
        let _ = worker.wake.read();
        let unfinished = worker.unfinished.swap(0, Ordering::Relaxed);
        if unfinished == 0 {
            return Ok(());
        }
        let requests = bits(self.device.request_queues());
        for queue in queues_of(unfinished & !requests) {
            self.serve(queue, WhenIdle::AskForKick);
        }
        if unfinished & requests != 0 {
            self.serve_and_poll(unfinished & requests, worker.polling.window());
        }
        Ok(())
    }

    /// Serves a queue until it is drained or others are due. Each time that a request has effects
    /// it took a chain of the batch, so there is an end.
    fn serve(&self, queue: u16, when_idle: WhenIdle) {
        let stop = self.turn(|device, turn| device.serve(turn, queue, when_idle));
        self.serve_on(queue, when_idle, stop);
    }

    /// Serves a queue, then asks its driver for a kick. The driver is notified before it is asked:
    /// one that wakes up at once and posts more needs no kick.
    fn serve_until_kicked(&self, queue: u16) {
        let stop = self.turn(|device, turn| device.serve(turn, queue, WhenIdle::KeepPolling));
        if self.serve_on(queue, WhenIdle::KeepPolling, stop) == Stop::Drained {
            self.serve_on(queue, WhenIdle::AskForKick, Stop::EffectsPending);
        }
    }

    /// Goes on with the batch that ended in `stop`.
    fn serve_on(&self, queue: u16, when_idle: WhenIdle, mut stop: Stop) -> Stop {
        while stop == Stop::EffectsPending {
            stop = self.go_on(|device, turn| device.serve(turn, queue, when_idle));
        }
        if stop == Stop::BatchFull {
            self.worker.serve_later(1 << queue);
        }
        stop
    }

    /// Serves these request queues. Then polls all request queues for the length of the window,
    /// which starts over whenever there is something to serve.
    fn serve_and_poll(&self, queues: u32, window: u64) {
        let worker = &self.worker;
        if window == 0 {
            let unkicked = worker.unkicked.swap(0, Ordering::Relaxed);
            for queue in queues_of(queues | unkicked) {
                self.serve_until_kicked(queue);
            }
            worker.polling.sleeps();
            return;
        }
        let span = worker.polling.begin();
        for queue in queues_of(queues) {
            self.serve(queue, WhenIdle::KeepPolling);
        }
        let mut unkicked = worker.unkicked.load(Ordering::Relaxed) | queues;
        // The alarm, and what epoll reports, wait for the worker as well.
        let end = span.began.saturating_add(worker.polling.max());
        let mut found = false;
        let mut idle_since = polling::now();
        loop {
            let give_up = idle_since
                .saturating_add(window)
                .min(self.device.alarm_at());
            let available = self.poll(give_up.min(end));
            for queue in queues_of(available) {
                self.serve(queue, WhenIdle::KeepPolling);
            }
            unkicked |= available;
            found |= available != 0;
            let now = polling::now();
            let fruitless = available == 0 && (now >= give_up || now >= end && !found);
            if worker.stopping() || fruitless {
                worker.unkicked.store(0, Ordering::Relaxed);
                for queue in queues_of(unkicked) {
                    self.serve(queue, WhenIdle::AskForKick);
                }
                let idle = now.saturating_sub(idle_since);
                worker.polling.ended(&span, found, idle);
                return;
            }
            if now >= end || worker.unfinished.load(Ordering::Relaxed) != 0 {
                // Goes on once the others had their turn.
                worker.unkicked.store(unkicked, Ordering::Relaxed);
                worker.serve_later(unkicked);
                worker.polling.paused(&span);
                return;
            }
            idle_since = now;
        }
    }

    /// Interrupts polling, so that the worker reloads ring state and memory map. Called after a
    /// ring was stopped or the memory changed; on return the worker uses neither the old ring nor
    /// the old memory.
    pub(super) fn interrupt_polling(&self) {
        let worker = &self.worker;
        let _first = self.turnstile.enter();
        worker.poll_interrupts.fetch_add(1, Ordering::SeqCst);
        drop(lock(&worker.poll_lock));
        worker.poll_interrupts.fetch_sub(1, Ordering::SeqCst);
    }

    /// Polls the request queues until one of them has chains, and returns which, as bits; or until
    /// the time has come, or the worker is wanted for something else.
    fn poll(&self, until: u64) -> u32 {
        let worker = &self.worker;
        self.turnstile.let_others_go_first();
        let _polling = lock(&worker.poll_lock);
        let mem = self.memory().memory();
        let mut regions = RegionCache::new(&*mem);
        let queues = self.device.request_queues();
        let (first, count) = (queues.start, queues.len());
        let mut rings = [None; MAX_QUEUES];
        for (ring, queue) in rings.iter_mut().zip(queues) {
            *ring = worker.vrings().get(usize::from(queue)).and_then(|vring| {
                let state = vring.state();
                let queue = state.get_queue();
                (queue.ready() && state.is_enabled()).then_some(())?;
                Some(RingToPoll {
                    index: available_index(queue, &mut regions)?,
                    taken: queue.next_avail(),
                })
            });
        }
        let rings = rings.get(..count).unwrap_or_default();
        let available = poll_rings(rings, || {
            worker.stopping()
                || worker.unfinished.load(Ordering::Relaxed) != 0
                || worker.poll_interrupts.load(Ordering::Relaxed) != 0
                || polling::now() >= until
        });
        available << first
    }
}
