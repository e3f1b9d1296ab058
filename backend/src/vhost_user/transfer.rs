//! A VM on its way through a pipe: VHOST_USER_SET_DEVICE_STATE_FD.
//!
//! The pipe's other end is in no hurry: a thread waits for it, and the request thread never does. What is
//! read is applied only by CHECK_DEVICE_STATE, when it is known to be whole.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::state::stream::MAX_STREAM;

/// How long CHECK_DEVICE_STATE waits for a transfer whose other end should be done with it: QEMU has
/// then read to the end, or closed what it wrote to.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    #[error("The frontend has not read or written it all after {} s", PATIENCE.as_secs())]
    Unfinished,
    #[error("The frontend's pipe failed")]
    Pipe(#[source] io::Error),
}

/// A transfer that is under way. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Transfer {
    /// What was read; nothing, for a save.
    outcome: Receiver<io::Result<Vec<u8>>>,
    cancel: Arc<Cancel>,
    pub(crate) loads: bool,
}

/// Stoppable transfers from another thread.
#[derive(Debug)]
pub(crate) struct Cancel(OwnedFd);

impl Cancel {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Cancel(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Every wait ends, now and from now on.
    pub(crate) fn cancel(&self) {
        // It fails only where the counter is full, and then it is readable as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Transfer {
    /// Writes the stream.
    pub(crate) fn save(file: File, stream: Vec<u8>, stop: &Arc<Cancel>) -> io::Result<Self> {
        Self::start("device-state-save", false, stop, move |cancel| {
            write_all(&file, &stream, cancel).map(|()| Vec::new())
        })
    }

    /// Reads a stream, to its end.
    pub(crate) fn load(file: File, stop: &Arc<Cancel>) -> io::Result<Self> {
        Self::start("device-state-load", true, stop, move |cancel| {
            read_all(&file, cancel)
        })
    }

    fn start(
        name: &str,
        loads: bool,
        stop: &Arc<Cancel>,
        work: impl FnOnce(&[Arc<Cancel>; 2]) -> io::Result<Vec<u8>> + Send + 'static,
    ) -> io::Result<Self> {
        let cancel = Arc::new(Cancel::new()?);
        let canceled = [Arc::clone(&cancel), Arc::clone(stop)];
        let (sender, outcome) = sync_channel(1);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Nobody asks any more where the transfer was dropped.
                let _ = sender.send(work(&canceled));
            })?;
        Ok(Transfer {
            outcome,
            cancel,
            loads,
        })
    }

    /// What was read, once it is done.
    pub(crate) fn finish(self) -> Result<Vec<u8>, TransferError> {
        match self.outcome.recv_timeout(PATIENCE) {
            Ok(outcome) => outcome.map_err(TransferError::Pipe),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(TransferError::Unfinished)
            }
        }
    }
}

/// Waits until the file is ready, or the transfer is given up.
fn wait(file: &File, ready: PollFlags, [cancel, stop]: &[Arc<Cancel>; 2]) -> io::Result<()> {
    let mut fds = [
        PollFd::new(file, ready),
        PollFd::new(&cancel.0, PollFlags::IN),
        PollFd::new(&stop.0, PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) if fds[1..].iter().any(|fd| !fd.revents().is_empty()) => {
                return Err(io::Error::new(
                    ErrorKind::TimedOut,
                    "the transfer was given up",
                ));
            }
            Ok(_) => return Ok(()),
        }
    }
}

fn nonblocking(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}

fn write_all(mut file: &File, mut bytes: &[u8], cancel: &[Arc<Cancel>; 2]) -> io::Result<()> {
    nonblocking(file)?;
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                wait(file, PollFlags::OUT, cancel)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads to the end, and one byte past the longest stream at most.
fn read_all(file: &File, cancel: &[Arc<Cancel>; 2]) -> io::Result<Vec<u8>> {
    nonblocking(file)?;
    let mut bytes = Vec::new();
    loop {
        let room = (MAX_STREAM + 1).saturating_sub(bytes.len()) as u64;
        match file.take(room).read_to_end(&mut bytes) {
            // The end, or more than any stream has.
            Ok(_) => return Ok(bytes),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                wait(file, PollFlags::IN, cancel)?;
            }
            Err(error) => return Err(error),
        }
    }
}
