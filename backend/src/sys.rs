//! What several modules ask of the operating system.

use std::error::Error;
use std::fs::{self, Metadata};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{UnixCredentials, getsockopt};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};
use rustix::pipe::PIPE_BUF;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use vhost_user_timer_protocol::counter::NS_PER_SEC;

/// Locks, whatever became of the thread that held the lock before: released builds abort on a
/// panic, so no state is ever left half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who connected: the process that called connect(2), or that made the socket pair (SO_PEERCRED,
/// unix(7)). Its process id is 0 where it is in a PID namespace that this process does not see,
/// which `rustix` has no value for.
pub(crate) fn peer_credentials(socket: &UnixStream) -> io::Result<UnixCredentials> {
    Ok(getsockopt(socket, PeerCredentials)?)
}

/// Lets threads that want a lock now and then go before the one that takes it again and again.
///
/// `std`'s mutexes are unfair: a thread that unlocks one and locks it again at once does so before
/// a waiting thread has woken up. The waiting thread [enters](Self::enter) first, and the busy one
/// [lets it go first](Self::let_others_go_first) whenever it holds no lock.
#[derive(Debug, Default)]
pub(crate) struct Turnstile {
    waiting: AtomicBool,
    queue: Mutex<()>,
}

impl Turnstile {
    /// Goes first, until the guard is dropped. Taken before the lock that is wanted, and while none
    /// is held that the busy thread may want.
    pub(crate) fn enter(&self) -> Entered<'_> {
        let queue = lock(&self.queue);
        self.waiting.store(true, Ordering::Relaxed);
        Entered {
            waiting: &self.waiting,
            _queue: queue,
        }
    }

    /// Waits, without spinning, while a thread has entered. Costs one load where none has.
    pub(crate) fn let_others_go_first(&self) {
        if self.waiting.load(Ordering::Relaxed) {
            drop(lock(&self.queue));
        }
    }
}

/// See [`Turnstile::enter`].
pub(crate) struct Entered<'a> {
    waiting: &'a AtomicBool,
    _queue: MutexGuard<'a, ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.waiting.store(false, Ordering::Relaxed);
    }
}

/// Reads without blocking, whatever the flags of the description are. They belong to the sender of
/// the descriptor as well, which may change them at any time.
///
/// Where the kernel cannot do that for this file (an eventfd before Linux 5.8, a pipe before 6.4, a
/// FIFO), this reads once the file is readable. It then blocks only where another reader is faster
/// and the flags were changed, until a signal interrupts it.
///
/// # Errors
///
/// Those of preadv2(2): `AGAIN` where there is nothing to read.
pub(crate) fn read_now(fd: impl AsFd, bytes: &mut [u8]) -> Result<usize, Errno> {
    let mut buffers = [IoSliceMut::new(bytes)];
    match preadv2(&fd, &mut buffers, u64::MAX, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            if is_ready(&fd, PollFlags::IN)? {
                rustix::io::read(&fd, bytes)
            } else {
                Err(Errno::AGAIN)
            }
        }
        read => read,
    }
}

/// Writes without blocking, as [`read_now`] reads. May write less than there is room for.
///
/// # Errors
///
/// Those of pwritev2(2): `AGAIN` where there is no room. A pipe that is ready has `PIPE_BUF` bytes
/// of it (pipe(7)).
pub(crate) fn write_now(fd: impl AsFd, bytes: &[u8]) -> Result<usize, Errno> {
    match pwritev2(
        &fd,
        &[IoSlice::new(bytes)],
        u64::MAX,
        ReadWriteFlags::NOWAIT,
    ) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            if is_ready(&fd, PollFlags::OUT)? {
                rustix::io::write(&fd, bytes.get(..PIPE_BUF).unwrap_or(bytes))
            } else {
                Err(Errno::AGAIN)
            }
        }
        written => written,
    }
}

fn is_ready(fd: &impl AsFd, ready: PollFlags) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(fd, ready)];
    Ok(poll(&mut fds, Some(&Timespec::default()))? != 0)
}

/// Which file a path or a descriptor means, whatever its name: its device, and its inode there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId(u64, u64);

impl FileId {
    pub(crate) fn of(found: &Metadata) -> Self {
        FileId(found.dev(), found.ino())
    }
}

/// The file that has a path. No link is followed.
///
/// # Errors
///
/// Those of lstat(2).
pub(crate) fn file_id(path: &Path) -> io::Result<FileId> {
    Ok(FileId::of(&fs::symlink_metadata(path)?))
}

/// The folder that a file lies in, or would. A path with a slash at its end names a folder itself.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        _ if path.as_os_str().as_encoded_bytes().ends_with(b"/") => path,
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes reads and writes of this descriptor return at once.
///
/// # Errors
///
/// Those of fcntl(2).
pub(crate) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    Ok(fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

/// What an error says, and its causes, each after a colon.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// A timerfd: readable once its clock has reached a value.
#[derive(Debug)]
pub(crate) struct TimerFd(OwnedFd);

impl TimerFd {
    /// A disarmed timer.
    ///
    /// # Errors
    ///
    /// Those of timerfd_create(2).
    pub(crate) fn new(clock: TimerfdClockId) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(TimerFd(timerfd_create(clock, flags)?))
    }

    /// Sets the timer for a reading of its clock, ns, or disarms it. A reading that is past makes
    /// it readable at once.
    ///
    /// # Errors
    ///
    /// Those of timerfd_settime(2). After `ECANCELED` the timer is set all the same
    /// (timerfd_create(2)).
    pub(crate) fn set_at(&self, ns: Option<u64>, flags: TimerfdTimerFlags) -> Result<(), Errno> {
        // 0 would disarm it.
        let value = ns.map_or(0, |ns| ns.max(1));
        let timer = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                // At most 2^64 ns, so both fit.
                tv_sec: (value / NS_PER_SEC).try_into().unwrap_or(i64::MAX),
                tv_nsec: (value % NS_PER_SEC).try_into().unwrap_or(0),
            },
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME | flags, &timer)?;
        Ok(())
    }

    /// Makes the timer unreadable until it expires again.
    pub(crate) fn drain(&self) {
        // Fails where another thread has read it or it was set again since, which does as well,
        // and with ECANCELED where the clock was set.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for TimerFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for TimerFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn a_thread_that_enters_gets_the_lock_before_the_thread_that_takes_it_again_and_again() {
        let turnstile = Turnstile::default();
        let served = Mutex::new(0);
        for round in 0..100 {
            let held = lock(&served);
            let (entered, has_entered) = mpsc::channel();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let _first = turnstile.enter();
                    entered.send(()).unwrap();
                    *lock(&served) += 1;
                });
                has_entered.recv().unwrap();
                drop(held);
                turnstile.let_others_go_first();
                assert_eq!(*lock(&served), round + 1);
            });
        }
    }

    #[test]
    fn a_blocking_descriptor_is_read_and_written_without_blocking() {
        let event = eventfd(0, EventfdFlags::empty()).unwrap();
        let mut count = [0; 8];
        assert_eq!(read_now(&event, &mut count), Err(Errno::AGAIN));
        rustix::io::write(&event, &7u64.to_ne_bytes()).unwrap();
        assert_eq!(read_now(&event, &mut count), Ok(8));
        assert_eq!(u64::from_ne_bytes(count), 7);

        let (reader, mut writer) = io::pipe().unwrap();
        let mut bytes = [0; 3];
        assert_eq!(read_now(&reader, &mut bytes), Err(Errno::AGAIN));
        writer.write_all(b"abc").unwrap();
        assert_eq!(read_now(&reader, &mut bytes), Ok(3));
        assert_eq!(&bytes, b"abc");
        let full = loop {
            match write_now(&writer, &[0; 4096]) {
                Ok(_) => {}
                full => break full,
            }
        };
        assert_eq!(full, Err(Errno::AGAIN));
        drop(reader);
        let _none_starts = crate::children::none_starts();
        assert_eq!(write_now(&writer, b"d"), Err(Errno::PIPE));
        drop(writer);
    }
}
