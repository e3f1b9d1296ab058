//! A VM in a file.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::{Context, Error};
use super::{gic, registers};

/// A VM that does not run: all that another process needs to continue it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) vcpus: Vec<registers::State>,
    pub(crate) gic: gic::State,
    /// The VM's timers: the bytes of a [`SavedVm`](vhost_user_timer_frontend::SavedVm).
    pub(crate) timers: Vec<u8>,
    pub(crate) ram: Vec<u8>,
}

impl Snapshot {
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let bytes = fs::read(path).context("read the file of the VM")?;
        postcard::from_bytes(&bytes).context("parse the file of the VM")
    }

    pub(crate) fn write(&self, path: &Path) -> Result<(), Error> {
        let bytes = postcard::to_stdvec(self).context("encode the VM")?;
        fs::write(path, bytes).context("write the file of the VM")
    }
}
