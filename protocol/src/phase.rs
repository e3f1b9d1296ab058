//! The phases of a VM's life (SPEC.md, "Phases").

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Not configured yet.
    New,
    /// Configured; no vCPU may run.
    Paused,
    /// The vCPUs may run.
    Running,
    /// A restore is open; no vCPU may run until every one of them is done.
    Restoring,
    /// Both clocks count and their offsets are decided. No vCPU may run until the VMM has confirmed
    /// that these offsets are where its guest's counter is made (CONFIRM_RUN).
    Armed,
}

impl Phase {
    /// Every phase of this version, in code order.
    pub const ALL: [Phase; 5] = [
        Phase::New,
        Phase::Paused,
        Phase::Running,
        Phase::Restoring,
        Phase::Armed,
    ];

    /// The value on the wire.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The phase of a value on the wire.
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Phase::New),
            1 => Some(Phase::Paused),
            2 => Some(Phase::Running),
            3 => Some(Phase::Restoring),
            4 => Some(Phase::Armed),
            _ => None,
        }
    }
}

impl core::fmt::Display for Phase {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Phase::New => "NEW",
            Phase::Paused => "PAUSED",
            Phase::Running => "RUNNING",
            Phase::Restoring => "RESTORING",
            Phase::Armed => "ARMED",
        })
    }
}

/// A set of phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Phases(u32);

impl Phases {
    /// Every phase.
    pub const ANY: Phases = Phases::of(&Phase::ALL);
    /// Every phase of a VM that is configured.
    pub const NOT_NEW: Phases = Phases(Phases::ANY.0 & !Phases::of(&[Phase::New]).0);

    /// The set of these phases.
    pub const fn of(phases: &[Phase]) -> Self {
        let mut set = 0;
        let mut index = 0;
        while index < phases.len() {
            set |= 1 << phases[index].code();
            index += 1;
        }
        Phases(set)
    }

    /// Whether `phase` is one of them.
    pub const fn contains(self, phase: Phase) -> bool {
        self.0 & 1 << phase.code() != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_have_the_codes_of_the_specification() {
        for (code, phase) in (0..).zip(Phase::ALL) {
            assert_eq!(phase.code(), code);
            assert_eq!(Phase::from_code(code), Some(phase));
        }
        assert_eq!(Phase::from_code(5), None);
    }

    #[test]
    fn a_set_contains_the_phases_it_was_made_of_and_no_other() {
        let set = Phases::of(&[Phase::Paused, Phase::Restoring]);
        let contained = Phase::ALL.map(|phase| set.contains(phase));
        assert_eq!(contained, [false, true, false, true, false]);
        assert!(Phase::ALL.iter().all(|phase| Phases::ANY.contains(*phase)));
        let configured = Phase::ALL.map(|phase| Phases::NOT_NEW.contains(phase));
        assert_eq!(configured, [false, true, true, true, true]);
    }
}
