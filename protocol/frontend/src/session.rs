//! What outlives a connection, and how the next connection is made.
//!
//! A [`Session`] lives as long as its frontend. With [`Reconnect`], a lost [`Connection`] is
//! replaced: by the thread that notices, within that thread's own deadline, while the other threads
//! wait for it, within theirs. A thread whose deadline passes first leaves the rest, and the count
//! of attempts, to the next thread.
//!
//! The shared memory and the eventfds stay the same, so the descriptors in a VMM's event loop stay
//! valid. The old backend must not use them to disturb the new connection, and this project's does
//! not:
//!
//! - A dead process has neither.
//! - The same process answers the new connection's first message only when it is done with the old
//!   connection (SPEC.md, "Connection": one frontend at a time). The rings are touched only after
//!   that answer.
//! - Another process does not get the VM while the old one lives, even stopped: the old one has the
//!   lock of the state file. [`Backend`](crate::Backend) kills the old process first.
//!
//! The library cannot tell whether another backend keeps to that. An answer of the old process
//! would be taken for the new one's, or end the queue as a fault of the ring.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use crate::connection::{Connection, Negotiated, VringSetup};
use crate::connector::Reconnector;
use crate::error::Failure;
use crate::memory::SharedMemory;
use crate::replay::{History, Recovered};
use crate::sys::{lock, wait};
use crate::turn::Applying;
use crate::wait::{ConnectionWatch, Deadline, ShutdownHandle};
use crate::{Error, Operation, Options, Reconnect, TimePage};
use vhost_user_timer_protocol::CounterSource;

/// How long one connect() may take. If it has to wait for the listener's backlog, it is better
/// tried again: the shutdown handle does not end it.
const CONNECT: Duration = Duration::from_millis(1);

/// A ring, with what is in flight on it, that outlives connections.
///
/// All rings take each step before any ring takes the next one, since what happens to one ring's
/// requests depends on the others'.
pub(crate) trait Survivor: Send + Sync {
    /// The connection is lost: publishes nothing from now on.
    fn suspend(&self) {}

    /// The new backend is there, so the old one is gone: takes the answers that came, and counts
    /// the requests that may have been carried out without one.
    fn collect_unanswered(&self, _recovered: &mut Recovered) {}

    /// Answers the RESTORE_ABORTs that were carried out, which decide about other rings' requests.
    fn settle_aborts(&self, _recovered: &Recovered) {}

    /// Puts everything that is to be sent again on an empty ring.
    fn refill(&self, recovered: &Recovered);

    /// The ring, for the new backend.
    fn vring(&self) -> VringSetup<'_>;

    /// The new backend has the ring: makes sure that neither side has missed anything.
    fn resume_service(&self);

    /// Makes waiting threads look at the ring again.
    fn wake_waiters(&self) {}

    /// Sends an operation whose answer nobody waits for; `false` if there is no room.
    fn send(&self, _operation: &Operation<'_, ()>) -> bool {
        false
    }
}

/// Why there is no new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// There will never be one.
    Failed(Failure),
    /// There was none by the deadline.
    Late,
}

/// See the module's documentation.
pub(crate) struct Session {
    pub(crate) watch: ConnectionWatch,
    pub(crate) memory: Arc<SharedMemory>,
    pub(crate) negotiated: Negotiated,
    pub(crate) history: History,
    pub(crate) page: TimePage,
    pub(crate) timeout: Duration,
    pub(crate) host_counter: Option<CounterSource>,
    pub(crate) applying: Applying,
    /// Something was answered on the current connection.
    pub(crate) answered: AtomicBool,
    connection: Mutex<Arc<Connection>>,
    /// Grows with every connection.
    generation: AtomicU64,
    again: Option<(Reconnector, Reconnect)>,
    rings: OnceLock<Box<[Weak<dyn Survivor>]>>,
    reconnecting: Mutex<Reconnecting>,
    /// `reconnecting` has changed.
    changed: Condvar,
}

/// The state of reconnecting, shared by the threads that noticed the loss.
#[derive(Default)]
struct Reconnecting {
    /// One of the threads is at it.
    busy: bool,
    outage: Option<Outage>,
    /// What is left of the last outage's patience.
    left: Option<PatienceLeft>,
    failure: Option<Failure>,
}

/// The patience that is left (`None`: endless), and the delay before the next attempt.
type PatienceLeft = (Option<Duration>, Duration);

/// A time without a connection.
#[derive(Clone, Copy)]
struct Outage {
    /// When patience ends.
    until: Deadline,
    /// When the next attempt is due.
    next: Instant,
    /// The delay after that one.
    delay: Duration,
}

/// Lets another thread try when it is dropped, also by a panic in the caller's function that
/// connects.
struct ReconnectGuard<'a>(&'a Session);

impl Drop for ReconnectGuard<'_> {
    fn drop(&mut self) {
        self.0.reconnecting().busy = false;
        self.0.changed.notify_all();
    }
}

impl Session {
    pub(crate) fn new(
        connection: Connection,
        shutdown: ShutdownHandle,
        memory: Arc<SharedMemory>,
        negotiated: Negotiated,
        page: TimePage,
        options: &Options,
        reconnector: Option<Reconnector>,
    ) -> Result<Self, Error> {
        let applying = Applying::new(shutdown.clone())?;
        Ok(Session {
            watch: ConnectionWatch::new(&connection.socket, shutdown)?,
            memory,
            negotiated,
            history: History::default(),
            page,
            timeout: options.timeout,
            host_counter: options.host_counter,
            applying,
            answered: AtomicBool::new(false),
            connection: Mutex::new(Arc::new(connection)),
            generation: AtomicU64::new(0),
            again: reconnector.zip(options.reconnect),
            rings: OnceLock::new(),
            reconnecting: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Sets the rings, once, before any thread waits.
    pub(crate) fn attach(&self, rings: impl IntoIterator<Item = Weak<dyn Survivor>>) {
        let _ = self.rings.set(rings.into_iter().collect());
    }

    /// The number of the current connection. To be read before the watch is.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn connection(&self) -> Arc<Connection> {
        lock(&self.connection).clone()
    }

    fn reconnecting(&self) -> MutexGuard<'_, Reconnecting> {
        lock(&self.reconnecting)
    }

    /// Runs an exchange on the current connection, and again on the next one if that is lost.
    pub(crate) fn exchange<T>(
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

    /// As [`recover`](Self::recover), with errors as [`Error`].
    pub(crate) fn reconnected(&self, lost: u64, deadline: Deadline) -> Result<(), Error> {
        self.recover(lost, deadline)
            .map_err(|stopped| match stopped {
                Stopped::Failed(failure) => failure.into(),
                Stopped::Late => Error::TimedOut {
                    what: "the next connection",
                },
            })
    }

    /// Reconnects after a failure. `None` if there is a new connection, or may be one after the
    /// deadline; else the failure that is final.
    pub(crate) fn outlive(
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

    /// Returns once there is a connection newer than generation `lost`.
    pub(crate) fn recover(&self, lost: u64, deadline: Deadline) -> Result<(), Stopped> {
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
                reconnecting = wait(&self.changed, reconnecting, deadline);
                continue;
            }
            reconnecting.busy = true;
            drop(reconnecting);
            let guard = ReconnectGuard(self);
            let tried = self.try_when_due(connector, outage, deadline);
            reconnecting = self.reconnecting();
            match tried {
                // The attempt was not due yet.
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

    /// The outage that begins now. If nothing was answered on the lost connection, the previous
    /// outage goes on: a backend that crashes on a request must not be asked forever.
    fn outage(&self, left: Option<PatienceLeft>, policy: &Reconnect) -> Outage {
        for ring in self.rings() {
            ring.suspend();
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

    /// Waits until the next attempt is due and makes it; `None` if it is not due by the deadline.
    fn try_when_due(
        &self,
        connector: &Reconnector,
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

    /// Makes waiting threads look again, on every ring.
    pub(crate) fn wake_waiters(&self) {
        for ring in self.rings() {
            ring.wake_waiters();
        }
    }

    /// Asks for the time page again, after a reset or on a new connection.
    pub(crate) fn restart_page(&self) {
        self.page
            .restart(|operation| self.rings().any(|ring| ring.send(operation)));
    }

    fn rings(&self) -> impl Iterator<Item = Arc<dyn Survivor>> {
        let rings = self.rings.get().map_or(&[][..], |rings| rings);
        rings.iter().filter_map(Weak::upgrade)
    }

    fn attempt(&self, connector: &Reconnector, deadline: Deadline) -> Result<(), Error> {
        let socket = connector.connect(deadline.or(CONNECT))?;
        let next = Connection::new(socket, self.watch.shutdown.clone())?;
        // Once this is answered, nobody serves the old connection any more.
        next.negotiate(Some(&self.negotiated), deadline)?;
        let info = next.config(deadline)?;
        let mut recovered = Recovered {
            phase: info.phase,
            epoch: info.epoch,
            unanswered_begins: 0,
            unanswered_dones: 0,
        };
        let rings = self.rings.get().map_or(&[][..], |rings| rings);
        let rings: Option<Vec<_>> = rings.iter().map(Weak::upgrade).collect();
        let Some(rings) = rings else {
            return Err(Error::ShutDown);
        };
        for ring in &rings {
            ring.collect_unanswered(&mut recovered);
        }
        if let Some(loss) = self.history.contradicts(&info) {
            return Err(Error::StateLost(loss));
        }
        self.check_counter(&info)?;
        self.history.learn_info(&info);
        for ring in &rings {
            ring.settle_aborts(&recovered);
        }
        for ring in &rings {
            ring.refill(&recovered);
        }

        let vrings: Vec<VringSetup<'_>> = rings.iter().map(|ring| ring.vring()).collect();
        // The previous backend is gone, and the VM may change from here on.
        self.page.invalidate();
        next.start(&self.memory, &vrings, deadline)?;
        self.watch.follow(&next.socket)?;
        let mut connection = lock(&self.connection);
        *connection = Arc::new(next);
        if self.watch.shutdown.was_used() {
            // The frontend was closed in between, and with it the previous connection only.
            connection.close();
        }
        drop(connection);
        self.answered.store(false, Ordering::Release);
        for ring in &rings {
            ring.resume_service();
        }
        self.restart_page();
        Ok(())
    }
}
