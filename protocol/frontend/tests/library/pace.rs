//! Tests whose outcome does not depend on how fast a machine is.

use std::sync::mpsc::channel;
use std::thread::{Scope, ScopedJoinHandle, yield_now};
use std::time::Duration;

use crate::LONG;
use rustix::thread::gettid;
use vhost_user_timer_frontend::Deadline;

/// Runs `wait` on a thread of its own, and returns once that thread sleeps.
///
/// A thread that sleeps for a moment for another reason, as for a lock, is taken for one that
/// waits. A test may show less by that, and must not fail.
pub(crate) fn waiting<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    wait: impl FnOnce() -> T + Send + 'scope,
) -> ScopedJoinHandle<'scope, T> {
    let (send, id) = channel();
    let thread = scope.spawn(move || {
        send.send(gettid().as_raw_nonzero()).unwrap();
        wait()
    });
    let stat = format!("/proc/self/task/{}/stat", id.recv().unwrap());
    let sleeps = || {
        // "1 (name) S …": the name may have parentheses of its own (proc_pid_stat(5)).
        let stat = std::fs::read_to_string(&stat).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, state)| state);
        state.is_some_and(|state| state.starts_with('S'))
    };
    let deadline = Deadline::from(LONG);
    while !sleeps() && !thread.is_finished() {
        assert!(!deadline.has_passed(), "the thread does not wait");
        yield_now();
    }
    thread
}

/// Finds a time limit that is long enough on this machine for what has to happen before a wait that
/// is to run out of time: tries `shortest`, and twice the previous limit while `attempt` returns
/// `None`.
pub(crate) fn within_some_limit<T>(
    shortest: Duration,
    mut attempt: impl FnMut(Duration) -> Option<T>,
) -> T {
    let mut limit = shortest;
    loop {
        if let Some(result) = attempt(limit) {
            return result;
        }
        assert!(limit < LONG, "{limit:?} is not long enough");
        limit *= 2;
    }
}
