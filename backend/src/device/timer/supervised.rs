//! The timer device as the process's supervisor sees it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::TryLockError;

use crate::device::timer::TimerDevice;
use crate::device::timer::state::TimerState;
use crate::device::timer::watch::{VmStatus, Watch};

impl TimerDevice {
    /// Has changes of [`status`](Self::status) reported from now on. The descriptor is readable
    /// after each, until [`status`](Self::status) is called.
    ///
    /// # Errors
    ///
    /// Those of eventfd(2).
    pub fn watch(&self) -> io::Result<RawFd> {
        let watch = Watch::new(&mut self.state())?;
        Ok(self.watch.get_or_init(|| watch).as_raw_fd())
    }

    /// The VM in brief, once it is [watched](Self::watch). Never waits for the device's lock: where
    /// that is taken, a restore has progressed as far as it had the last time.
    pub fn status(&self) -> Option<VmStatus> {
        let watch = self.watch.get()?;
        let status = watch.status();
        if !status.is_progressing() {
            return Some(status);
        }
        if let Ok(mut state) = self.state.try_lock() {
            watch.renew(&mut state);
        }
        Some(watch.status())
    }

    /// Whether the device's lock is free at this moment. However busy the device is, it is free
    /// again and again, unless a thread hangs that holds it.
    pub fn is_free(&self) -> bool {
        !matches!(self.state.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// The VM's phase has changed, or its restore has timed out.
    pub(super) fn changed(&self, state: &mut TimerState) {
        self.phase_changed.notify_all();
        if let Some(watch) = self.watch.get() {
            watch.update(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{SourceChoice, TimerConfig};

    fn device() -> TimerDevice {
        TimerDevice::new(&TimerConfig {
            max_vcpus: 1,
            request_queues: 1,
            frequency: None,
            source: SourceChoice::Auto,
            state_file: None,
        })
        .unwrap()
    }

    fn is_readable(watch: &Watch) -> bool {
        let link = format!("/proc/self/fdinfo/{}", watch.as_raw_fd());
        let info = std::fs::read_to_string(link).unwrap();
        let count = info
            .lines()
            .find_map(|line| line.strip_prefix("eventfd-count:"));
        count.unwrap().trim() != "0"
    }

    #[test]
    fn a_device_is_free_unless_a_thread_holds_its_lock() {
        let device = device();
        assert!(device.is_free());
        let held = device.state();
        assert!(!device.is_free());
        drop(held);
        assert!(device.is_free());
    }

    #[test]
    fn a_change_is_reported_until_the_status_is_read() {
        let device = device();
        assert!(device.status().is_none());
        device.watch().unwrap();
        let watch = device.watch.get().unwrap();
        assert!(!is_readable(watch));
        device.changed(&mut device.state());
        assert!(is_readable(watch));
        assert_eq!(device.status().unwrap().to_string(), "No VM yet");
        assert!(!is_readable(watch));
    }
}
