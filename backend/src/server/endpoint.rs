//! A socket, the device behind it, and the frontend that is connected, one at a time.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{ClockDevice, GuestTime, TimerDevice};
use crate::server::poll::{EndpointEvent, Poll, Token};
use crate::server::{ServerError, Socket};
use crate::vhost_user::{ConnectError, Connection, Device, Ended, Listener};

type Accept = Box<dyn Fn(&mut Listener, &Ended, Duration) -> Result<Connection, ConnectError>>;

/// See the module.
pub struct Endpoint {
    name: &'static str,
    socket: Socket,
    accept: Accept,
    poll_max: Duration,
    connection: Option<Connection>,
    ended: Option<Ended>,
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
            accept: Box::new(move |listener, ended, poll_max| {
                Connection::accept(&device, listener, ended, poll_max)
            }),
            poll_max: Duration::ZERO,
            connection: None,
            ended: None,
        }
    }

    /// Has a connection's worker poll its rings for up to this long before it sleeps. Without this
    /// it does not poll.
    #[must_use]
    pub fn polling(mut self, max: Duration) -> Self {
        self.poll_max = max;
        self
    }

    /// Registers this endpoint's events with the loop.
    pub(super) fn register(&mut self, poll: &Poll, index: usize) -> io::Result<()> {
        let ended = Ended {
            connection: EventFd::new(EFD_NONBLOCK)?,
            worker: EventFd::new(EFD_NONBLOCK)?,
        };
        for (fd, event) in [
            (ended.connection.as_raw_fd(), EndpointEvent::ConnectionEnded),
            (ended.worker.as_raw_fd(), EndpointEvent::WorkerEnded),
            (self.listener(), EndpointEvent::Frontend),
        ] {
            poll.add(fd, Token::Endpoint(event, index))?;
        }
        self.ended = Some(ended);
        log::info!(
            "Ready for a frontend of the {} device on {}",
            self.name,
            self.socket
        );
        Ok(())
    }

    fn listener(&mut self) -> RawFd {
        self.socket.listener().as_raw_fd()
    }

    /// Whether the first frontend is the last.
    pub(super) fn is_for_one_frontend(&self) -> bool {
        self.socket.is_for_one_frontend()
    }

    /// Handles an event. True where the endpoint has served its last frontend.
    pub(super) fn handle(
        &mut self,
        event: EndpointEvent,
        poll: &Poll,
        index: usize,
    ) -> Result<bool, ServerError> {
        let Some(ended) = &self.ended else {
            return Ok(false);
        };
        match event {
            EndpointEvent::Frontend => {
                // The next one waits in the listening socket's queue until this one is gone.
                poll.remove(self.socket.listener().as_raw_fd())
                    .map_err(ServerError::Wait)?;
                let listener = self.socket.listener();
                let connection = (self.accept)(listener, ended, self.poll_max)?;
                let lost = Token::Endpoint(EndpointEvent::MemoryLost, index);
                poll.add(connection.memory_lost_fd(), lost)
                    .map_err(ServerError::Wait)?;
                self.connection = Some(connection);
            }
            EndpointEvent::MemoryLost => {
                if let Some(connection) = &self.connection
                    && let Some(lost) = connection.end_if_memory_lost()
                {
                    poll.remove(connection.memory_lost_fd())
                        .map_err(ServerError::Wait)?;
                    log::error!(
                        "The frontend of the {} device is disconnected: {lost}",
                        self.name
                    );
                }
            }
            EndpointEvent::WorkerEnded => {
                let _ = ended.worker.read();
                if let Some(connection) = &self.connection
                    && !connection.stopping()
                {
                    log::error!(
                        "The frontend of the {} device is disconnected: one of its kick \
                         descriptors cannot be read, or is always readable",
                        self.name
                    );
                    connection.disconnect();
                }
            }
            EndpointEvent::ConnectionEnded => {
                let _ = ended.connection.read();
                if let Some(connection) = self.connection.take() {
                    connection.close();
                }
                // The worker ended with the connection.
                let _ = ended.worker.read();
                if self.is_for_one_frontend() {
                    return Ok(true);
                }
                poll.add(
                    self.listener(),
                    Token::Endpoint(EndpointEvent::Frontend, index),
                )
                .map_err(ServerError::Wait)?;
            }
        }
        Ok(false)
    }
}
