//! One clock's alarm (virtio 1.4 §5.23.6.6): when it expires, and whether the driver knows.

/// Where an alarm is between being set and being reported.
///
/// A pending expiry is dropped when it becomes obsolete: the driver disables or sets the alarm, or
/// the clock steps back to before the alarm's time, so that it will expire again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AlarmState {
    /// It never expires.
    #[default]
    Disabled = 0,
    /// Its time has not come yet.
    Waiting = 1,
    /// It expired, and the notification is pending.
    Due = 2,
    /// It expired, and that was reported. It stays enabled: if the clock steps back it will expire
    /// again.
    Told = 3,
}

impl AlarmState {
    /// The state of this code, as in `self as u8`.
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(AlarmState::Disabled),
            1 => Some(AlarmState::Waiting),
            2 => Some(AlarmState::Due),
            3 => Some(AlarmState::Told),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Alarm {
    /// In the clock's own time, ns.
    pub(super) time: u64,
    pub(super) state: AlarmState,
}

impl Alarm {
    pub(super) fn enabled(&self) -> bool {
        self.state != AlarmState::Disabled
    }

    /// Whether its time has come for a clock that reads this.
    pub(super) fn is_reached(&self, reading: u64) -> bool {
        reading >= self.time
    }

    /// The driver enables or disables it, or the device is reset while it is enabled. An alarm
    /// whose time is past already expires at once. While the clock cannot be read, the alarm waits.
    pub(super) fn arm(&mut self, enabled: bool, reading: Option<u64>) {
        self.state = match enabled {
            true => AlarmState::Waiting,
            false => AlarmState::Disabled,
        };
        if let Some(reading) = reading {
            self.see(reading);
        }
    }

    /// The clock reads this now.
    pub(super) fn see(&mut self, reading: u64) {
        self.state = match (self.state, self.is_reached(reading)) {
            (AlarmState::Waiting, true) => AlarmState::Due,
            (AlarmState::Due | AlarmState::Told, false) => AlarmState::Waiting,
            (state, _) => state,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeing(state: AlarmState, reading: u64) -> AlarmState {
        let mut alarm = Alarm { time: 100, state };
        alarm.see(reading);
        alarm.state
    }

    #[test]
    fn an_alarm_expires_at_its_time_and_not_before() {
        assert_eq!(seeing(AlarmState::Waiting, 99), AlarmState::Waiting);
        assert_eq!(seeing(AlarmState::Waiting, 100), AlarmState::Due);
        assert_eq!(seeing(AlarmState::Waiting, u64::MAX), AlarmState::Due);
    }

    #[test]
    fn a_step_back_rearms_it_and_time_that_goes_on_does_not() {
        for state in [AlarmState::Due, AlarmState::Told] {
            assert_eq!(seeing(state, 99), AlarmState::Waiting);
            assert_eq!(seeing(state, 100), state);
        }
    }

    #[test]
    fn a_disabled_one_does_nothing() {
        assert_eq!(seeing(AlarmState::Disabled, 99), AlarmState::Disabled);
        assert_eq!(seeing(AlarmState::Disabled, 100), AlarmState::Disabled);
    }

    #[test]
    fn every_state_is_found_again_by_its_code() {
        for code in 0..=u8::MAX {
            let state = AlarmState::from_code(code);
            assert_eq!(state.map(|state| state as u8), (code < 4).then_some(code));
        }
    }
}
