//! One frontend's connection, from its arrival at a socket to its end.
//!
//! It has three threads. `connection` makes the other two and stands at the door ([`Door`]). The
//! crate's request thread carries out what the door lets in; the crate's worker serves the rings.
//! Whatever ends the connection, `connection` ends the other two, and nothing of it reaches the
//! server but [`Connection`]'s end.
//!
//! Each connection has a `VhostUserDaemon` of its own, which cannot be used twice.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::process::{Resource, getrlimit};
use vhost::vhost_user::Error as VhostUserError;
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::logging::Peer;
use crate::sys::{peer_credentials, with_causes};
use crate::vhost_user::Device;
use crate::vhost_user::door::{
    AFTERMATH, Door, End, Limits, MESSAGE, inner_connection, region_limit,
};
use crate::vhost_user::session::Session;

/// How often threads that have not ended are interrupted again.
const AGAIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};

/// Why a frontend that arrived is not served.
#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("the system refuses what serving it needs")]
    Prepare(#[source] io::Error),
    #[error("{0}")]
    Daemon(String),
}

impl From<DaemonError> for ConnectError {
    fn from(error: DaemonError) -> Self {
        ConnectError::Daemon(error.to_string())
    }
}

/// A frontend that is connected.
pub(crate) struct Connection(JoinHandle<bool>);

impl Connection {
    /// Serves a frontend, the `number`th at its socket. `ended` is written when the connection has
    /// ended, for whatever reason. The connection's worker polls its rings for `poll_max` at most
    /// before it sleeps.
    ///
    /// # Errors
    ///
    /// Where there is no thread for it. The frontend is then disconnected.
    pub(crate) fn serve<D: Device>(
        device: &Arc<D>,
        frontend: UnixStream,
        number: u64,
        ended: &Arc<EventFd>,
        poll_max: Duration,
    ) -> io::Result<Self> {
        let (device, ended) = (Arc::clone(device), Arc::clone(ended));
        let thread = std::thread::Builder::new().name("connection".to_owned());
        let thread = thread.spawn(move || {
            let peer = Peer::new(D::NAME, number);
            peer.owns_thread();
            let served = serve(&device, &frontend, peer, poll_max);
            let spoke = served.unwrap_or_else(|error| {
                log::error!(
                    "A frontend of the {} device was turned away: {}; raise the limits of open \
                     files and threads, or lower what else uses them",
                    D::NAME,
                    with_causes(&error)
                );
                false
            });
            drop(frontend);
            // Fails only where the counter is full, and then it is readable as well.
            let _ = ended.write(1);
            spoke
        })?;
        Ok(Connection(thread))
    }

    /// Waits for the thread of a connection that has ended. Returns whether the frontend has sent
    /// a message.
    pub(crate) fn join(self) -> bool {
        self.0.join().unwrap_or_else(|_| {
            log::error!("The connection's thread panicked");
            false
        })
    }
}

/// Serves a frontend until its end, and returns whether it has sent a message. What was made when
/// something fails is dropped, and ends by that.
fn serve<D: Device>(
    device: &Arc<D>,
    frontend: &UnixStream,
    peer: Peer,
    poll_max: Duration,
) -> Result<bool, ConnectError> {
    let prepare = ConnectError::Prepare;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let session = Session::new(Arc::clone(device), peer, poll_max);
    let session = session.map(Arc::new).map_err(prepare)?;
    let (inner, mut listener) = inner_connection().map_err(prepare)?;
    let name = "vhost-user".to_owned();
    let mut daemon = VhostUserDaemon::new(name, Arc::clone(&session), memory)?;
    for worker in daemon.get_epoll_handlers() {
        session.attach(&worker).map_err(prepare)?;
    }
    daemon.start(&mut listener)?;
    drop(listener);
    let whose = match peer_credentials(frontend) {
        Ok(peer) => format!(": process {} of uid {}", peer.pid(), peer.uid()),
        Err(_) => String::new(),
    };
    log::info!("A frontend of the {} device connected{whose}", D::NAME);

    let limits = Limits {
        regions: most_regions(),
        queue_size: D::MAX_QUEUE_SIZE,
        queues: session.device.queues(),
        message: MESSAGE,
        aftermath: AFTERMATH,
    };
    let mut door = Door::new(frontend, &inner, &*session, limits);
    let end = door.stand();
    if end == End::Frontend {
        // Whatever the frontend sent is carried out, as it would be if it had waited for that.
        let _ = inner.shutdown(Shutdown::Write);
        wait_for_end(&inner, AFTERMATH);
    }
    session.stop();
    let _ = inner.shutdown(Shutdown::Write);
    while !has_ended(&inner, AGAIN) {
        session.threads.interrupt();
    }
    let served = daemon.wait();
    match end {
        End::Refused(why) => {
            log::error!(
                "The frontend of the {} device is disconnected: {why}",
                D::NAME
            );
        }
        End::Frontend => disconnected::<D>(),
        End::Backend => match served {
            Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected)) => {
                disconnected::<D>();
            }
            Err(error) => log::warn!(
                "The connection to the {} device ended on {}: {error}",
                D::NAME,
                door.last_message()
            ),
        },
    }
    let _ = frontend.shutdown(Shutdown::Both);
    session.threads.end();
    drop(daemon);
    session.device.disconnected();
    Ok(door.has_heard())
}

fn disconnected<D: Device>() {
    log::info!(
        "The frontend of the {} device disconnected; the VM is left as it was",
        D::NAME
    );
}

/// How many memory regions a frontend may share: the limit of open files has room for those of both
/// devices.
fn most_regions() -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    region_limit(files, 2).try_into().unwrap_or(usize::MAX)
}

/// Waits for the end of the request thread, and says whether it is there.
fn has_ended(inner: &UnixStream, at_most: Timespec) -> bool {
    let _ = poll(&mut [PollFd::new(inner, PollFlags::IN)], Some(&at_most));
    loop {
        // Replies that nobody waits for.
        match recv(inner, &mut [0; 64], RecvFlags::DONTWAIT) {
            Ok((_, 1..)) | Err(Errno::INTR) => {}
            Ok(_) => return true,
            Err(error) => return error != Errno::AGAIN,
        }
    }
}

fn wait_for_end(inner: &UnixStream, at_most: Duration) {
    let deadline = Instant::now() + at_most;
    while !has_ended(inner, AGAIN) && Instant::now() < deadline {}
}
