//! A socket, the device behind it, and the frontend that is connected, one at a time.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{ClockDevice, GuestTime, TimerDevice};
use crate::server::arrivals::{Arrival, Reserve};
use crate::server::poll::{EndpointEvent, Poll, Token};
use crate::server::{ServerError, Socket};
use crate::vhost_user::{Connection, Device};

/// How long a listener rests that cannot accept.
const REST: Duration = Duration::from_millis(100);

type Serve = Box<dyn Fn(UnixStream, u64, &Arc<EventFd>, Duration) -> io::Result<Connection>>;

/// See the module.
pub struct Endpoint {
    name: &'static str,
    socket: Socket,
    serve: Serve,
    poll_max: Duration,
    reserve: Reserve,
    connection: Option<Connection>,
    /// How many connections there were.
    connections: u64,
    /// Written when the connection has ended.
    ended: Option<Arc<EventFd>>,
    /// When the listener is tried again.
    resting_until: Option<Instant>,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} device on {}", self.name, self.socket)
    }
}

impl Endpoint {
    /// The timer device's endpoint.
    pub fn timer(device: Arc<TimerDevice>, socket: Socket) -> Self {
        Self::new(device, socket)
    }

    /// The clock device's endpoint.
    pub fn clock<G: GuestTime>(device: Arc<ClockDevice<G>>, socket: Socket) -> Self {
        Self::new(device, socket)
    }

    fn new<D: Device>(device: Arc<D>, socket: Socket) -> Self {
        Endpoint {
            name: D::NAME,
            socket,
            serve: Box::new(move |frontend, number, ended, poll_max| {
                Connection::serve(&device, frontend, number, ended, poll_max)
            }),
            poll_max: Duration::ZERO,
            reserve: Reserve::new(),
            connection: None,
            connections: 0,
            ended: None,
            resting_until: None,
        }
    }

    /// Has a connection's worker poll its rings for up to this long before it sleeps. Without this
    /// it does not poll.
    #[must_use]
    pub fn polling(mut self, max: Duration) -> Self {
        self.poll_max = max;
        self
    }

    /// Registers this endpoint's events with the loop. A frontend that is connected already is
    /// served from now on.
    pub(super) fn register(&mut self, poll: &Poll, index: usize) -> io::Result<()> {
        let ended = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let token = Token::Endpoint(EndpointEvent::ConnectionEnded, index);
        poll.add(ended.as_raw_fd(), token)?;
        self.ended = Some(ended);
        log::info!("Ready for a frontend of the {self}");
        match self.socket.take_connected() {
            Some(frontend) => {
                self.connect(frontend);
                Ok(())
            }
            None => self.listen(poll, index),
        }
    }

    /// The device's name, where a frontend is connected.
    pub(super) fn connected(&self) -> Option<&'static str> {
        self.connection.as_ref().map(|_| self.name)
    }

    /// Whether the first frontend is the last.
    pub(super) fn is_for_one_frontend(&self) -> bool {
        self.socket.is_for_one_frontend()
    }

    /// When [`wake_up`](Self::wake_up) is to be called.
    pub(super) fn resting_until(&self) -> Option<Instant> {
        self.resting_until
    }

    /// Tries the listener again, where it rested until now.
    pub(super) fn wake_up(&mut self, poll: &Poll, index: usize) -> Result<(), ServerError> {
        if self
            .resting_until
            .is_some_and(|until| until <= Instant::now())
        {
            self.resting_until = None;
            self.listen(poll, index).map_err(ServerError::Wait)?;
        }
        Ok(())
    }

    /// Handles an event. True where a frontend has left that was one: it has sent a message, or was
    /// the only one that can be. A process that only tries whether somebody listens is none.
    pub(super) fn handle(
        &mut self,
        event: EndpointEvent,
        poll: &Poll,
        index: usize,
    ) -> Result<bool, ServerError> {
        match event {
            EndpointEvent::Frontend => self.arrived(poll)?,
            EndpointEvent::ConnectionEnded => {
                if let Some(ended) = &self.ended {
                    let _ = ended.read();
                }
                let spoke = self.connection.take().is_some_and(Connection::join);
                if self.is_for_one_frontend() {
                    return Ok(true);
                }
                self.listen(poll, index).map_err(ServerError::Wait)?;
                return Ok(spoke);
            }
        }
        Ok(false)
    }

    fn listen(&self, poll: &Poll, index: usize) -> io::Result<()> {
        let Some(listener) = self.socket.listener() else {
            return Ok(());
        };
        let token = Token::Endpoint(EndpointEvent::Frontend, index);
        poll.add(listener.as_raw_fd(), token)
    }

    /// Accepts the frontend that waits. Whatever that costs is the frontend's.
    fn arrived(&mut self, poll: &Poll) -> Result<(), ServerError> {
        let Some(listener) = self.socket.listener() else {
            return Ok(());
        };
        let turned_away = |error| {
            log::error!(
                "A frontend of the {} device was turned away: accepting it failed: {error}; raise \
                 the limit of open files, or lower what else uses them",
                self.name
            );
        };
        match self.reserve.accept(listener) {
            Arrival::Nobody => {}
            Arrival::TurnedAway(error) => turned_away(error),
            Arrival::NotNow(error) => {
                log::error!(
                    "A frontend of the {} device waits: accepting it failed: {error}; it is tried \
                     again every {} ms",
                    self.name,
                    REST.as_millis()
                );
                poll.remove(listener.as_raw_fd())
                    .map_err(ServerError::Wait)?;
                self.resting_until = Some(Instant::now() + REST);
            }
            Arrival::Frontend(frontend) if !self.admits(&frontend) => {}
            Arrival::Frontend(frontend) => {
                // The next one waits in the listening socket's queue until this one is gone.
                poll.remove(listener.as_raw_fd())
                    .map_err(ServerError::Wait)?;
                self.connect(frontend);
            }
        }
        Ok(())
    }

    /// Whether a frontend is served. One that is not is disconnected by the caller.
    fn admits(&self, frontend: &UnixStream) -> bool {
        let why = match self.socket.admit(frontend) {
            Ok(Ok(())) => return true,
            Ok(Err(stranger)) => stranger.to_string(),
            Err(error) => format!("asking for its user failed: {error}"),
        };
        log::warn!(
            "A frontend of the {} device was turned away: {why}",
            self.name
        );
        false
    }

    /// Serves a frontend. Where there is no thread for that, its connection has ended.
    fn connect(&mut self, frontend: UnixStream) {
        let Some(ended) = &self.ended else { return };
        self.connections += 1;
        match (self.serve)(frontend, self.connections, ended, self.poll_max) {
            Ok(connection) => self.connection = Some(connection),
            Err(error) => {
                log::error!(
                    "A frontend of the {} device was turned away: starting a thread for it failed: \
                     {error}; raise the limit of threads, or lower what else uses them",
                    self.name
                );
                let _ = ended.write(1);
            }
        }
    }
}
