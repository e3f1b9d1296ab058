//! Codes, flags and register ids.

/// Operation codes.
pub mod op {
    pub const GET_INFO: u16 = 0x0001;
    pub const CONFIGURE_VM: u16 = 0x0002;
    pub const GET_REG_LIST: u16 = 0x0010;
    pub const GET_REGS: u16 = 0x0011;
    pub const SET_REGS: u16 = 0x0012;
    pub const GET_VM: u16 = 0x0020;
    pub const SET_VM: u16 = 0x0021;
    pub const SET_COUNTER_OFFSET: u16 = 0x0022;
    pub const SET_COUNTER_ANCHOR: u16 = 0x0023;
    pub const PAUSE: u16 = 0x0030;
    pub const RESUME: u16 = 0x0031;
    pub const RESTORE_BEGIN: u16 = 0x0040;
    pub const RESTORE_DONE: u16 = 0x0041;
    pub const WAIT_RUN: u16 = 0x0042;
    pub const RESTORE_ABORT: u16 = 0x0043;
    pub const CONFIRM_RUN: u16 = 0x0044;
    pub const SET_TIME_PAGE: u16 = 0x0050;

    /// Every operation: its code, whether it names one vCPU, and a body length in bytes that it
    /// accepts.
    pub const ALL: [(u16, bool, usize); 17] = [
        (GET_INFO, false, 0),
        (CONFIGURE_VM, false, 16),
        (GET_REG_LIST, true, 0),
        (GET_REGS, true, 8),
        (SET_REGS, true, 16),
        (GET_VM, false, 8),
        (SET_VM, false, 56),
        (SET_COUNTER_OFFSET, false, 16),
        (SET_COUNTER_ANCHOR, false, 16),
        (PAUSE, false, 8),
        (RESUME, false, 0),
        (RESTORE_BEGIN, false, 24),
        (RESTORE_DONE, true, 0),
        (WAIT_RUN, true, 0),
        (RESTORE_ABORT, false, 0),
        (CONFIRM_RUN, false, 16),
        (SET_TIME_PAGE, false, 16),
    ];
}

/// Statuses.
pub mod status {
    pub const OK: u32 = 0;
    pub const ENOENT: u32 = 2;
    pub const ENXIO: u32 = 6;
    pub const E2BIG: u32 = 7;
    pub const EBUSY: u32 = 16;
    pub const EINVAL: u32 = 22;
    pub const ENODATA: u32 = 61;
    pub const EPROTO: u32 = 71;
    pub const EOPNOTSUPP: u32 = 95;
    pub const ETIMEDOUT: u32 = 110;
    pub const ESTALE: u32 = 116;
    pub const ECANCELED: u32 = 125;
}

/// Phases.
pub mod phase {
    pub const NEW: u32 = 0;
    pub const PAUSED: u32 = 1;
    pub const RUNNING: u32 = 2;
    pub const RESTORING: u32 = 3;
    pub const ARMED: u32 = 4;
}

/// Flags of CONFIGURE_VM.
pub mod configure {
    pub const CONFIRM: u8 = 1;
    pub const ONE_OFFSET: u8 = 2;
}

/// The header flag of SET_REGS and SET_VM.
pub const DONE: u16 = 1;

/// Flags of RESTORE_BEGIN.
pub mod restore {
    pub const AUTORUN: u32 = 1;
    pub const STRICT: u32 = 2;
    pub const ELAPSED: u32 = 4;
}

/// The `vcpu` of a VM-wide request.
pub const VM: u32 = 0xffff_ffff;

/// Register ids in the order CTL, CNT, CVAL, PCTL, PCNT, PCVAL.
pub const ARM64: [u64; 6] = [
    0x6030_0000_0013_df19,
    0x6030_0000_0013_df1a,
    0x6030_0000_0013_df02,
    0x6030_0000_0013_df11,
    0x6030_0000_0013_df01,
    0x6030_0000_0013_df12,
];
/// The same registers of the 32-bit ABI.
pub const ARM: [u64; 6] = [
    0x4020_0000_000f_7181,
    0x4030_0000_000f_0708,
    0x4030_0000_000f_0718,
    0x4020_0000_000f_7101,
    0x4030_0000_000f_0700,
    0x4030_0000_000f_0710,
];

/// TIMER_CTL.
pub const CTL: u64 = ARM64[0];
/// TIMER_CNT.
pub const CNT: u64 = ARM64[1];
/// TIMER_CVAL.
pub const CVAL: u64 = ARM64[2];
/// PTIMER_CTL.
pub const PCTL: u64 = ARM64[3];
/// PTIMER_CNT.
pub const PCNT: u64 = ARM64[4];
/// PTIMER_CVAL.
pub const PCVAL: u64 = ARM64[5];

/// Flags of `info`.
pub mod info_flag {
    pub const OFFSET_PINNED: u8 = 1;
    pub const ANCHORED: u8 = 2;
    pub const PHYS_VIRTUALISED: u8 = 4;
    pub const CONFIRM: u8 = 8;
    pub const ONE_OFFSET: u8 = 16;
}

/// What the host counter counts by, in `info`.
pub mod info_source {
    pub const NOT_TOLD: u8 = 0;
    pub const MONOTONIC: u8 = 1;
    pub const BOOTTIME: u8 = 2;
    pub const TSC: u8 = 3;
    pub const CNTVCT: u8 = 4;
}
