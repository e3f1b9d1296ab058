//! What the service manager is told of: the endpoints, and the timer device.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::TimerDevice;
use crate::server::endpoint::Endpoint;
use crate::server::manager::Manager;
use crate::server::poll::{Poll, Token};

/// How often a restore that is open is asked how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

/// A service manager, and the VM that it is told of.
pub struct Supervision {
    manager: Manager,
    device: Arc<TimerDevice>,
    /// When an open restore is asked next.
    progress_at: Option<Instant>,
}

impl Supervision {
    /// Has this manager notified of this device's VM.
    pub fn new(manager: Manager, device: Arc<TimerDevice>) -> Self {
        Supervision {
            manager,
            device,
            progress_at: None,
        }
    }

    /// Has the loop woken by each change of the VM's status.
    pub(super) fn register(&self, poll: &Poll) -> io::Result<()> {
        poll.add(self.device.watch()?, Token::VmChanged)
    }

    /// Reports what has changed and what is due. By the loop alone, so that the manager notices
    /// when the loop hangs; and alive only while the device's lock can be had, so that it notices a
    /// worker that hangs with the VM.
    pub(super) fn report(&mut self, endpoints: &[Endpoint]) {
        let connected: Vec<_> = endpoints.iter().filter_map(Endpoint::connected).collect();
        let vm = self.device.status();
        let progresses = vm.is_some_and(|vm| vm.is_progressing());
        self.progress_at = progresses.then(|| Instant::now() + PROGRESS);
        let vm = vm.map(|vm| vm.to_string()).unwrap_or_default();
        let status = match connected.as_slice() {
            [] => format!("{vm}; no frontend connected"),
            connected => format!("{vm}; connected: {}", connected.join(", ")),
        };
        self.manager.update(&status);
        let device = &self.device;
        self.manager.report_alive(|| device.is_free());
    }

    /// When [`report`](Self::report) is to be called at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        [self.manager.due(), self.progress_at]
            .into_iter()
            .flatten()
            .min()
    }

    /// Reports that the process ends.
    pub(super) fn stopping(&self) {
        self.manager.stopping();
    }
}
