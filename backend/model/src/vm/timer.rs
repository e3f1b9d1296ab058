//! One timer: control and compare value (Arm ARM, CNTV_CTL_EL0 and CNTV_CVAL_EL0).

use vhost_user_timer_protocol::wire::ctl;

use super::clock::ByTimeline;

/// The timers of one vCPU.
pub(super) type Timers = ByTimeline<Timer>;

/// A vCPU's timer in one timeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Timer {
    /// ENABLE and IMASK; nothing else is stored.
    control: u8,
    /// The count from which on the timer's condition is met.
    pub(super) cval: u64,
}

impl Timer {
    /// A timer with this control and compare value.
    pub(super) fn new(control: u64, cval: u64) -> Self {
        let mut timer = Timer { control: 0, cval };
        timer.set_control(control);
        timer
    }

    /// Stores ENABLE and IMASK; drops the rest, ISTATUS included.
    pub(super) fn set_control(&mut self, value: u64) {
        self.control = (value & (ctl::ENABLE | ctl::IMASK)) as u8;
    }

    /// ENABLE and IMASK, as stored.
    pub(super) fn stored_control(self) -> u8 {
        self.control
    }

    /// What the control register reads: ISTATUS says that the timer is on and its condition
    /// met.
    pub(super) fn control(self, count: u64) -> u64 {
        let control = u64::from(self.control);
        if control & ctl::ENABLE != 0 && count >= self.cval {
            control | ctl::ISTATUS
        } else {
            control
        }
    }

    /// Whether the line rises when the count reaches the compare value.
    pub(super) fn armed(self) -> bool {
        u64::from(self.control) & (ctl::ENABLE | ctl::IMASK) == ctl::ENABLE
    }

    /// The level of the timer's interrupt line.
    pub(super) fn line(self, count: u64) -> bool {
        self.armed() && count >= self.cval
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istatus_is_enable_and_count_at_or_past_cval_whatever_the_mask() {
        for control in 0..4 {
            for (count, met) in [(9, false), (10, true), (11, true), (u64::MAX, true)] {
                let mut timer = Timer::default();
                timer.set_control(control | 0xfffc);
                timer.cval = 10;
                let on = control & 1 != 0;
                let istatus = if on && met { 4 } else { 0 };
                assert_eq!(timer.control(count), control | istatus);
                assert_eq!(timer.line(count), control == 1 && met);
            }
        }
    }
}
