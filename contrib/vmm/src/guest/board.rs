//! What the guest and the VMM write to each other in the guest's RAM.
//!
//! The guest's program takes every offset from these types, so the two cannot differ.

/// Most vCPUs that a board has place for, and that MPIDR_EL1.Aff0 can number (GICv3).
pub(crate) const MAX_VCPUS: usize = 16;

/// The page that the guest and the VMM share.
#[repr(C)]
pub(crate) struct Board {
    /// The largest reading of the counter that a vCPU has published.
    pub(crate) published: u64,
    /// The number of the round, which the VMM increases while no vCPU runs.
    pub(crate) round: u64,
    /// From one timer interrupt to the next, ticks.
    pub(crate) period: u64,
    /// The vCPUs, by bit, that vCPU 0 is to turn on (PSCI CPU_ON).
    pub(crate) turn_on: u64,
    /// The vCPUs, by bit, that are to turn themselves off (PSCI CPU_OFF).
    pub(crate) turn_off: u64,
    /// Not 0: vCPU 0 is to reset the guest (PSCI SYSTEM_RESET).
    pub(crate) reset: u64,
    /// One for each vCPU.
    pub(crate) records: [Record; MAX_VCPUS],
}

/// What one vCPU has observed since it was first turned on. Only this vCPU writes it.
#[repr(C, align(64))]
pub(crate) struct Record {
    /// Readings of the counter.
    pub(crate) readings: u64,
    /// The last one.
    pub(crate) last: u64,
    /// The first one of the round `round`. A vCPU that was stopped just before a reading notes the
    /// one after that, because the round's number is loaded first; it checks both.
    pub(crate) first: u64,
    /// The last round in which this vCPU has read the counter.
    pub(crate) round: u64,
    /// Readings below one that had been published before.
    pub(crate) below_published: u64,
    /// Readings below this vCPU's previous one.
    pub(crate) below_own: u64,
    /// The largest such difference, ticks.
    pub(crate) worst: u64,
    /// Interrupts of the virtual timer.
    pub(crate) interrupts: u64,
    /// Those that came while the count was below CVAL.
    pub(crate) early: u64,
    /// The longest that an interrupt came after its CVAL, ticks.
    pub(crate) latest: u64,
    /// The compare value (CVAL) that the timer is set to.
    pub(crate) armed: u64,
    /// Other interrupts.
    pub(crate) spurious: u64,
    /// How often this vCPU began at its entry point.
    pub(crate) starts: u64,
    /// Not 0 while this vCPU is turned off by itself.
    pub(crate) is_off: u64,
    /// ESR_EL1 of an exception that the guest does not expect.
    pub(crate) fault: u64,
    /// ELR_EL1 of that exception.
    pub(crate) fault_at: u64,
}
