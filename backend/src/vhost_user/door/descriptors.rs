//! Whether a descriptor is what its message says, before anything reads, writes or waits on it.
//!
//! No check can block: the kernel is asked, never the server of a file system. A socket is refused
//! everywhere. It could be the frontend's own end of the control socket, and holding that keeps the
//! connection from ever ending.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{
    AtFlags, FileType, OFlags, StatxFlags, fcntl_get_seals, fcntl_getfl, readlink, statx,
};
use rustix::time::timerfd_gettime;

use crate::vhost_user::door::Refusal;

/// As /proc calls an eventfd (eventfd(2); `anon_inode_getfile` in the kernel's fs/eventfd.c).
const EVENTFD: &[u8] = b"anon_inode:[eventfd]";

/// The way of a device state, as the backend sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vhost_user) enum Direction {
    /// The backend reads it: VHOST_TRANSFER_STATE_DIRECTION_LOAD.
    Read,
    /// The backend writes it: VHOST_TRANSFER_STATE_DIRECTION_SAVE.
    Write,
}

/// Checks a kick, call or error descriptor: an eventfd.
///
/// Without /proc, any anonymous inode but a timerfd passes: reading one does not block, see
/// `vring`.
///
/// # Errors
///
/// What it is instead.
pub(in crate::vhost_user) fn check_eventfd(fd: BorrowedFd<'_>) -> Result<(), Refusal> {
    let is_eventfd = match name_in_proc(fd) {
        Some(name) => name == EVENTFD,
        None => kind(fd)? == FileType::Unknown && timerfd_gettime(fd).is_err(),
    };
    if is_eventfd {
        Ok(())
    } else {
        let found = describe(fd);
        Err(Refusal(format!(
            "the descriptor is {found}; send an eventfd"
        )))
    }
}

/// Checks a descriptor for a device state: the end of a pipe that fits the direction, or a file in
/// memory, which never blocks.
///
/// # Errors
///
/// What it is instead.
pub(in crate::vhost_user) fn check_pipe(
    fd: BorrowedFd<'_>,
    direction: Direction,
) -> Result<(), Refusal> {
    let fits = match kind(fd)? {
        FileType::Fifo => true,
        FileType::RegularFile => fcntl_get_seals(fd).is_ok(),
        _ => false,
    };
    if !fits {
        let found = describe(fd);
        return Err(Refusal(format!(
            "the descriptor is {found}; send one end of a pipe, or a memfd"
        )));
    }
    let mode = fcntl_getfl(fd).map_err(|error| unknown(error.into()))? & OFlags::ACCMODE;
    match direction {
        Direction::Read if mode == OFlags::WRONLY => Err(Refusal(
            "the descriptor is open for writing only; send the end that the state is read from"
                .to_owned(),
        )),
        Direction::Write if mode == OFlags::RDONLY => Err(Refusal(
            "the descriptor is open for reading only; send the end that the state is written to"
                .to_owned(),
        )),
        _ => Ok(()),
    }
}

/// What /proc calls the descriptor's file, where /proc is there.
fn name_in_proc(fd: BorrowedFd<'_>) -> Option<Vec<u8>> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    readlink(link, Vec::new())
        .ok()
        .map(std::ffi::CString::into_bytes)
}

/// The file's type. DONT_SYNC: a file system's server, which may not answer, is not asked.
fn kind(fd: BorrowedFd<'_>) -> Result<FileType, Refusal> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(fd, "", flags, StatxFlags::TYPE).map_err(|error| unknown(error.into()))?;
    Ok(FileType::from_raw_mode(found.stx_mode.into()))
}

fn unknown(error: std::io::Error) -> Refusal {
    Refusal(format!("the descriptor cannot be examined: {error}"))
}

/// The file's type in words, and its name where /proc has one.
fn describe(fd: BorrowedFd<'_>) -> String {
    let what = match kind(fd) {
        Ok(FileType::RegularFile) => "a regular file",
        Ok(FileType::Directory) => "a directory",
        Ok(FileType::Symlink) => "a symbolic link",
        Ok(FileType::Fifo) => "a pipe",
        Ok(FileType::Socket) => "a socket",
        Ok(FileType::CharacterDevice) => "a character device",
        Ok(FileType::BlockDevice) => "a block device",
        Ok(FileType::Unknown) => "an anonymous inode",
        Err(_) => "of an unknown type",
    };
    match name_in_proc(fd) {
        Some(name) => format!("{what} ({})", name.escape_ascii()),
        None => what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, epoll, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

    use super::*;

    fn memfd() -> OwnedFd {
        memfd_create("state", MemfdFlags::CLOEXEC).unwrap()
    }

    fn refused(result: Result<(), Refusal>) -> String {
        result.expect_err("it is refused").to_string()
    }

    #[test]
    fn only_an_eventfd_is_a_kick_call_or_error_descriptor() {
        for flags in [
            EventfdFlags::empty(),
            EventfdFlags::NONBLOCK,
            EventfdFlags::SEMAPHORE,
        ] {
            check_eventfd(eventfd(0, flags).unwrap().as_fd()).unwrap();
        }
        let pipe = std::io::pipe().unwrap();
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::empty()).unwrap();
        let others: [(OwnedFd, &str); 8] = [
            (UnixStream::pair().unwrap().0.into(), "a socket (socket:["),
            (pipe.0.into(), "a pipe (pipe:["),
            (pipe.1.into(), "a pipe (pipe:["),
            (memfd(), "a regular file (/memfd:state (deleted))"),
            (File::open("/").unwrap().into(), "a directory (/)"),
            (
                File::open("/dev/null").unwrap().into(),
                "a character device (/dev/null)",
            ),
            (timer, "an anonymous inode (anon_inode:[timerfd])"),
            (
                epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
                "an anonymous inode (anon_inode:[eventpoll])",
            ),
        ];
        for (fd, what) in others {
            let text = refused(check_eventfd(fd.as_fd()));
            let (start, end) = (format!("the descriptor is {what}"), "; send an eventfd");
            assert!(text.starts_with(&start) && text.ends_with(end), "{text}");
        }
    }

    #[test]
    fn a_device_state_goes_through_the_fitting_end_of_a_pipe_or_a_file_in_memory() {
        let (reader, writer) = std::io::pipe().unwrap();
        check_pipe(reader.as_fd(), Direction::Read).unwrap();
        check_pipe(writer.as_fd(), Direction::Write).unwrap();
        for direction in [Direction::Read, Direction::Write] {
            check_pipe(memfd().as_fd(), direction).unwrap();
        }
        let text = refused(check_pipe(reader.as_fd(), Direction::Write));
        assert!(text.contains("open for reading only"), "{text}");
        let text = refused(check_pipe(writer.as_fd(), Direction::Read));
        assert!(text.contains("open for writing only"), "{text}");
        let socket = UnixStream::pair().unwrap().0;
        for direction in [Direction::Read, Direction::Write] {
            let text = refused(check_pipe(socket.as_fd(), direction));
            assert!(text.starts_with("the descriptor is a socket"), "{text}");
            let eventfd = eventfd(0, EventfdFlags::empty()).unwrap();
            let text = refused(check_pipe(eventfd.as_fd(), direction));
            assert!(
                text.ends_with("; send one end of a pipe, or a memfd"),
                "{text}"
            );
        }
    }
}
