//! The device's clocks, and what they read at one instant.

/// A kind of clock (virtio 1.4 §5.23.6.3, "Clock Types").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ClockKind {
    /// VIRTIO_RTC_CLOCK_UTC: steps at a leap second.
    Utc = 0,
    /// VIRTIO_RTC_CLOCK_TAI.
    Tai = 1,
    /// VIRTIO_RTC_CLOCK_MONOTONIC: never steps, never goes back.
    Monotonic = 2,
    /// VIRTIO_RTC_CLOCK_UTC_SMEARED: never steps at a leap second.
    UtcSmeared = 3,
    /// VIRTIO_RTC_CLOCK_UTC_MAYBE_SMEARED: nobody knows which of the two.
    UtcMaybeSmeared = 4,
}

impl ClockKind {
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

    /// Whether this host can stand in for another one's clock of that kind. What a UTC-like
    /// clock does at a leap second is the host's own; the others are alike everywhere.
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
    /// This backend never knows it.
    Unknown,
    /// Not now: the VM is paused or being restored, or its count is known no more.
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
    /// The guest's counter. Looked at only for [`Wants::Cross`](super::Wants::Cross).
    pub counter: Counter,
}

/// How the MONOTONIC clock follows from the host's, on whatever host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Monotonic {
    /// What is added to CLOCK_BOOTTIME, ns.
    pub(super) offset: i64,
    /// No reading is below; the highest that the driver knows of.
    pub(super) floor: u64,
}

impl Monotonic {
    pub(super) fn read(&self, now: &Sample) -> u64 {
        let reading = now.monotonic_ns.saturating_add_signed(self.offset);
        reading.max(self.floor)
    }

    /// The driver gets to know that it is this late.
    pub(super) fn raise(&mut self, reading: u64) {
        self.floor = self.floor.max(reading);
    }

    /// A clock that reads this now, and was never known to read more.
    pub(super) fn reading(reading: u64, now: &Sample) -> Self {
        let offset = i128::from(reading) - i128::from(now.monotonic_ns);
        // Past 292 years it stands still rather than go back.
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
