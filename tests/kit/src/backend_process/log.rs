//! What a backend has logged.

use std::time::Instant;

use super::{BackendProcess, GRACE};

impl BackendProcess {
    /// What it has written to stderr so far. A thread of its own writes the log, so a line may come
    /// after the answer to the action that it reports: while the process lives, only
    /// [`log_with`](Self::log_with) can tell that there is one.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log_path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the log contains `text`, and returns the log.
    ///
    /// # Panics
    ///
    /// If it does not.
    #[track_caller]
    pub fn log_with(&self, text: &str) -> String {
        self.log_with_times(text, 1)
    }

    /// As [`log_with`](Self::log_with), at least this many times.
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
            assert!(Instant::now() < deadline, "{text:?} is not in: {log}");
            std::thread::yield_now();
        }
    }
}
