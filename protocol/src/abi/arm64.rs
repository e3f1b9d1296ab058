//! 64-bit Arm (Linux: arch/arm64/include/uapi/asm/kvm.h, KVM_REG_ARM_TIMER_*).
//!
//! TIMER_CNT bears the encoding of CNTV_CVAL_EL0 and TIMER_CVAL that of CNTVCT_EL0: an accident of
//! the KVM ABI that is part of it permanently. The physical timer's ids are the right way round.

use super::Table;
use crate::Register::*;

pub(super) const TABLE: Table = Table {
    code: 0,
    name: "arm64",
    arch: 0x60,
    registers: &[
        (TimerCtl, 0x6030_0000_0013_df19),
        (TimerCnt, 0x6030_0000_0013_df1a),
        (TimerCval, 0x6030_0000_0013_df02),
        (PtimerCtl, 0x6030_0000_0013_df11),
        (PtimerCnt, 0x6030_0000_0013_df01),
        (PtimerCval, 0x6030_0000_0013_df12),
    ],
};
