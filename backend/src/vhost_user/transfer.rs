//! A device state on its way through a pipe: VHOST_USER_SET_DEVICE_STATE_FD.
//!
//! The pipe's other end may take its time: a thread waits for it, and the request thread never
//! does. A state that was read is loaded only by CHECK_DEVICE_STATE, when it is known to be whole.
//!
//! A connection has one such thread at most. It ends whatever the frontend makes of the pipe: it
//! waits for the end of the transfer as well, reads and writes without blocking, and is interrupted
//! where the kernel cannot do that.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use vhost::vhost_user::message::VhostTransferStateDirection;
use vhost_user_timer_protocol::MAX_STREAM;

use crate::logging::Peer;
use crate::sys::{lock, read_now, set_nonblocking, with_causes, write_now};
use crate::vhost_user::StateError;
use crate::vhost_user::interrupt::Threads;

/// What failed, in the log.
const SAVING: &str = "Saving the device state";
const LOADING: &str = "Loading the device state";

/// How long CHECK_DEVICE_STATE waits for a transfer whose other end should be done with it: QEMU
/// has then read to the end, or closed what it wrote to.
const PATIENCE: Duration = Duration::from_secs(5);

/// How much is read at once: what a pipe holds.
const PIECE: usize = 64 * 1024;

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
enum TransferError {
    #[error("the frontend has not read or written the whole state after {} s", PATIENCE.as_secs())]
    Unfinished,
    #[error("the frontend's pipe failed")]
    Pipe(#[source] io::Error),
}

/// The transfers of one connection, one at a time.
pub(super) struct Transfers {
    peer: Peer,
    current: Mutex<Option<Transfer>>,
    stop: Arc<Cancel>,
    threads: Threads,
}

impl Transfers {
    pub(super) fn new(peer: Peer) -> io::Result<Self> {
        Ok(Transfers {
            peer,
            current: Mutex::new(None),
            stop: Arc::new(Cancel::new()?),
            threads: Threads::new()?,
        })
    }

    /// Ends every transfer, now and from now on.
    pub(super) fn cancel(&self) {
        self.stop.cancel();
        self.threads.end();
    }

    /// SET_DEVICE_STATE_FD. A save sends the stream that `save` makes now; a load takes nothing in
    /// before CHECK_DEVICE_STATE. Either replaces a transfer that is under way.
    pub(super) fn start(
        &self,
        direction: VhostTransferStateDirection,
        file: File,
        save: impl FnOnce() -> Result<Vec<u8>, StateError>,
    ) -> io::Result<()> {
        let stream = match direction {
            VhostTransferStateDirection::SAVE => Some(save().map_err(refuse(SAVING))?),
            VhostTransferStateDirection::LOAD => None,
        };
        let mut current = lock(&self.current);
        // Its thread ends here.
        *current = None;
        let transfer = match stream {
            Some(stream) => Transfer::save(file, stream, self),
            None => Transfer::load(file, self),
        };
        *current = Some(transfer.map_err(refuse("Starting the device state's transfer"))?);
        Ok(())
    }

    /// CHECK_DEVICE_STATE: waits for the end of the transfer. What was read goes to `load`.
    pub(super) fn finish(
        &self,
        load: impl FnOnce(&[u8]) -> Result<(), StateError>,
    ) -> io::Result<()> {
        let Some(transfer) = lock(&self.current).take() else {
            return Err(refuse("Checking the device state")(
                "no transfer was started",
            ));
        };
        if transfer.loads {
            load(&transfer.finish().map_err(refuse(LOADING))?).map_err(refuse(LOADING))
        } else {
            let saved = transfer.finish();
            saved.map(drop).map_err(refuse(SAVING))
        }
    }
}

/// A transfer that is under way. Dropping it ends it.
#[derive(Debug)]
struct Transfer {
    /// What was read; nothing for a save.
    outcome: Receiver<io::Result<Vec<u8>>>,
    cancel: Arc<Cancel>,
    loads: bool,
    /// This thread alone.
    threads: Threads,
    thread: Option<JoinHandle<()>>,
}

/// Stoppable transfers from another thread.
#[derive(Debug)]
struct Cancel(OwnedFd);

impl Cancel {
    fn new() -> io::Result<Self> {
        Ok(Cancel(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Every wait ends, now and from now on.
    fn cancel(&self) {
        // Fails only where the counter is full, and then it is readable as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.threads.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("The thread of a device state's transfer panicked");
        }
    }
}

impl Transfer {
    /// Writes the stream.
    fn save(file: File, stream: Vec<u8>, all: &Transfers) -> io::Result<Self> {
        Self::start("device-state-save", false, all, move |cancel| {
            write_all(&file, &stream, cancel).map(|()| Vec::new())
        })
    }

    /// Reads a stream, to its end.
    fn load(file: File, all: &Transfers) -> io::Result<Self> {
        Self::start("device-state-load", true, all, move |cancel| {
            read_all(&file, cancel)
        })
    }

    fn start(
        name: &str,
        loads: bool,
        all: &Transfers,
        work: impl FnOnce(&[Arc<Cancel>; 2]) -> io::Result<Vec<u8>> + Send + 'static,
    ) -> io::Result<Self> {
        let cancel = Arc::new(Cancel::new()?);
        let canceled = [Arc::clone(&cancel), Arc::clone(&all.stop)];
        let (peer, threads) = (all.peer, all.threads.clone());
        let (sender, outcome) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                peer.owns_thread();
                // Before it looks whether it is to end.
                threads.register();
                // Nobody receives where the transfer was dropped.
                let _ = sender.send(work(&canceled));
            })?;
        Ok(Transfer {
            outcome,
            cancel,
            loads,
            threads: all.threads.clone(),
            thread: Some(thread),
        })
    }

    /// What was read, once it is done.
    fn finish(self) -> Result<Vec<u8>, TransferError> {
        match self.outcome.recv_timeout(PATIENCE) {
            Ok(outcome) => outcome.map_err(TransferError::Pipe),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(TransferError::Unfinished)
            }
        }
    }
}

/// Waits until the file is ready, or the transfer is canceled.
fn wait(file: &File, ready: PollFlags, [cancel, stop]: &[Arc<Cancel>; 2]) -> io::Result<()> {
    let mut fds = [
        PollFd::new(file, ready),
        PollFd::new(&cancel.0, PollFlags::IN),
        PollFd::new(&stop.0, PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) if fds[1..].iter().any(|fd| !fd.revents().is_empty()) => {
                return Err(io::Error::new(
                    ErrorKind::TimedOut,
                    "the transfer was canceled",
                ));
            }
            Ok(_) => return Ok(()),
        }
    }
}

fn write_all(file: &File, mut bytes: &[u8], cancel: &[Arc<Cancel>; 2]) -> io::Result<()> {
    set_nonblocking(file)?;
    while !bytes.is_empty() {
        wait(file, PollFlags::OUT, cancel)?;
        match write_now(file, bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads to the end, and one byte past the longest stream at most.
fn read_all(file: &File, cancel: &[Arc<Cancel>; 2]) -> io::Result<Vec<u8>> {
    set_nonblocking(file)?;
    let mut bytes = Vec::new();
    let mut piece = vec![0; PIECE];
    loop {
        wait(file, PollFlags::IN, cancel)?;
        let room = (MAX_STREAM + 1).saturating_sub(bytes.len()).min(PIECE);
        match read_now(file, piece.get_mut(..room).unwrap_or_default()) {
            // The end, or more than any stream has: the decoder refuses that.
            Ok(0) => return Ok(bytes),
            Ok(read) => bytes.extend_from_slice(piece.get(..read).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Logs why a control message is refused: the frontend only learns that it was.
fn refuse<E: Into<StateError>>(what: &str) -> impl FnOnce(E) -> io::Error {
    move |error| {
        let text = with_causes(&*error.into());
        log::error!("{what} failed: {text}");
        io::Error::other(text)
    }
}
