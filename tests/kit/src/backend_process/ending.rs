//! Waiting for the end of a child, without polling and not forever.

use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::GRACE;

/// A child's exit status, if it ends by itself within `limit`.
pub fn exit_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    has_ended(child, limit).then(|| child.wait().ok()).flatten()
}

/// Whether the child ends by itself within `limit`. It is not reaped.
pub(super) fn has_ended(child: &mut Child, limit: Duration) -> bool {
    if !matches!(child.try_wait(), Ok(None)) {
        return true;
    }
    let Ok(pidfd) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) else {
        return false;
    };
    ends_within(&pidfd, limit)
}

/// Kills a process that something else reaps, and returns once it has ended: from then on its
/// sockets are closed and it answers nothing.
///
/// # Panics
///
/// If there is no such process, or it does not end.
#[track_caller]
pub fn kill_and_wait(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pidfd = pidfd_open(pid.expect("a process id"), PidfdFlags::empty());
    let pidfd = pidfd.expect("the process is there");
    assert!(!ends_within(&pidfd, Duration::ZERO), "it has ended");
    pidfd_send_signal(&pidfd, Signal::KILL).expect("the process lives");
    assert!(ends_within(&pidfd, GRACE), "SIGKILL ends it");
}

/// Whether the process behind the descriptor ends within `limit`.
fn ends_within(pidfd: &OwnedFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Err(Errno::INTR) => {}
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}
