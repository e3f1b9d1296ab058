//! The handler of SIGBUS. All of it is async-signal-safe (signal-safety(7)): atomics and system
//! calls, no lock, no allocation, no log.

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;
use std::sync::OnceLock;

use libc::{BUS_ADRERR, BUS_MCEERR_AR, SIG_DFL, SIGBUS, siginfo_t};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use rustix::param::page_size;
use vmm_sys_util::signal::register_signal_handler;

use super::table::{self, Range};

/// Installs the handler, once for the process.
pub(super) fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // Found out now, since the handler must not be the first to ask.
        let _ = page_size();
        register_signal_handler(SIGBUS, on_sigbus).map_err(|error| error.errno())
    });
    installed.map_err(io::Error::from_raw_os_error)
}

#[allow(unsafe_code, reason = "a signal handler")]
extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo_t to a handler with SA_SIGINFO.
    let info = unsafe { &*info };
    let by_access = matches!(info.si_code, BUS_ADRERR | BUS_MCEERR_AR);
    if by_access {
        // SAFETY: these codes come with an address.
        let address = unsafe { info.si_addr() };
        if recover(address.addr()) {
            return;
        }
    }
    // SAFETY: signal(2) is async-signal-safe, and SIG_DFL is a valid disposition.
    unsafe { libc::signal(signal, SIG_DFL) };
    if !by_access {
        // Sent by somebody: it must end the process now. An access is repeated on return, and does.
        // SAFETY: raise(3) is async-signal-safe.
        unsafe { libc::raise(signal) };
    }
}

/// Puts pages in place of what the peer took away, where the address is a peer's.
fn recover(address: usize) -> bool {
    let Some((range, slot)) = table::find(address) else {
        return false;
    };
    // Before the pages: who reads them must see the mark.
    let losses = slot.mark();
    let Some(bytes) = put_in_place(&range, address, losses) else {
        return false;
    };
    slot.count(bytes);
    if losses == 0 {
        slot.tell(&range);
    }
    true
}

/// Maps private memory around the address, twice as much for each loss before: a chain of thousands
/// of lost pages takes a few signals and mappings, which are limited. What was there is lost too.
/// Returns how many bytes were mapped.
fn put_in_place(range: &Range, address: usize, losses: u32) -> Option<usize> {
    let page = page_size();
    let whole = range.len.next_multiple_of(page);
    let end = range.start + whole;
    let mut size = page.checked_shl(losses).unwrap_or(0);
    if size == 0 || size > whole {
        size = whole.next_power_of_two();
    }
    let (mut retried, mut huge) = (false, false);
    loop {
        let block = address & !(size - 1);
        let (first, last) = if huge {
            // The smallest block that can be replaced is one huge page: all of it is mapped.
            (block, block.saturating_add(size))
        } else {
            (block.max(range.start), block.saturating_add(size).min(end))
        };
        match map(first, last - first) {
            Ok(()) => return Some(last - first),
            // Of huge pages only whole ones are replaced.
            Err(Errno::INVAL) if !huge => (size, huge) = (page, true),
            Err(Errno::INVAL) if size < LARGEST_PAGE => size *= 2,
            // The system promises no more memory than it has.
            Err(Errno::NOMEM) if !retried && !huge => (size, retried) = (page, true),
            Err(_) => return None,
        }
    }
}

/// No architecture has larger pages, bytes.
const LARGEST_PAGE: usize = 16 << 30;

#[allow(
    unsafe_code,
    reason = "no crate replaces a mapping in a signal handler"
)]
fn map(start: usize, len: usize) -> Result<(), Errno> {
    let place = ptr::with_exposed_provenance_mut(start);
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the pages lie in a watched range, which is memory that a peer shares: everybody here
    // expects it to change at any time, and it stays mapped.
    unsafe { mmap_anonymous(place, len, protection, flags) }.map(drop)
}
