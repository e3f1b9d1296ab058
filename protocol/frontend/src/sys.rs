//! System calls, and locks, that several modules need.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, Timespec};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::{Deadline, Error};

/// Locks a mutex. No code panics with one of this library's locks held, other than by a bug; a
/// poisoned one is as good as another.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sleeps on a condition variable until it is notified or the deadline passes; or for no reason.
pub(crate) fn wait<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    deadline: Deadline,
) -> MutexGuard<'a, T> {
    match deadline.remaining() {
        Some(left) => {
            let woken = condvar.wait_timeout(guard, left);
            woken.unwrap_or_else(PoisonError::into_inner).0
        }
        None => condvar.wait(guard).unwrap_or_else(PoisonError::into_inner),
    }
}

/// For `map_err`: what could not be done.
pub(crate) fn io<E: Into<std::io::Error>>(what: &'static str) -> impl Fn(E) -> Error {
    move |error| Error::Io {
        what,
        source: error.into(),
    }
}

/// An eventfd: nonblocking, closed on exec.
pub(crate) fn eventfd() -> Result<OwnedFd, Error> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    rustix::event::eventfd(0, flags).map_err(io("create an eventfd"))
}

/// Makes an eventfd readable and reports that to all who watch it. If its counter is full, which
/// only a peer can have done, it is emptied first.
pub(crate) fn signal(fd: &OwnedFd) {
    loop {
        match rustix::io::write(fd, &1u64.to_ne_bytes()) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => drain(fd),
            _ => return,
        }
    }
}

/// Makes an eventfd unreadable.
pub(crate) fn drain(fd: &OwnedFd) {
    while rustix::io::read(fd, &mut [0; 8]) == Err(Errno::INTR) {}
}

/// Sleeps until one of the descriptors reports or the deadline passes; then none of them has.
pub(crate) fn poll(fds: &mut [PollFd<'_>], deadline: Deadline) -> Result<(), Error> {
    loop {
        let timeout = deadline
            .remaining()
            .and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(fds, timeout.as_ref()) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(io("poll")(error)),
        }
    }
}

/// Makes reads and writes of a descriptor fail instead of blocking.
pub(crate) fn set_nonblocking(fd: impl AsFd) -> rustix::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
}
