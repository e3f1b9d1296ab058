//! The device's clocks, and what they read at one instant.

/// A kind of clock (virtio 1.4 §5.23.6.3, "Clock Types").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ClockKind {
    /// VIRTIO_RTC_CLOCK_UTC: steps at a leap second.
    Utc = 0,
    /// VIRTIO_RTC_CLOCK_TAI.
    Tai = 1,
    /// VIRTIO_RTC_CLOCK_MONOTONIC: never steps, never decreases.
    Monotonic = 2,
    /// VIRTIO_RTC_CLOCK_UTC_SMEARED: never steps at a leap second.
    UtcSmeared = 3,
    /// VIRTIO_RTC_CLOCK_UTC_MAYBE_SMEARED: either of the two.
    UtcMaybeSmeared = 4,
}

/// A clock of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostClock {
    /// CLOCK_REALTIME.
    Realtime,
    /// CLOCK_TAI, where the kernel knows its distance from UTC.
    Tai,
    /// CLOCK_BOOTTIME.
    Boottime,
}

impl ClockKind {
    /// The host's clock that clocks of this kind follow.
    pub fn follows(self) -> HostClock {
        match self {
            ClockKind::Utc | ClockKind::UtcSmeared | ClockKind::UtcMaybeSmeared => {
                HostClock::Realtime
            }
            ClockKind::Tai => HostClock::Tai,
            ClockKind::Monotonic => HostClock::Boottime,
        }
    }

    /// The kind of this wire value, as in `self as u8`.
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(ClockKind::Utc),
            1 => Some(ClockKind::Tai),
            2 => Some(ClockKind::Monotonic),
            3 => Some(ClockKind::UtcSmeared),
            4 => Some(ClockKind::UtcMaybeSmeared),
            _ => None,
        }
    }

    /// Whether a host with these clocks can continue another host's clock of this kind. What a
    /// UTC-like clock does at a leap second depends on the host; the others are the same
    /// everywhere.
    pub(super) fn is_served_by(self, own: impl IntoIterator<Item = ClockKind>) -> bool {
        match self {
            ClockKind::Tai | ClockKind::Monotonic => true,
            utc_like => own.into_iter().any(|kind| kind == utc_like),
        }
    }
}

/// The guest's ARM_VCT, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Counter {
    /// This backend does not know it at all.
    Unknown,
    /// It is not known now: the VM is paused or being restored.
    #[default]
    Withheld,
    /// The count.
    At(u64),
}

/// What the host's clocks and the guest's counter read at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// CLOCK_REALTIME, ns since 1970.
    pub utc_ns: u64,
    /// CLOCK_TAI, ns since 1970, where the kernel knows its distance from UTC.
    pub tai_ns: Option<u64>,
    /// CLOCK_BOOTTIME, ns.
    pub monotonic_ns: u64,
    /// The guest's counter. Used only for [`Needs::Cross`].
    pub counter: Counter,
}

impl Sample {
    fn of(&self, clock: HostClock) -> Option<u64> {
        match clock {
            HostClock::Realtime => Some(self.utc_ns),
            HostClock::Tai => self.tai_ns,
            HostClock::Boottime => Some(self.monotonic_ns),
        }
    }
}

/// What the shell is to sample for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// One clock of the host.
    Clock(HostClock),
    /// All clocks of the host, and not the guest's counter.
    Time,
    /// The clocks of the host and the guest's counter, at one instant.
    Cross,
}

/// What the shell sampled for a request. A clock that was not sampled cannot be read by mistake:
/// the request is answered with EIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampled {
    /// Nothing.
    Nothing,
    /// One clock of the host, ns; `None` if its reading is not known.
    Clock(HostClock, Option<u64>),
    /// Everything. For [`Needs::Time`] the counter may be anything.
    All(Sample),
}

impl Sampled {
    /// What this clock of the host reads, ns; `None` if that is not known, or was not sampled.
    pub(super) fn of(&self, clock: HostClock) -> Option<u64> {
        match self {
            Sampled::Nothing => None,
            Sampled::Clock(sampled, reading) => reading.filter(|_| *sampled == clock),
            Sampled::All(sample) => sample.of(clock),
        }
    }

    /// The guest's counter.
    pub(super) fn counter(&self) -> Counter {
        match self {
            Sampled::Nothing | Sampled::Clock(..) => Counter::Withheld,
            Sampled::All(sample) => sample.counter,
        }
    }
}

/// How the MONOTONIC clock follows from the host's, whichever host that is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Monotonic {
    /// What is added to CLOCK_BOOTTIME, ns.
    pub(super) offset: i64,
    /// No reading is below this: the highest that the driver has seen.
    pub(super) floor: u64,
}

impl Monotonic {
    /// What the clock reads when CLOCK_BOOTTIME reads this, ns.
    pub(super) fn read(&self, boottime_ns: u64) -> u64 {
        let reading = boottime_ns.saturating_add_signed(self.offset);
        reading.max(self.floor)
    }

    /// The driver has seen the clock read this.
    pub(super) fn raise(&mut self, reading: u64) {
        self.floor = self.floor.max(reading);
    }

    /// A clock that reads this when CLOCK_BOOTTIME reads `boottime_ns`, and never read more.
    pub(super) fn reading(reading: u64, boottime_ns: u64) -> Self {
        let offset = i128::from(reading) - i128::from(boottime_ns);
        // Past 292 years it stands still rather than decrease.
        let offset = i64::try_from(offset).unwrap_or(match offset > 0 {
            true => i64::MAX,
            false => i64::MIN,
        });
        Monotonic {
            offset,
            floor: reading,
        }
    }
}
