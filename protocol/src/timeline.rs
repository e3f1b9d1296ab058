//! The two timelines of a VM: virtual and physical time, each with a count and, per vCPU, a timer.

/// Which of the VM's counts a register or a timer goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Timeline {
    /// Virtual time: on Arm CNTVCT and the virtual timer.
    Virtual,
    /// Physical time: on Arm CNTPCT and the physical timer.
    Physical,
}

impl Timeline {
    /// Both, in the order of the wire's line bits and event codes.
    pub const ALL: [Timeline; 2] = [Timeline::Virtual, Timeline::Physical];

    /// How many there are.
    pub const COUNT: usize = Timeline::ALL.len();

    /// The place in an array with an element for each timeline.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The value of [`Event::timer`](crate::wire::Event::timer).
    pub const fn code(self) -> u16 {
        self as u16
    }

    /// The bit of the timer's line in [`SetRegsResult::lines`](crate::wire::SetRegsResult::lines).
    pub const fn line_bit(self) -> u32 {
        1 << self.code()
    }
}
