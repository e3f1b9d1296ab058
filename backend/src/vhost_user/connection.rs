//! One frontend's connection, from its arrival at a socket to its end.
//!
//! Each connection has a `VhostUserDaemon` of its own, which cannot be used twice; the device and
//! the listening socket are handed from one to the next.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::Error as VhostUserError;
use vhost::vhost_user::Listener as VhostUserListener;
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::vhost_user::Device;
use crate::vhost_user::relay;
use crate::vhost_user::session::Session;
use crate::vhost_user::trap::Trap;

/// Why a frontend's connection cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The process could not get ready to serve it.
    #[error("preparing to serve a frontend failed")]
    Prepare(#[source] io::Error),
    /// The connection could not be accepted.
    #[error("accepting a frontend's connection failed: {0}")]
    Accept(String),
}

impl From<DaemonError> for ConnectError {
    fn from(error: DaemonError) -> Self {
        ConnectError::Accept(error.to_string())
    }
}

/// A listening socket at which frontends arrive.
pub(crate) struct Listener(VhostUserListener);

impl Listener {
    /// A socket at which one frontend arrives, the peer of this connected one, and no other.
    ///
    /// # Errors
    ///
    /// Where the system refuses what relaying its messages needs.
    pub(crate) fn for_peer_of(stream: UnixStream) -> io::Result<Self> {
        relay::listen_for(stream).map(Listener::from)
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Listener(listener.into())
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What is written when a connection, or its worker, ends.
pub(crate) struct Ended {
    pub(crate) connection: EventFd,
    pub(crate) worker: EventFd,
}

/// A session that can be ended, whatever its device.
trait Stoppable: Send + Sync {
    fn stop(&self);
    fn stopping(&self) -> bool;
    fn trap(&self) -> &Trap;
}

impl<D: Device> Stoppable for Session<D> {
    fn stop(&self) {
        Session::stop(self);
    }

    fn stopping(&self) -> bool {
        self.worker.stopping()
    }

    fn trap(&self) -> &Trap {
        &self.trap
    }
}

/// A frontend that is connected.
pub(crate) struct Connection {
    session: Arc<dyn Stoppable>,
    shutdown: Option<ShutdownHandle>,
    thread: JoinHandle<()>,
}

impl Connection {
    /// Accepts the frontend that waits at the socket. The connection's worker polls its rings for
    /// `poll_max` at most before it sleeps.
    ///
    /// # Errors
    ///
    /// [`ConnectError`] where the system refuses what serving needs.
    pub(crate) fn accept<D: Device>(
        device: &Arc<D>,
        listener: &mut Listener,
        ended: &Ended,
        poll_max: Duration,
    ) -> Result<Self, ConnectError> {
        let prepare = ConnectError::Prepare;
        let connection_ended = ended.connection.try_clone().map_err(prepare)?;
        let worker_ended = ended.worker.try_clone().map_err(prepare)?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let session = Session::new(Arc::clone(device), worker_ended, poll_max);
        let session = session.map(Arc::new).map_err(prepare)?;
        let name = "vhost-user".to_owned();
        let mut daemon = VhostUserDaemon::new(name, Arc::clone(&session), memory)?;
        for worker in daemon.get_epoll_handlers() {
            session.attach(&worker).map_err(prepare)?;
        }
        daemon.start(&mut listener.0)?;
        log::info!("A frontend of the {} device connected", D::NAME);
        let shutdown = daemon.shutdown_handle();
        let ending = Arc::clone(&session);
        let thread = std::thread::Builder::new()
            .name("connection".to_owned())
            .spawn(move || {
                match daemon.wait() {
                    Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected)) => {
                        log::info!(
                            "The frontend of the {} device disconnected; the VM is left as it was",
                            D::NAME
                        );
                    }
                    Err(error) => {
                        log::warn!("The connection to the {} device ended: {error}", D::NAME);
                    }
                }
                ending.stop();
                drop(daemon);
                ending.device.disconnected();
                let _ = connection_ended.write(1);
            })
            .map_err(prepare)?;
        Ok(Connection {
            session,
            shutdown,
            thread,
        })
    }

    /// Whether the connection's worker was asked to end.
    pub(crate) fn stopping(&self) -> bool {
        self.session.stopping()
    }

    /// Becomes readable when memory of the frontend's is lost.
    pub(crate) fn memory_lost_fd(&self) -> RawFd {
        self.session.trap().as_fd().as_raw_fd()
    }

    /// Ends the connection where memory of the frontend's is lost; says what was.
    pub(crate) fn end_if_memory_lost(&self) -> Option<impl Display> {
        let lost = self.session.trap().sprung()?;
        self.disconnect();
        self.session.stop();
        Some(lost)
    }

    /// Disconnects the frontend; the connection then ends by itself.
    pub(crate) fn disconnect(&self) {
        if let Some(shutdown) = &self.shutdown {
            shutdown.shutdown();
        }
    }

    /// Ends the connection, whatever it is doing.
    pub(crate) fn close(self) {
        self.disconnect();
        self.session.stop();
        if self.thread.join().is_err() {
            log::error!("The connection's thread panicked");
        }
    }
}
