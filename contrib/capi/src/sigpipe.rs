//! No SIGPIPE: a program in C dies of it by default, where one in Rust ignores it.

#![expect(
    unsafe_code,
    reason = "no crate has a thread's signal mask as a safe call"
)]

use std::mem::MaybeUninit;

use libc::{SIG_BLOCK, SIG_SETMASK, SIGPIPE, sigset_t};

/// While it lives no SIGPIPE of this thread has an effect. It must be dropped on the same thread.
pub(crate) struct Sigpipe {
    /// The thread's mask before.
    mask: sigset_t,
    /// One was pending already, and is the caller's.
    was_pending: bool,
}

/// The set of SIGPIPE alone.
fn sigpipe() -> sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `set` has room for a set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset has written the whole set.
    let mut set = unsafe { set.assume_init() };
    // SAFETY: `set` is a set.
    unsafe { libc::sigaddset(&raw mut set, SIGPIPE) };
    set
}

fn is_pending() -> bool {
    let mut pending = sigpipe();
    // SAFETY: `pending` is a set, which is overwritten.
    unsafe { libc::sigpending(&raw mut pending) };
    // SAFETY: `pending` is a set.
    unsafe { libc::sigismember(&raw const pending, SIGPIPE) == 1 }
}

impl Sigpipe {
    pub(crate) fn hold() -> Self {
        let was_pending = is_pending();
        let (set, mut mask) = (sigpipe(), sigpipe());
        // SAFETY: both are sets; SIG_BLOCK with a valid set cannot fail.
        unsafe { libc::pthread_sigmask(SIG_BLOCK, &raw const set, &raw mut mask) };
        Sigpipe { mask, was_pending }
    }
}

impl Drop for Sigpipe {
    fn drop(&mut self) {
        if !self.was_pending && is_pending() {
            let (set, now) = (
                sigpipe(),
                libc::timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                },
            );
            // SAFETY: a set and a time; nothing is asked about the signal. EINTR leaves it pending,
            // and then it is taken again.
            while unsafe {
                libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now)
            } < 0
                && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
            {
            }
        }
        // SAFETY: `mask` is this thread's own from before.
        unsafe { libc::pthread_sigmask(SIG_SETMASK, &raw const self.mask, std::ptr::null_mut()) };
    }
}
