//! What a backend has logged.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{BackendProcess, GRACE};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BackendProcess {
    /// What it has written to stderr so far: all of it once the process is known to have ended. A
    /// thread of its own writes the log, so a line may come after the answer to the action that it
    /// reports: while the process lives, only [`log_with`](Self::log_with) can tell that there is
    /// one.
    ///
    /// # Panics
    ///
    /// If its stderr is a pipe from the start that nobody reads ([`Launch::unread`]).
    ///
    /// [`Launch::unread`]: super::Launch::unread
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log_path).expect("its stderr is written to a file");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the log contains `text`, and returns the log. Where the same text was waited for
    /// before, it must be there once more: an earlier line is not taken for the next one.
    ///
    /// # Panics
    ///
    /// If it does not.
    #[track_caller]
    pub fn log_with(&self, text: &str) -> String {
        let times = {
            let mut waited_for = lock(&self.waited_for);
            let times = waited_for.entry(text.to_owned()).or_default();
            *times += 1;
            *times
        };
        self.log_with_times(text, times)
    }

    /// Waits until the log contains `text` at least this many times from its beginning.
    ///
    /// # Panics
    ///
    /// If it does not.
    #[track_caller]
    pub fn log_with_times(&self, text: &str, times: usize) -> String {
        let deadline = Instant::now() + GRACE;
        loop {
            let log = self.log();
            if log.matches(text).count() >= times {
                return log;
            }
            assert!(
                Instant::now() < deadline,
                "{text:?} is not {times} times in: {log}"
            );
            std::thread::yield_now();
        }
    }
}
