//! Accepts frontends, one at a time, until a signal ends the process.
//!
//! The loop waits, with `epoll`, for a frontend, for the end of its connection, and for
//! SIGTERM and SIGINT. Each connection has a `VhostUserDaemon` of its own, which cannot be used
//! twice; the VM and the listening socket are handed from one to the next.

mod poll;
mod relay;
mod socket;

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use signal_hook::consts::{SIGINT, SIGTERM};
use vhost::vhost_user::Error as VhostUserError;
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Session, TimerDevice};
use poll::Poll;
pub use socket::{Socket, SocketError};

/// Why serving came to an end that nobody asked for.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The process could not get ready to serve.
    #[error("Preparing to serve failed")]
    Prepare(#[source] io::Error),
    /// A frontend's connection could not be taken.
    #[error("Taking a frontend's connection failed: {0}")]
    Connect(DaemonError),
    /// Waiting for frontends failed.
    #[error("Waiting for frontends failed")]
    Wait(#[source] io::Error),
}

/// What the loop waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Signal,
    Frontend,
    ConnectionEnded,
    WorkerEnded,
}

/// A frontend that is connected.
struct Connection {
    session: Arc<Session>,
    shutdown: Option<ShutdownHandle>,
    thread: JoinHandle<()>,
}

impl Connection {
    /// Ends it, whatever it is doing.
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

/// Serves the device on the socket until SIGTERM or SIGINT, or, on a socket that came
/// connected, until its frontend disconnects.
///
/// # Errors
///
/// [`ServerError`] where the system refuses what serving needs. What a frontend does is never
/// an error here: its connection ends, and the next one is served.
pub fn serve(device: Arc<TimerDevice>, mut socket: Socket) -> Result<(), ServerError> {
    let prepare = ServerError::Prepare;
    let poll = Poll::new().map_err(prepare)?;
    let (signals, signals_in) = UnixStream::pair().map_err(prepare)?;
    for signal in [SIGTERM, SIGINT] {
        let write_end = signals_in.try_clone().map_err(prepare)?;
        signal_hook::low_level::pipe::register(signal, write_end).map_err(prepare)?;
    }
    let connection_ended = EventFd::new(EFD_NONBLOCK).map_err(prepare)?;
    let worker_ended = EventFd::new(EFD_NONBLOCK).map_err(prepare)?;
    let listener_fd = socket.listener().as_raw_fd();
    poll.add(signals.as_raw_fd(), Token::Signal)
        .map_err(prepare)?;
    poll.add(connection_ended.as_raw_fd(), Token::ConnectionEnded)
        .map_err(prepare)?;
    poll.add(worker_ended.as_raw_fd(), Token::WorkerEnded)
        .map_err(prepare)?;
    poll.add(listener_fd, Token::Frontend).map_err(prepare)?;
    log::info!("Ready for a frontend on {socket}");

    let mut connection: Option<Connection> = None;
    loop {
        match poll.wait().map_err(ServerError::Wait)? {
            Token::Signal => {
                log::info!("Ending on a signal");
                break;
            }
            Token::Frontend => {
                // The next one waits in the listening socket's queue until this one is gone.
                poll.remove(listener_fd).map_err(ServerError::Wait)?;
                let ended = [&connection_ended, &worker_ended].map(EventFd::try_clone);
                let [Ok(connection_ended), Ok(worker_ended)] = ended else {
                    return Err(ServerError::Wait(io::Error::last_os_error()));
                };
                connection = Some(connect(
                    &device,
                    &mut socket,
                    connection_ended,
                    worker_ended,
                )?);
            }
            Token::WorkerEnded => {
                let _ = worker_ended.read();
                if let Some(connection) = &connection
                    && !connection.session.stopping()
                {
                    log::error!(
                        "The frontend is disconnected: one of its kick descriptors cannot be \
                         read, or is readable without end"
                    );
                    if let Some(shutdown) = &connection.shutdown {
                        shutdown.shutdown();
                    }
                }
            }
            Token::ConnectionEnded => {
                let _ = connection_ended.read();
                if let Some(connection) = connection.take() {
                    connection.close();
                }
                // The worker's end belongs to the connection that is gone.
                let _ = worker_ended.read();
                if socket.is_for_one_frontend() {
                    log::info!("Ending, since the socket was for one frontend");
                    break;
                }
                poll.add(listener_fd, Token::Frontend)
                    .map_err(ServerError::Wait)?;
            }
        }
    }
    // On a signal a frontend may be connected still. It is not waited for: it could hold the
    // worker up, and the end of the process ends that too.
    Ok(())
}

/// Takes the frontend that waits at the socket.
fn connect(
    device: &Arc<TimerDevice>,
    socket: &mut Socket,
    connection_ended: EventFd,
    worker_ended: EventFd,
) -> Result<Connection, ServerError> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let session = Session::new(Arc::clone(device), memory.clone(), worker_ended)
        .map(Arc::new)
        .map_err(ServerError::Prepare)?;
    let name = "vhost-user".to_owned();
    let mut daemon =
        VhostUserDaemon::new(name, Arc::clone(&session), memory).map_err(ServerError::Connect)?;
    for worker in daemon.get_epoll_handlers() {
        session.attach(&worker).map_err(ServerError::Prepare)?;
    }
    daemon
        .start(socket.listener())
        .map_err(ServerError::Connect)?;
    log::info!("A frontend connected");
    let shutdown = daemon.shutdown_handle();
    let ending = Arc::clone(&session);
    let thread = std::thread::Builder::new()
        .name("connection".to_owned())
        .spawn(move || {
            match daemon.wait() {
                Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected)) => {
                    log::info!("The frontend disconnected; the VM is left as it was");
                }
                Err(error) => log::warn!("The frontend's connection ended: {error}"),
            }
            ending.stop();
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
