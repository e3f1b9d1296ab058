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

use super::connection::{self, Connection, Negotiated, Vring};
use super::error::Failure;
use super::events::EventQueue;
use super::memory::SharedMemory;
use super::queue::Shared;
use super::repeat::{Found, History};
use super::wait::{Deadline, Link, ShutdownHandle};
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
    pub(super) link: Link,
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
    gate: Mutex<Gate>,
    /// The gate has changed.
    changed: Condvar,
}

/// Where threads meet that have lost the connection.
#[derive(Default)]
struct Gate {
    /// One of them is at work.
    busy: bool,
    outage: Option<Outage>,
    /// What the last outage left.
    left: Option<Left>,
    failure: Option<Failure>,
}

/// Patience, and the delay before the next attempt.
type Left = (Option<Duration>, Duration);

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
struct Turn<'a>(&'a Session);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.gate().busy = false;
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
            link: Link::new(&connection.socket, shutdown)?,
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
            gate: Mutex::default(),
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

    /// Numbers the present connection. To be read before the link is looked at.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn connection(&self) -> Arc<Connection> {
        let connection = self.connection.lock();
        connection.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut gate = self.gate();
        loop {
            if self.link.shutdown.was_used() {
                gate.failure.get_or_insert(Failure::ShutDown);
            }
            if let Some(failure) = gate.failure {
                return Err(Stopped::Failed(failure));
            }
            if self.generation() != lost {
                return Ok(());
            }
            let outage = match gate.outage {
                Some(outage) => outage,
                None => {
                    let outage = self.outage(gate.left.take(), policy);
                    *gate.outage.insert(outage)
                }
            };
            if !gate.busy && outage.until.has_passed() {
                gate.failure = Some(Failure::Disconnected);
                self.changed.notify_all();
                continue;
            }
            if deadline.has_passed() {
                return Err(Stopped::Late);
            }
            if gate.busy {
                gate = self.wait_for_change(gate, deadline);
                continue;
            }
            gate.busy = true;
            drop(gate);
            let turn = Turn(self);
            let tried = self.take_turn(connector, outage, deadline);
            gate = self.gate();
            match tried {
                // It was not due yet.
                None => {}
                Some(Ok(())) => {
                    gate.left = Some((outage.until.remaining(), outage.delay));
                    gate.outage = None;
                    self.generation.fetch_add(1, Ordering::AcqRel);
                }
                Some(Err(error)) => {
                    gate.failure = Failure::for_good(&error);
                    gate.outage = Some(Outage {
                        next: Instant::now() + outage.delay,
                        delay: (outage.delay * 2).min(policy.max_delay),
                        ..outage
                    });
                }
            }
            drop(gate);
            drop(turn);
            gate = self.gate();
        }
    }

    fn wait_for_change<'a>(
        &self,
        gate: MutexGuard<'a, Gate>,
        deadline: Deadline,
    ) -> MutexGuard<'a, Gate> {
        match deadline.remaining() {
            Some(left) => {
                let woken = self.changed.wait_timeout(gate, left);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                let woken = self.changed.wait(gate);
                woken.unwrap_or_else(PoisonError::into_inner)
            }
        }
    }

    /// The connection was lost just now. If nothing was answered on it, the outage before goes on: a
    /// backend that falls over what it is asked must not be asked for ever.
    fn outage(&self, left: Option<Left>, policy: &Reconnect) -> Outage {
        for queue in self.queues() {
            queue.go_down();
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
    fn take_turn(
        &self,
        connector: &Connector,
        outage: Outage,
        deadline: Deadline,
    ) -> Option<Result<(), Error>> {
        let deadline = deadline.or(outage.until);
        if let Err(error) = self.link.shutdown.wait(deadline.or(outage.next)) {
            return Some(Err(error));
        }
        if self.link.shutdown.was_used() || deadline.has_passed() {
            return None;
        }
        Some(self.attempt(connector, deadline.or(self.timeout)))
    }

    /// Makes those who wait look again, on every queue.
    pub(super) fn look_again(&self) {
        for queue in self.queues() {
            queue.look_again();
        }
    }

    /// Asks for the time page again after a reset.
    pub(super) fn page_again(&self) {
        self.page.start_again(&self.queues().collect::<Vec<_>>());
    }

    fn queues(&self) -> impl Iterator<Item = Arc<Shared>> {
        let queues = self.rings.get().map_or(&[][..], |rings| &rings.queues);
        queues.iter().filter_map(Weak::upgrade)
    }

    fn attempt(&self, connector: &Connector, deadline: Deadline) -> Result<(), Error> {
        let socket = connector.connect(deadline.or(CONNECT))?;
        let next = Connection::new(socket, self.link.shutdown.clone())?;
        // Once that is answered, nobody is left who serves the old connection.
        next.negotiate(Some(&self.negotiated), deadline)?;
        let info = next.config(deadline)?;
        let mut found = Found {
            phase: info.phase,
            epoch: info.epoch,
            begins: 0,
            dones: 0,
        };
        let events = self.rings.get().and_then(|rings| rings.events.upgrade());
        let (Some(events), queues) = (events, self.queues().collect::<Vec<_>>()) else {
            return Err(Error::ShutDown);
        };
        for queue in &queues {
            queue.survey(&mut found);
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

        let vrings: Vec<Vring<'_>> = std::iter::once(events.vring())
            .chain(queues.iter().map(|queue| queue.vring()))
            .collect();
        // The former backend is gone, and the VM may change from here on.
        self.page.invalidate();
        next.start(&self.memory, &vrings, deadline)?;
        self.link.follow(&next.socket)?;
        let mut connection = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *connection = Arc::new(next);
        if self.link.shutdown.was_used() {
            // Whoever closed the frontend closed the connection before.
            connection.close();
        }
        drop(connection);
        self.answered.store(false, Ordering::Release);
        for queue in &queues {
            queue.go_on();
        }
        events.go_on();
        self.page.start_again(&queues);
        Ok(())
    }
}
