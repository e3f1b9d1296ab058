//! A state file that several devices share.

use std::fmt::Display;
use std::sync::Mutex;

use crate::state::file::{Change, StateFile, StateFileError};
use crate::sys::lock;

/// See the module. Each device puts its own records; the VM's is written with every change.
#[derive(Debug)]
pub struct Store(Mutex<StateFile>);

impl From<StateFile> for Store {
    fn from(file: StateFile) -> Self {
        Store(Mutex::new(file))
    }
}

impl Store {
    /// Makes one change of the records that `write` puts into it. When this returns, the change is
    /// in the file; until then, the one before is.
    pub fn commit(&self, write: impl FnOnce(&mut Change<'_>)) {
        lock(&self.0).commit(write);
    }

    /// The error of a file whose guest's clock does `wrote` at a leap second, and not what
    /// --rtc-clock was `given` as, both as the option names them.
    pub fn other_clock(&self, wrote: String, given: String) -> StateFileError {
        StateFileError::OtherClock {
            path: lock(&self.0).path().to_owned(),
            wrote,
            given,
        }
    }

    /// What `make` makes of the clock device's record, where one was found when the file was
    /// opened.
    ///
    /// # Errors
    ///
    /// [`StateFileError::Damaged`] where it makes nothing of the record.
    pub fn clock<T, E: Display>(
        &self,
        make: impl FnOnce(&[u8]) -> Result<T, E>,
    ) -> Result<Option<T>, StateFileError> {
        let file = lock(&self.0);
        let made = file.clock().map(make).transpose();
        made.map_err(|bad| file.damaged(&bad))
    }
}
