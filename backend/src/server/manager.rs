//! The service manager, where it wants to be notified of what this process does: sd_notify(3).
//!
//! Nothing here waits for the manager. A message that its socket has no room for is sent again
//! soon; of several statuses only the newest.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use log::Level;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with,
};

/// How long until a message that was not sent is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// How long until a device that is busy is asked again whether it is alive.
const BUSY: Duration = Duration::from_millis(10);

/// The longest and the shortest watchdog that make sense.
const WATCHDOG: [Duration; 2] = [Duration::from_millis(2), Duration::from_secs(24 * 3600)];

/// Why the manager is not notified.
#[derive(Debug, thiserror::Error)]
enum NotifyError {
    #[error("{0:?} is neither an absolute path nor an abstract name")]
    Address(OsString),
    #[error("{0:?} is no address of a Unix socket")]
    BadAddress(OsString, #[source] Errno),
    #[error("making a socket failed")]
    Socket(#[source] Errno),
}

/// A service manager that waits for notifications.
#[derive(Debug)]
pub struct Manager {
    socket: OwnedFd,
    address: SocketAddrUnix,
    watchdog: Option<Watchdog>,
    is_ready: bool,
    /// The last status that was sent.
    status: String,
    /// When a message that was not sent is sent again.
    again_at: Option<Instant>,
}

/// The manager ends a process that has not reported within a time.
#[derive(Clone, Copy, Debug)]
struct Watchdog {
    every: Duration,
    due: Instant,
}

impl Manager {
    /// The manager that `NOTIFY_SOCKET` names. One that cannot be reached is logged, and does
    /// without: whether it minds is its own decision.
    pub fn from_environment() -> Option<Self> {
        let address = std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())?;
        let every = watchdog(std::process::id(), |name| std::env::var(name).ok());
        match Self::new(&address, every) {
            Ok(manager) => Some(manager),
            Err(error) => {
                log::warn!(
                    "The service manager is not notified, of readiness either: NOTIFY_SOCKET: {}",
                    crate::with_causes(&error)
                );
                None
            }
        }
    }

    fn new(address: &OsStr, every: Option<Duration>) -> Result<Self, NotifyError> {
        let parsed = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name),
            [b'/', ..] => SocketAddrUnix::new(address),
            _ => return Err(NotifyError::Address(address.to_owned())),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
        Ok(Manager {
            address: parsed.map_err(|error| NotifyError::BadAddress(address.to_owned(), error))?,
            socket: socket.map_err(NotifyError::Socket)?,
            watchdog: every.map(|every| Watchdog {
                every,
                due: Instant::now(),
            }),
            is_ready: false,
            status: String::new(),
            again_at: None,
        })
    }

    /// Reports that this process is ready, the first time, and what its status is, where that has
    /// changed.
    pub(super) fn update(&mut self, status: &str) {
        self.again_at = None;
        if self.is_ready && self.status == status {
            return;
        }
        let ready = if self.is_ready { "" } else { "READY=1\n" };
        if self.send(&format!("{ready}STATUS={status}")) {
            self.is_ready = true;
            status.clone_into(&mut self.status);
        } else {
            self.again_at = Some(Instant::now() + AGAIN);
        }
    }

    /// Reports that this process is alive, where it is time to and `is_alive` says so.
    pub(super) fn report_alive(&mut self, is_alive: impl FnOnce() -> bool) {
        let now = Instant::now();
        let Some(watchdog) = self.watchdog.filter(|watchdog| watchdog.due <= now) else {
            return;
        };
        let wait = match is_alive() && self.send("WATCHDOG=1") {
            true => watchdog.every,
            false => BUSY.min(watchdog.every),
        };
        self.watchdog = Some(Watchdog {
            due: now + wait,
            ..watchdog
        });
    }

    /// Reports that this process ends.
    pub(super) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// When there is something to send again, or to report.
    pub(super) fn due(&self) -> Option<Instant> {
        let alive = self.watchdog.map(|watchdog| watchdog.due);
        [self.again_at, alive].into_iter().flatten().min()
    }

    /// Sends a message, unless the manager's socket is full. A manager that is gone is not waited
    /// for.
    fn send(&self, text: &str) -> bool {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendto(&self.socket, text.as_bytes(), flags, &self.address) {
            Ok(_) => true,
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => false,
            Err(error) => {
                let error = io::Error::from(error);
                // Once: it may be that the manager alone is gone.
                let level = if self.is_ready {
                    Level::Debug
                } else {
                    Level::Warn
                };
                log::log!(
                    level,
                    "Notifying the service manager (NOTIFY_SOCKET) failed: {error}"
                );
                true
            }
        }
    }
}

/// Half of the time within which the manager wants this process to report, where it does.
fn watchdog(own_pid: u32, variable: impl Fn(&'static str) -> Option<String>) -> Option<Duration> {
    let number = |name| variable(name)?.parse::<u64>().ok();
    let is_for_another = match variable("WATCHDOG_PID") {
        Some(pid) => pid != own_pid.to_string(),
        None => false,
    };
    let micros = number("WATCHDOG_USEC").filter(|micros| *micros > 0 && !is_for_another)?;
    let [least, most] = WATCHDOG;
    Some(Duration::from_micros(micros).clamp(least, most) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_this_process_and_has_half_the_time() {
        let every = |usec: Option<&str>, pid: Option<&str>| {
            watchdog(4711, |name| match name {
                "WATCHDOG_USEC" => usec.map(str::to_owned),
                "WATCHDOG_PID" => pid.map(str::to_owned),
                _ => None,
            })
        };
        let second = Some(Duration::from_secs(1));
        assert_eq!(every(None, None), None);
        assert_eq!(every(Some("2000000"), None), second);
        assert_eq!(every(Some("2000000"), Some("4711")), second);
        assert_eq!(every(Some("2000000"), Some("4712")), None);
        assert_eq!(every(Some("2000000"), Some("x")), None);
        for wrong in ["", "0", "-1", "x", "18446744073709551616"] {
            assert_eq!(every(Some(wrong), None), None, "{wrong}");
        }
        // Neither spins nor overflows.
        assert_eq!(every(Some("1"), None), Some(Duration::from_millis(1)));
        let longest = every(Some("18446744073709551615"), None);
        assert_eq!(longest, Some(Duration::from_secs(12 * 3600)));
    }

    #[test]
    fn an_address_is_a_path_or_an_abstract_name_that_fits() {
        let new = |address: &str| Manager::new(OsStr::new(address), None);
        assert!(new("/run/systemd/notify").is_ok());
        assert!(new("@abstract").is_ok());
        for wrong in ["notify", "vsock:2:1", &format!("/{}", "x".repeat(200))] {
            assert!(new(wrong).is_err(), "{wrong}");
        }
    }
}
