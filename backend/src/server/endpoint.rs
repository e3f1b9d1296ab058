//! A socket, the device behind it, and the frontend that is connected, one at a time.
//!
//! Each connection has a `VhostUserDaemon` of its own, which cannot be used twice; the device and the
//! listening socket are handed from one to the next.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::Error as VhostUserError;
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::socket::Socket;
use super::{EndpointEvent, Poll, ServerError, Token};
use crate::device::{ClockDevice, ClockSession, Session, TimerDevice, TimerSession};

/// A frontend that is connected.
struct Connection {
    session: Arc<dyn Stoppable>,
    shutdown: Option<ShutdownHandle>,
    thread: JoinHandle<()>,
}

/// A session whose end can be seen to.
trait Stoppable {
    fn stop(&self);
    fn stopping(&self) -> bool;
}

impl<S: Session> Stoppable for S {
    fn stop(&self) {
        Session::stop(self);
    }

    fn stopping(&self) -> bool {
        Session::stopping(self)
    }
}

impl Connection {
    /// Stoppable it, whatever it is doing.
    fn close(self) {
        if let Some(shutdown) = &self.shutdown {
            shutdown.shutdown();
        }
        self.session.stop();
        if self.thread.join().is_err() {
            log::error!("The connection's thread panicked");
        }
    }
}

type Connect = Box<dyn Fn(&mut Socket, &Ended, Duration) -> Result<Connection, ServerError>>;

/// What a connection writes when it, or its worker, comes to an end.
struct Ended {
    connection: EventFd,
    worker: EventFd,
}

/// See the module.
pub struct Endpoint {
    name: &'static str,
    socket: Socket,
    connect: Connect,
    poll_max: Duration,
    connection: Option<Connection>,
    ended: Option<Ended>,
}

impl Endpoint {
    /// The timer device's.
    pub fn timer(device: Arc<TimerDevice>, socket: Socket) -> Self {
        Self::new::<TimerSession>("timer", device, socket)
    }

    /// The clock device's.
    pub fn clock(device: Arc<ClockDevice>, socket: Socket) -> Self {
        Self::new::<ClockSession>("clock", device, socket)
    }

    fn new<S: Session>(name: &'static str, device: Arc<S::Device>, socket: Socket) -> Self {
        Endpoint {
            name,
            socket,
            connect: Box::new(move |socket, ended, poll_max| {
                connect::<S>(name, &device, socket, ended, poll_max)
            }),
            poll_max: Duration::ZERO,
            connection: None,
            ended: None,
        }
    }

    /// Has the worker of a connection look for requests, after the last one, for so long at most before
    /// it sleeps. Without this it does not.
    #[must_use]
    pub fn polling(mut self, max: Duration) -> Self {
        self.poll_max = max;
        self
    }

    /// Lets the loop hear of whatever happens here.
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

    /// Sees to what happened here. True where the port has served its last frontend.
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
                self.connection = Some((self.connect)(&mut self.socket, ended, self.poll_max)?);
            }
            EndpointEvent::WorkerEnded => {
                let _ = ended.worker.read();
                if let Some(connection) = &self.connection
                    && !connection.session.stopping()
                {
                    log::error!(
                        "The frontend of the {} device is disconnected: one of its kick \
                         descriptors cannot be read, or is readable without end",
                        self.name
                    );
                    if let Some(shutdown) = &connection.shutdown {
                        shutdown.shutdown();
                    }
                }
            }
            EndpointEvent::ConnectionEnded => {
                let _ = ended.connection.read();
                if let Some(connection) = self.connection.take() {
                    connection.close();
                }
                // The worker's end belongs to the connection that is gone.
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

/// Takes the frontend that waits at the socket.
fn connect<S: Session>(
    name: &'static str,
    device: &Arc<S::Device>,
    socket: &mut Socket,
    ended: &Ended,
    poll_max: Duration,
) -> Result<Connection, ServerError> {
    let connection_ended = ended.connection.try_clone().map_err(ServerError::Prepare)?;
    let worker_ended = ended.worker.try_clone().map_err(ServerError::Prepare)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let session = S::new(device, memory.clone(), worker_ended, poll_max)
        .map(Arc::new)
        .map_err(ServerError::Prepare)?;
    let thread_name = "vhost-user".to_owned();
    let mut daemon = VhostUserDaemon::new(thread_name, Arc::clone(&session), memory)
        .map_err(ServerError::Connect)?;
    for worker in daemon.get_epoll_handlers() {
        session.attach(&worker).map_err(ServerError::Prepare)?;
    }
    daemon
        .start(socket.listener())
        .map_err(ServerError::Connect)?;
    log::info!("A frontend of the {name} device connected");
    let shutdown = daemon.shutdown_handle();
    let ending = Arc::clone(&session);
    let thread = std::thread::Builder::new()
        .name("connection".to_owned())
        .spawn(move || {
            match daemon.wait() {
                Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected)) => {
                    log::info!(
                        "The frontend of the {name} device disconnected; the VM is left as it was"
                    );
                }
                Err(error) => log::warn!("The connection to the {name} device ended: {error}"),
            }
            Session::stop(&*ending);
            drop(daemon);
            ending.disconnected();
            let _ = connection_ended.write(1);
        })
        .map_err(ServerError::Prepare)?;
    Ok(Connection {
        session,
        shutdown,
        thread,
    })
}
