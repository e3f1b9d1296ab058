//! The signals that end the process, and those that must not.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmm_sys_util::signal::{get_blocked_signals, unblock_signal};

/// Unblocks every signal. A launcher's mask survives execve(2), and a signal that the launcher has
/// blocked would not end this process. To be called before any other thread starts: threads inherit
/// the mask.
pub fn unblock_all() {
    for signal in get_blocked_signals().unwrap_or_default() {
        // Nothing can be done about a signal that stays blocked.
        let _ = unblock_signal(signal);
    }
}

/// The signals that end the process: SIGTERM, SIGINT and SIGHUP.
///
/// SIGHUP stays ignored where the launcher ignores it, which is how nohup(1) keeps a process alive.
/// SIGTERM and SIGINT end the process in any case.
#[derive(Debug)]
pub struct Signals(UnixStream);

impl Signals {
    /// Catches the signals from now on. One that arrives before the process serves ends it then.
    ///
    /// Writing past a limit of the size of files (RLIMIT_FSIZE) becomes an error, EFBIG: it does
    /// not end the process by SIGXFSZ.
    ///
    /// # Errors
    ///
    /// Those of socketpair(2) and sigaction(2).
    pub fn catch() -> io::Result<Self> {
        let (read_end, write_end) = UnixStream::pair()?;
        let hangup = (!is_ignored(SIGHUP)?).then_some(SIGHUP);
        for signal in [SIGTERM, SIGINT].into_iter().chain(hangup) {
            signal_hook::low_level::pipe::register(signal, write_end.try_clone()?)?;
        }
        // Nobody reads the flag. With any handler, write(2) returns the error.
        signal_hook::flag::register(libc::SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
        Ok(Signals(read_end))
    }
}

impl AsRawFd for Signals {
    /// Readable once a signal has arrived.
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[expect(unsafe_code, reason = "no crate asks for a signal's disposition")]
fn is_ignored(signal: libc::c_int) -> io::Result<bool> {
    // SAFETY: a sigaction is integers, which may all be zero.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with a null pointer for the new action this changes nothing, and `action` is valid
    // for the current one.
    let result = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(action.sa_sigaction == libc::SIG_IGN)
}
