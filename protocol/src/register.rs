//! The timer registers of both ABIs.
//!
//! The ids are those of KVM_GET_ONE_REG and KVM_SET_ONE_REG
//! (Linux: Documentation/virt/kvm/api.rst, arch/arm64/include/uapi/asm/kvm.h), so that a VMM
//! copies registers through without translating them.
//!
//! On arm64 TIMER_CNT bears the encoding of CNTV_CVAL_EL0 and TIMER_CVAL that of CNTVCT_EL0.
//! That is an accident of the KVM ABI which is part of it for good; the physical timer's
//! ids are the right way round.

use crate::wire::present;

/// The ABI that a VM's registers follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Abi {
    /// 64-bit Arm; every timer register is a U64.
    Arm64,
    /// 32-bit Arm; the control registers are U32, the rest U64.
    Arm,
}

impl Abi {
    /// The value on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Abi::Arm64 => 0,
            Abi::Arm => 1,
        }
    }

    /// The ABI of a value on the wire.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Abi::Arm64),
            1 => Some(Abi::Arm),
            _ => None,
        }
    }

    /// Bits 63–56 of every id of this ABI (KVM_REG_ARM64, KVM_REG_ARM).
    const fn arch_field(self) -> u64 {
        match self {
            Abi::Arm64 => 0x60,
            Abi::Arm => 0x40,
        }
    }

    const fn other(self) -> Self {
        match self {
            Abi::Arm64 => Abi::Arm,
            Abi::Arm => Abi::Arm64,
        }
    }
}

impl core::fmt::Display for Abi {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Abi::Arm64 => "arm64",
            Abi::Arm => "arm",
        })
    }
}

/// A register of a vCPU's virtual or physical timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Register {
    /// CNTV_CTL: the virtual timer's control.
    TimerCtl,
    /// CNTVCT: the virtual count, which is the VM's.
    TimerCnt,
    /// CNTV_CVAL: the virtual timer's compare value.
    TimerCval,
    /// CNTP_CTL: the physical timer's control.
    PtimerCtl,
    /// CNTPCT: the physical count, which is the VM's.
    PtimerCnt,
    /// CNTP_CVAL: the physical timer's compare value.
    PtimerCval,
}

/// Why an id names no register of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BadId {
    /// It is the other architecture's, or has the wrong size: EINVAL.
    Invalid,
    /// It is nothing this device knows: ENOENT.
    Unknown,
}

/// Bits 55–52 of an id: log2 of the register's size in bytes (KVM_REG_SIZE_MASK).
const SIZE_MASK: u64 = 0x00f0_0000_0000_0000;

impl Register {
    /// All six, in the order of [`wire::Vcpu`](crate::wire::Vcpu).
    pub const ALL: [Register; 6] = [
        Register::TimerCtl,
        Register::TimerCnt,
        Register::TimerCval,
        Register::PtimerCtl,
        Register::PtimerCnt,
        Register::PtimerCval,
    ];

    /// The KVM id of this register.
    pub const fn id(self, abi: Abi) -> u64 {
        match (abi, self) {
            (Abi::Arm64, Register::TimerCtl) => 0x6030_0000_0013_df19,
            (Abi::Arm64, Register::TimerCnt) => 0x6030_0000_0013_df1a,
            (Abi::Arm64, Register::TimerCval) => 0x6030_0000_0013_df02,
            (Abi::Arm64, Register::PtimerCtl) => 0x6030_0000_0013_df11,
            (Abi::Arm64, Register::PtimerCnt) => 0x6030_0000_0013_df01,
            (Abi::Arm64, Register::PtimerCval) => 0x6030_0000_0013_df12,
            (Abi::Arm, Register::TimerCtl) => 0x4020_0000_000f_7181,
            (Abi::Arm, Register::TimerCnt) => 0x4030_0000_000f_0708,
            (Abi::Arm, Register::TimerCval) => 0x4030_0000_000f_0718,
            (Abi::Arm, Register::PtimerCtl) => 0x4020_0000_000f_7101,
            (Abi::Arm, Register::PtimerCnt) => 0x4030_0000_000f_0700,
            (Abi::Arm, Register::PtimerCval) => 0x4030_0000_000f_0710,
        }
    }

    /// The register of an id.
    ///
    /// # Errors
    ///
    /// [`BadId`] where a VM of this ABI has no such register.
    pub fn from_id(id: u64, abi: Abi) -> Result<Self, BadId> {
        if let Some(register) = Self::ALL.into_iter().find(|r| r.id(abi) == id) {
            return Ok(register);
        }
        let wrong_size = Self::ALL
            .into_iter()
            .any(|r| (r.id(abi) ^ id) & !SIZE_MASK == 0);
        if wrong_size || id >> 56 == abi.other().arch_field() {
            Err(BadId::Invalid)
        } else {
            Err(BadId::Unknown)
        }
    }

    /// The name, as SPEC.md writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Register::TimerCtl => "TIMER_CTL",
            Register::TimerCnt => "TIMER_CNT",
            Register::TimerCval => "TIMER_CVAL",
            Register::PtimerCtl => "PTIMER_CTL",
            Register::PtimerCnt => "PTIMER_CNT",
            Register::PtimerCval => "PTIMER_CVAL",
        }
    }

    /// The register of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.name() == name)
    }

    /// The register's bit among [`wire::present`](crate::wire::present).
    pub const fn present_bit(self) -> u32 {
        match self {
            Register::TimerCtl => present::CTL,
            Register::TimerCnt => present::CNT,
            Register::TimerCval => present::CVAL,
            Register::PtimerCtl => present::PCTL,
            Register::PtimerCnt => present::PCNT,
            Register::PtimerCval => present::PCVAL,
        }
    }

    /// The largest value that the register takes.
    pub const fn max_value(self, abi: Abi) -> u64 {
        match (abi, self) {
            (Abi::Arm, Register::TimerCtl | Register::PtimerCtl) => u32::MAX as u64,
            _ => u64::MAX,
        }
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
    fn names_and_ids_go_both_ways_in_both_abis() {
        for abi in [Abi::Arm64, Abi::Arm] {
            assert_eq!(Abi::from_code(abi.code()), Some(abi));
            for register in Register::ALL {
                assert_eq!(Register::from_id(register.id(abi), abi), Ok(register));
                assert_eq!(Register::from_name(register.name()), Some(register));
                assert_eq!(register.id(abi) >> 56, abi.arch_field());
            }
        }
        assert_eq!(Register::from_name("TIMER_TVAL"), None);
    }

    #[test]
    fn the_other_architectures_id_is_invalid() {
        for register in Register::ALL {
            let arm64 = Register::from_id(register.id(Abi::Arm), Abi::Arm64);
            let arm = Register::from_id(register.id(Abi::Arm64), Abi::Arm);
            assert_eq!((arm64, arm), (Err(BadId::Invalid), Err(BadId::Invalid)));
        }
        // The other architecture's prefix over this one's register, as KVM refuses it.
        let mixed = Register::from_id(0x4030_0000_0013_df19, Abi::Arm64);
        assert_eq!(mixed, Err(BadId::Invalid));
    }

    #[test]
    fn a_wrong_size_is_invalid_and_any_other_id_unknown() {
        let u32_ctl = Register::from_id(0x6020_0000_0013_df19, Abi::Arm64);
        let u64_ctl = Register::from_id(0x4030_0000_000f_7181, Abi::Arm);
        assert_eq!(u32_ctl, Err(BadId::Invalid));
        assert_eq!(u64_ctl, Err(BadId::Invalid));
        for id in [0, u64::MAX, 0x6030_0000_0013_df1f, 0x6030_0000_0013_e703] {
            assert_eq!(Register::from_id(id, Abi::Arm64), Err(BadId::Unknown));
        }
    }
}
