//! What the timer device's options ask for, and which host counter that makes.

use std::fmt;
use std::path::PathBuf;

use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_model::vm::Profile;

use crate::device::DeviceError;
use crate::state::file::Opening;

/// The options of the timer device.
#[derive(Clone, Debug)]
pub struct TimerConfig {
    /// The most vCPUs that the VM may have.
    pub max_vcpus: u32,
    /// How many request queues there are.
    pub request_queues: u16,
    /// The only counter frequency that is accepted, Hz; `None` accepts any.
    pub frequency: Option<u64>,
    /// What the host counter is derived from.
    pub source: SourceChoice,
    /// The file that keeps the VM; `None` keeps it for as long as the process lives.
    pub state_file: Option<PathBuf>,
}

impl TimerConfig {
    /// The host counter for the VM that the state file holds, or for a new VM.
    pub(super) fn counter(&self, opening: Option<&Opening>) -> Result<HostCounter, DeviceError> {
        match self.source {
            SourceChoice::Named(source) => {
                let counter = HostCounter::open(source).map_err(DeviceError::Counter)?;
                // A rate that was measured is the VM's for as long as the VM lives.
                let kept = opening.and_then(Opening::counter);
                Ok(kept.map_or(counter, |kept| counter.at_rate(kept.frequency)))
            }
            SourceChoice::Auto => match opening.map(Opening::host_counter).transpose()?.flatten() {
                Some(counter) => Ok(counter),
                None => HostCounter::open(Source::DEFAULT).map_err(DeviceError::Counter),
            },
        }
    }

    /// The limits of the VM that counts by this counter.
    pub(super) fn profile(&self, counter: HostCounter) -> Profile {
        Profile {
            max_vcpus: self.max_vcpus,
            request_queues: self.request_queues,
            frequency: self.frequency.unwrap_or(counter.native_frequency()),
            frequency_fixed: self.frequency.is_some(),
            source: counter.source().into(),
        }
    }
}

/// Which source the host counter is derived from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceChoice {
    /// The source of the VM in the state file; where there is none, [`Source::DEFAULT`].
    Auto,
    /// This one.
    Named(Source),
}

impl SourceChoice {
    /// The names on the command line.
    pub fn names() -> impl Iterator<Item = &'static str> {
        let auto = std::iter::once(SourceChoice::Auto);
        let all = auto.chain(Source::ALL.iter().copied().map(SourceChoice::Named));
        all.map(SourceChoice::name)
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            SourceChoice::Auto => "auto",
            SourceChoice::Named(source) => source.name(),
        }
    }

    /// What a name on the command line stands for.
    pub fn from_name(name: &str) -> Option<Self> {
        let mut sources = Source::ALL.iter().copied();
        match name {
            "auto" => Some(SourceChoice::Auto),
            _ => sources
                .find(|source| source.name() == name)
                .map(SourceChoice::Named),
        }
    }
}

impl fmt::Display for SourceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
