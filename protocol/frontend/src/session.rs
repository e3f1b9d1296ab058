//! What outlives a connection, and how the next one is got.
//!
//! A [`Session`] is there for as long as its frontend. Its [`Connection`] is replaced when it is
//! lost, if [`Reconnect`] was asked for: by the thread that notices, within that thread's own
//! deadline; the others wait for it, within theirs. A thread that must go before it is done
//! leaves the rest, and the count of attempts, to the next one.
//!
//! The shared memory and the eventfds stay the same, so that the descriptors in a VMM's event loop
//! go on to be right. The old backend cannot disturb the new connection by them: a process
//! that died has neither, and a living one answers the new connection's first message only when
//! it is done with the old one (SPEC.md, "Connection": one frontend at a time). The rings are
//! touched after that answer and not before.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::connection::{self, Connection, Negotiated, VringSetup};
use super::error::Failure;
use super::events::EventQueue;
use super::memory::SharedMemory;
use super::queue::Shared;
use super::replay::{History, Recovered};
use super::wait::{ConnectionWatch, Deadline, ShutdownHandle};
use super::{Error, Options, Reconnect, RequestQueue, TimePage};

/// A connect() that has to wait for the listener's backlog is better tried again: the shutdown
/// handle does not end it.
const CONNECT: Duration = Duration::from_millis(1);

/// Where connections come from.
pub(super) enum Connector {
    Path(PathBuf),
    Function(Box<dyn Fn() -> io::Result<UnixStream> + Send + Sync>),
}

impl Connector {
    pub(super) fn connect(&self, deadline: Deadline) -> Result<UnixStream, Error> {
        match self {
            Connector::Path(path) => connection::connect(path, deadline),
            Connector::Function(connect) => connect().map_err(|source| Error::Io {
                what: "connect to the backend",
                source,
            }),
        }
    }
}

/// Why there is no connection to go on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// There will be none.
    Failed(Failure),
    /// There is none at the deadline.
    Late,
}

/// The rings that are to be taken from one connection to the next.
pub(super) struct Rings {
    events: Weak<EventQueue>,
    queues: Box<[Weak<Shared>]>,
}

/// See the module.
pub(super) struct Session {
    pub(super) watch: ConnectionWatch,
    pub(super) memory: Arc<SharedMemory>,
    pub(super) negotiated: Negotiated,
    pub(super) history: History,
    pub(super) page: TimePage,
    pub(super) timeout: Duration,
    /// Something was answered on the present connection.
    pub(super) answered: AtomicBool,
    connection: Mutex<Arc<Connection>>,
    /// Grows with every connection.
    generation: AtomicU64,
    again: Option<(Connector, Reconnect)>,
    rings: OnceLock<Rings>,
    reconnecting: Mutex<Reconnecting>,
    /// The reconnecting has changed.
    changed: Condvar,
}

/// Where threads meet that have lost the connection.
#[derive(Default)]
struct Reconnecting {
    /// One of them is at work.
    busy: bool,
    outage: Option<Outage>,
    /// What the last outage left.
    left: Option<PatienceLeft>,
    failure: Option<Failure>,
}

/// Patience, and the delay before the next attempt.
type PatienceLeft = (Option<Duration>, Duration);

/// A time without a connection.
#[derive(Clone, Copy)]
struct Outage {
    /// When patience ends.
    until: Deadline,
    /// When the next attempt is due.
    next: Instant,
    /// How long it is to the one after that.
    delay: Duration,
}

/// Makes way for another thread when it is dropped, by a panic in a [`Connector`] too.
struct ReconnectGuard<'a>(&'a Session);

impl Drop for ReconnectGuard<'_> {
    fn drop(&mut self) {
        self.0.reconnecting().busy = false;
        self.0.changed.notify_all();
    }
}

impl Session {
    pub(super) fn new(
        connection: Connection,
        shutdown: ShutdownHandle,
        memory: Arc<SharedMemory>,
        negotiated: Negotiated,
        page: TimePage,
        options: &Options,
        connector: Option<Connector>,
    ) -> Result<Self, Error> {
        Ok(Session {
            watch: ConnectionWatch::new(&connection.socket, shutdown)?,
            memory,
            negotiated,
            history: History::default(),
            page,
            timeout: options.timeout,
            answered: AtomicBool::new(false),
            connection: Mutex::new(Arc::new(connection)),
            generation: AtomicU64::new(0),
            again: connector.zip(options.reconnect),
            rings: OnceLock::new(),
            reconnecting: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Says what rings there are: once, before anyone waits.
    pub(super) fn attach(&self, events: &Arc<EventQueue>, queues: &[RequestQueue]) {
        let queues = queues.iter().map(|queue| Arc::downgrade(&queue.shared));
        let _ = self.rings.set(Rings {
            events: Arc::downgrade(events),
            queues: queues.collect(),
        });
    }

    /// Numbers the present connection. To be read before the watch is looked at.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn connection(&self) -> Arc<Connection> {
        let connection = self.connection.lock();
        connection.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn reconnecting(&self) -> MutexGuard<'_, Reconnecting> {
        self.reconnecting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Has an exchange on the present connection, and again on the next one if it is lost.
    pub(super) fn exchange<T>(
        &self,
        deadline: Deadline,
        exchange: impl Fn(&Connection, Deadline) -> Result<T, Error>,
    ) -> Result<T, Error> {
        loop {
            let generation = self.generation();
            match exchange(&self.connection(), deadline.or(self.timeout)) {
                Err(Error::Disconnected) => self.reconnected(generation, deadline)?,
                other => return other,
            }
        }
    }

    /// As [`recover`](Self::recover), with [`Error`]s.
    pub(super) fn reconnected(&self, lost: u64, deadline: Deadline) -> Result<(), Error> {
        self.recover(lost, deadline)
            .map_err(|stopped| match stopped {
                Stopped::Failed(failure) => failure.into(),
                Stopped::Late => Error::TimedOut {
                    what: "the next connection",
                },
            })
    }

    /// What is left of the failure of a connection: nothing, where it was brought back, or may
    /// still be after the deadline.
    pub(super) fn outlive(
        &self,
        failure: Failure,
        generation: u64,
        deadline: Deadline,
    ) -> Option<Failure> {
        if failure != Failure::Disconnected {
            return Some(failure);
        }
        match self.recover(generation, deadline) {
            Ok(()) | Err(Stopped::Late) => None,
            Err(Stopped::Failed(failure)) => Some(failure),
        }
    }

    /// Returns once the connection of generation `lost` has a successor.
    pub(super) fn recover(&self, lost: u64, deadline: Deadline) -> Result<(), Stopped> {
        let Some((connector, policy)) = &self.again else {
            return Err(Stopped::Failed(Failure::Disconnected));
        };
        let mut reconnecting = self.reconnecting();
        loop {
            if self.watch.shutdown.was_used() {
                reconnecting.failure.get_or_insert(Failure::ShutDown);
            }
            if let Some(failure) = reconnecting.failure {
                return Err(Stopped::Failed(failure));
            }
            if self.generation() != lost {
                return Ok(());
            }
            let outage = match reconnecting.outage {
                Some(outage) => outage,
                None => {
                    let outage = self.outage(reconnecting.left.take(), policy);
                    *reconnecting.outage.insert(outage)
                }
            };
            if !reconnecting.busy && outage.until.has_passed() {
                reconnecting.failure = Some(Failure::Disconnected);
                self.changed.notify_all();
                continue;
            }
            if deadline.has_passed() {
                return Err(Stopped::Late);
            }
            if reconnecting.busy {
                reconnecting = self.wait_for_change(reconnecting, deadline);
                continue;
            }
            reconnecting.busy = true;
            drop(reconnecting);
            let guard = ReconnectGuard(self);
            let tried = self.try_when_due(connector, outage, deadline);
            reconnecting = self.reconnecting();
            match tried {
                // It was not due yet.
                None => {}
                Some(Ok(())) => {
                    reconnecting.left = Some((outage.until.remaining(), outage.delay));
                    reconnecting.outage = None;
                    self.generation.fetch_add(1, Ordering::AcqRel);
                }
                Some(Err(error)) => {
                    reconnecting.failure = Failure::for_good(&error);
                    reconnecting.outage = Some(Outage {
                        next: Instant::now() + outage.delay,
                        delay: (outage.delay * 2).min(policy.max_delay),
                        ..outage
                    });
                }
            }
            drop(reconnecting);
            drop(guard);
            reconnecting = self.reconnecting();
        }
    }

    fn wait_for_change<'a>(
        &self,
        reconnecting: MutexGuard<'a, Reconnecting>,
        deadline: Deadline,
    ) -> MutexGuard<'a, Reconnecting> {
        match deadline.remaining() {
            Some(left) => {
                let woken = self.changed.wait_timeout(reconnecting, left);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                let woken = self.changed.wait(reconnecting);
                woken.unwrap_or_else(PoisonError::into_inner)
            }
        }
    }

    /// The connection was lost just now. If nothing was answered on it, the outage before goes on: a
    /// backend that falls over what it is asked must not be asked for ever.
    fn outage(&self, left: Option<PatienceLeft>, policy: &Reconnect) -> Outage {
        for queue in self.queues() {
            queue.suspend();
        }
        let now = Instant::now();
        let answered = self.answered.swap(false, Ordering::AcqRel);
        match left.filter(|_| !answered) {
            Some((left, delay)) => Outage {
                until: left.map_or(Deadline::NEVER, Deadline::from),
                next: now + delay,
                delay: (delay * 2).min(policy.max_delay),
            },
            None => Outage {
                until: policy.patience.into(),
                next: now,
                delay: policy.first_delay,
            },
        }
    }

    /// Waits until the next attempt is due, and makes it; `None` if it is not due in time.
    fn try_when_due(
        &self,
        connector: &Connector,
        outage: Outage,
        deadline: Deadline,
    ) -> Option<Result<(), Error>> {
        let deadline = deadline.or(outage.until);
        if let Err(error) = self.watch.shutdown.wait(deadline.or(outage.next)) {
            return Some(Err(error));
        }
        if self.watch.shutdown.was_used() || deadline.has_passed() {
            return None;
        }
        Some(self.attempt(connector, deadline.or(self.timeout)))
    }

    /// Makes those who wait look again, on every queue.
    pub(super) fn wake_waiters(&self) {
        for queue in self.queues() {
            queue.wake_waiters();
        }
    }

    /// Asks for the time page again after a reset.
    pub(super) fn restart_page(&self) {
        self.page.restart(&self.queues().collect::<Vec<_>>());
    }

    fn queues(&self) -> impl Iterator<Item = Arc<Shared>> {
        let queues = self.rings.get().map_or(&[][..], |rings| &rings.queues);
        queues.iter().filter_map(Weak::upgrade)
    }

    fn attempt(&self, connector: &Connector, deadline: Deadline) -> Result<(), Error> {
        let socket = connector.connect(deadline.or(CONNECT))?;
        let next = Connection::new(socket, self.watch.shutdown.clone())?;
        // Once that is answered, nobody is left who serves the old connection.
        next.negotiate(Some(&self.negotiated), deadline)?;
        let info = next.config(deadline)?;
        let mut found = Recovered {
            phase: info.phase,
            epoch: info.epoch,
            unanswered_begins: 0,
            unanswered_dones: 0,
        };
        let events = self.rings.get().and_then(|rings| rings.events.upgrade());
        let (Some(events), queues) = (events, self.queues().collect::<Vec<_>>()) else {
            return Err(Error::ShutDown);
        };
        for queue in &queues {
            queue.collect_unanswered(&mut found);
        }
        if let Some(contradiction) = self.history.contradicts(&info) {
            return Err(Error::StateLost(contradiction));
        }
        self.history.learn_info(&info);
        for queue in &queues {
            queue.settle_aborts(&found);
        }
        for queue in &queues {
            queue.refill(&found);
        }
        events.refill();

        let vrings: Vec<VringSetup<'_>> = std::iter::once(events.vring())
            .chain(queues.iter().map(|queue| queue.vring()))
            .collect();
        // The former backend is gone, and the VM may change from here on.
        self.page.invalidate();
        next.start(&self.memory, &vrings, deadline)?;
        self.watch.follow(&next.socket)?;
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *connection = Arc::new(next);
        if self.watch.shutdown.was_used() {
            // Whoever closed the frontend closed the connection before.
            connection.close();
        }
        drop(connection);
        self.answered.store(false, Ordering::Release);
        for queue in &queues {
            queue.resume_service();
        }
        events.resume_service();
        self.page.restart(&queues);
        Ok(())
    }
}
