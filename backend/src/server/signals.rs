//! The signals that end the process, and those that must not.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::WithRawSiginfo;
use signal_hook::low_level::signal_name;
use vmm_sys_util::signal::{get_blocked_signals, unblock_signal};

/// Unblocks every signal. A launcher's mask survives execve(2), and a signal that the launcher has
/// blocked would not end this process. To be called before any other thread starts: threads inherit
/// the mask.
///
/// From now on, writing past a limit of the size of files (RLIMIT_FSIZE) is an error, EFBIG: it
/// does not end the process by SIGXFSZ.
pub fn prepare_signals() {
    // Nobody reads the flag. With any handler, write(2) returns the error. Registering fails for
    // signals only that there are not.
    let _ = signal_hook::flag::register(libc::SIGXFSZ, Arc::new(AtomicBool::new(false)));
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
pub struct Signals(SignalDelivery<UnixStream, WithRawSiginfo>);

impl Signals {
    /// Catches the signals from now on. One that arrives before the process serves ends it then.
    ///
    /// # Errors
    ///
    /// Those of socketpair(2) and sigaction(2).
    pub fn catch() -> io::Result<Self> {
        let (read_end, write_end) = UnixStream::pair()?;
        let hangup = (!is_ignored(SIGHUP)?).then_some(SIGHUP);
        let ending = [SIGTERM, SIGINT].into_iter().chain(hangup);
        let caught = SignalDelivery::with_pipe(read_end, write_end, WithRawSiginfo, ending)?;
        Ok(Signals(caught))
    }

    /// A signal that has arrived and was not taken yet.
    pub(super) fn take(&mut self) -> Option<Arrived> {
        self.0.pending().next().map(|info| Arrived::new(&info))
    }
}

impl AsRawFd for Signals {
    /// Readable once a signal has arrived.
    fn as_raw_fd(&self) -> RawFd {
        self.0.get_read().as_raw_fd()
    }
}

/// A signal, and who sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arrived {
    signal: libc::c_int,
    /// Process and user. The process is 0 where it is in a PID namespace that this one does not
    /// see.
    sender: Option<(libc::pid_t, libc::uid_t)>,
}

impl Arrived {
    #[expect(unsafe_code, reason = "no crate without C code reads the sender")]
    fn new(info: &libc::siginfo_t) -> Self {
        // sigaction(2): a code above 0 is the kernel's own signal.
        let is_of_a_process = info.si_code <= 0;
        // SAFETY: the field is an integer within `info`.
        let pid = unsafe { info.si_pid() };
        // SAFETY: as above.
        let uid = unsafe { info.si_uid() };
        Arrived {
            signal: info.si_signo,
            sender: is_of_a_process.then_some((pid, uid)),
        }
    }
}

impl fmt::Display for Arrived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match signal_name(self.signal) {
            Some(name) => f.write_str(name)?,
            None => write!(f, "signal {}", self.signal)?,
        }
        match self.sender {
            Some((pid, uid)) => write!(f, " from process {pid} of uid {uid}"),
            // The kernel sends these for Ctrl-C and for a terminal that is closed.
            None => f.write_str(" from the terminal"),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_named_with_the_process_or_the_terminal_that_sent_it() {
        let text = |signal, sender| Arrived { signal, sender }.to_string();
        assert_eq!(
            text(SIGTERM, Some((4711, 1000))),
            "SIGTERM from process 4711 of uid 1000"
        );
        assert_eq!(text(SIGINT, None), "SIGINT from the terminal");
    }
}
