//! 32-bit Arm (Linux before 5.7: arch/arm/include/uapi/asm/kvm.h, KVM_REG_ARM_TIMER_*).

use super::Table;
use crate::Register::*;

pub(super) const TABLE: Table = Table {
    code: 1,
    name: "arm",
    arch: 0x40,
    registers: &[
        (TimerCtl, 0x4020_0000_000f_7181),
        (TimerCnt, 0x4030_0000_000f_0708),
        (TimerCval, 0x4030_0000_000f_0718),
        (PtimerCtl, 0x4020_0000_000f_7101),
        (PtimerCnt, 0x4030_0000_000f_0700),
        (PtimerCval, 0x4030_0000_000f_0710),
    ],
};
