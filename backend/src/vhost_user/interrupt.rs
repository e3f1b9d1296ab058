//! Ends system calls of a connection's threads that would wait for the peer.
//!
//! A descriptor that came from the peer can be made blocking again whenever the peer likes:
//! O_NONBLOCK is a flag of its description, which is shared. So a thread can be in a read or a
//! write that only the peer would end. When the connection is over, its threads get a signal, again
//! and again until they are gone: a call that is interrupted returns, and the thread finds that
//! it is to end. One signal could come just before such a call.

use std::cell::RefCell;
use std::io;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, getpid};
use rustix::thread::gettid;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::sys::lock;

/// How often threads that have not ended are interrupted again.
const AGAIN: Duration = Duration::from_millis(10);

/// The threads of one connection that are to be interrupted at its end.
#[derive(Clone, Debug, Default)]
pub(super) struct Threads(Arc<Alive>);

#[derive(Debug, Default)]
struct Alive {
    threads: Mutex<Vec<Pid>>,
    one_ended: Condvar,
}

/// A thread that is among them, until it ends.
struct Registered {
    thread: Pid,
    threads: Threads,
}

thread_local! {
    static REGISTERED: RefCell<Option<Registered>> = const { RefCell::new(None) };
}

impl Threads {
    /// # Errors
    ///
    /// Where the signal cannot be handled: it would end the process.
    pub(super) fn new() -> io::Result<Self> {
        static HANDLED: OnceLock<Result<(), i32>> = OnceLock::new();
        let handled = HANDLED.get_or_init(|| {
            // Without SA_RESTART: a call that is interrupted returns EINTR.
            register_signal_handler(SIGRTMIN(), ignore).map_err(|error| error.errno())
        });
        handled.map_err(io::Error::from_raw_os_error)?;
        Ok(Self::default())
    }

    /// Counts the calling thread among them until it ends.
    pub(super) fn register(&self) {
        REGISTERED.with_borrow_mut(|registered| {
            registered.get_or_insert_with(|| {
                // A launcher's mask is inherited.
                let _ = unblock_signal(SIGRTMIN());
                let thread = gettid();
                lock(&self.0.threads).push(thread);
                Registered {
                    thread,
                    threads: self.clone(),
                }
            });
        });
    }

    /// Interrupts what they wait in, once.
    pub(super) fn interrupt(&self) {
        for thread in lock(&self.0.threads).iter() {
            send_signal(*thread);
        }
    }

    /// Waits for the end of all of them, and interrupts those that take their time.
    pub(super) fn end(&self) {
        let mut threads = lock(&self.0.threads);
        while !threads.is_empty() {
            let waited = self.0.one_ended.wait_timeout(threads, AGAIN);
            let (left, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            threads = left;
            if timeout.timed_out() {
                for thread in threads.iter() {
                    send_signal(*thread);
                }
            }
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let Alive { threads, one_ended } = &*self.threads.0;
        lock(threads).retain(|thread| *thread != self.thread);
        one_ended.notify_all();
    }
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The thread is alive: it leaves the list, under its lock, before it ends.
#[expect(unsafe_code, reason = "no crate has tgkill(2)")]
fn send_signal(thread: Pid) {
    // SAFETY: the call takes numbers only, and the signal has a handler.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            getpid().as_raw_nonzero().get(),
            thread.as_raw_nonzero().get(),
            SIGRTMIN(),
        );
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_thread_in_a_read_that_nobody_ends_is_interrupted_and_leaves() {
        let threads = Threads::new().unwrap();
        let (mut reader, _writer) = io::pipe().unwrap();
        let registry = threads.clone();
        let (registered, begins) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            registry.register();
            registry.register();
            registered.send(()).unwrap();
            // `Read::read` reports EINTR, where `read_exact` would read again.
            reader.read(&mut [0]).unwrap_err().kind()
        });
        begins.recv().unwrap();
        // Those of another connection.
        Threads::new().unwrap().end();
        assert!(!thread.is_finished());
        threads.end();
        assert_eq!(thread.join().unwrap(), io::ErrorKind::Interrupted);
    }
}
