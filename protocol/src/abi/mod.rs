//! The ABIs: which timer registers a vCPU has, and the KVM id of each.
//!
//! One file an ABI, with one table: a row for each register. The ids are those of KVM_GET_ONE_REG
//! and KVM_SET_ONE_REG (Linux: Documentation/virt/kvm/api.rst), so that a VMM copies registers
//! through without translating them. An id says of itself which architecture it belongs to and how
//! large the register is.

mod arm;
mod arm64;

use crate::Register;

/// What there is to know of an ABI.
#[derive(Clone, Copy, Debug)]
struct Table {
    /// The value on the wire, in state files and in device state.
    code: u8,
    name: &'static str,
    /// Bits 63–56 of every id.
    arch: u8,
    /// The registers of a vCPU and their ids, in the order of GET_REG_LIST's answer.
    registers: &'static [(Register, u64)],
}

macro_rules! abis {
    ($($(#[$doc:meta])* $name:ident = $module:ident;)*) => {
        /// The ABI that a VM's registers follow.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Abi {
            $($(#[$doc])* $name,)*
        }

        impl Abi {
            /// Every ABI of this version.
            pub const ALL: &[Abi] = &[$(Abi::$name),*];

            const fn table(self) -> &'static Table {
                match self {
                    $(Abi::$name => &$module::TABLE,)*
                }
            }
        }
    };
}

abis! {
    /// 64-bit Arm; every timer register is a U64.
    Arm64 = arm64;
    /// 32-bit Arm; the control registers are U32, the rest U64.
    Arm = arm;
}

/// Why an id names no register of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BadId {
    /// It is another ABI's, or has the wrong size: EINVAL.
    Invalid,
    /// It is nothing this device knows: ENOENT.
    Unknown,
}

/// Bits 55–52 of an id: log2 of the register's size in bytes (KVM_REG_SIZE_MASK).
const SIZE_MASK: u64 = 0x00f0_0000_0000_0000;
const SIZE_SHIFT: u32 = 52;

/// Bits 63–56 of an id (KVM_REG_ARCH_MASK).
const ARCH_SHIFT: u32 = 56;

impl Abi {
    /// The value on the wire.
    pub const fn code(self) -> u8 {
        self.table().code
    }

    /// The ABI of a value on the wire.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|abi| abi.code() == code)
    }

    /// The timer registers of a vCPU and their KVM ids, in the order of GET_REG_LIST's answer.
    pub const fn registers(self) -> &'static [(Register, u64)] {
        self.table().registers
    }

    /// The registers of a vCPU, as [`present`](crate::wire::present) bits.
    pub fn present(self) -> u32 {
        self.registers()
            .iter()
            .fold(0, |bits, (register, _)| bits | register.present_bit())
    }
}

impl core::fmt::Display for Abi {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.table().name)
    }
}

impl Register {
    /// The KVM id of this register; 0, which is no register's, where the ABI has no such register.
    pub const fn id(self, abi: Abi) -> u64 {
        let registers = abi.registers();
        let mut row = 0;
        while row < registers.len() {
            if registers[row].0 as usize == self as usize {
                return registers[row].1;
            }
            row += 1;
        }
        0
    }

    /// The register of an id.
    ///
    /// # Errors
    ///
    /// [`BadId`] where a VM of this ABI has no such register.
    pub fn from_id(id: u64, abi: Abi) -> Result<Self, BadId> {
        let registers = abi.registers();
        if let Some((register, _)) = registers.iter().find(|(_, own)| *own == id) {
            return Ok(*register);
        }
        let wrong_size = registers
            .iter()
            .any(|(_, own)| (own ^ id) & !SIZE_MASK == 0);
        let arch = |abi: &Abi| u64::from(abi.table().arch);
        let foreign = Abi::ALL
            .iter()
            .any(|other| *other != abi && id >> ARCH_SHIFT == arch(other));
        match wrong_size || foreign {
            true => Err(BadId::Invalid),
            false => Err(BadId::Unknown),
        }
    }

    /// The largest value that the register takes, by the size that its id names.
    pub const fn max_value(self, abi: Abi) -> u64 {
        let bits = 8 << ((self.id(abi) & SIZE_MASK) >> SIZE_SHIFT);
        match 64_u32.checked_sub(bits) {
            Some(rest) => u64::MAX >> rest,
            None => u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_go_both_ways_in_every_abi() {
        for &abi in Abi::ALL {
            assert_eq!(Abi::from_code(abi.code()), Some(abi));
            for &(register, id) in abi.registers() {
                assert_eq!(register.id(abi), id);
                assert_eq!(Register::from_id(id, abi), Ok(register));
                assert_eq!(Register::from_name(register.name()), Some(register));
                assert_eq!(id >> ARCH_SHIFT, u64::from(abi.table().arch));
            }
        }
        assert_eq!(Abi::from_code(Abi::ALL.len() as u8), None);
        assert_eq!(Register::from_name("TIMER_TVAL"), None);
    }

    #[test]
    fn arm64_and_arm_have_all_six_registers() {
        for abi in [Abi::Arm64, Abi::Arm] {
            let registers: Vec<_> = abi.registers().iter().map(|row| row.0).collect();
            assert_eq!(registers, Register::ALL);
            assert_eq!(abi.present(), 0x3f);
        }
    }

    #[test]
    fn another_abis_id_is_invalid() {
        for &abi in Abi::ALL {
            for &other in Abi::ALL.iter().filter(|other| **other != abi) {
                for &(_, id) in other.registers() {
                    assert_eq!(Register::from_id(id, abi), Err(BadId::Invalid));
                }
            }
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

    #[test]
    fn the_largest_value_is_that_of_the_size_in_the_id() {
        for register in Register::ALL {
            assert_eq!(register.max_value(Abi::Arm64), u64::MAX);
            let control = register.role() == crate::Role::Control;
            let largest = if control { u32::MAX.into() } else { u64::MAX };
            assert_eq!(register.max_value(Abi::Arm), largest);
        }
    }
}
