//! The timer registers, by what they are: a timeline and a role in it.
//!
//! Which of them a vCPU has, and under which ids, its ABI says ([`abi`](crate::abi)).

use crate::Timeline;

/// What a timer register is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Switches the timer on, masks its line, and says whether its condition is met
    /// ([`wire::ctl`](crate::wire::ctl)). Each vCPU has its own.
    Control,
    /// The count, which is the VM's.
    Count,
    /// The count from which on the timer's condition is met. Each vCPU has its own.
    Compare,
}

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $timeline:ident, $role:ident;)*) => {
        /// A register of a vCPU's virtual or physical timer.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Register {
            $($(#[$doc])* $name,)*
        }

        impl Register {
            /// All of them, in the order of [`wire::Vcpu`](crate::wire::Vcpu).
            pub const ALL: [Register; Register::COUNT] = [$(Register::$name),*];

            /// How many there are.
            pub const COUNT: usize = [$(Register::$name),*].len();

            /// The name, as SPEC.md writes it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Register::$name => $text,)*
                }
            }

            /// The register of this role in this timeline.
            pub const fn of(timeline: Timeline, role: Role) -> Self {
                match (timeline, role) {
                    $((Timeline::$timeline, Role::$role) => Register::$name,)*
                }
            }

            /// The timeline that the register belongs to.
            pub const fn timeline(self) -> Timeline {
                match self {
                    $(Register::$name => Timeline::$timeline,)*
                }
            }

            /// What the register is for.
            pub const fn role(self) -> Role {
                match self {
                    $(Register::$name => Role::$role,)*
                }
            }
        }
    };
}

registers! {
    /// The virtual timer's control (CNTV_CTL).
    TimerCtl = "TIMER_CTL", Virtual, Control;
    /// The virtual count (CNTVCT).
    TimerCnt = "TIMER_CNT", Virtual, Count;
    /// The virtual timer's compare value (CNTV_CVAL).
    TimerCval = "TIMER_CVAL", Virtual, Compare;
    /// The physical timer's control (CNTP_CTL).
    PtimerCtl = "PTIMER_CTL", Physical, Control;
    /// The physical count (CNTPCT).
    PtimerCnt = "PTIMER_CNT", Physical, Count;
    /// The physical timer's compare value (CNTP_CVAL).
    PtimerCval = "PTIMER_CVAL", Physical, Compare;
}

impl Register {
    /// The register of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.name() == name)
    }

    /// The place among [`Vcpu::values`](crate::wire::Vcpu::values).
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The register's bit among [`wire::present`](crate::wire::present).
    pub const fn present_bit(self) -> u32 {
        1 << self.index()
    }
}

impl core::fmt::Display for Register {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_is_its_timeline_and_its_role() {
        for register in Register::ALL {
            let same = Register::of(register.timeline(), register.role());
            assert_eq!(same, register);
        }
    }
}
