//! A VM's timers as data: what a VMM puts into its migration stream or its snapshot.
//!
//! [`SavedVm`] has a byte form of its own, with a version and a checksum
//! ([`to_bytes`](SavedVm::to_bytes)); with the feature `serde` it is a value of the VMM's own
//! formats as well.

mod bytes;
#[cfg(feature = "serde")]
mod serde;
#[cfg(test)]
mod tests;

use std::fmt;
use std::num::NonZeroU64;
use std::time::{SystemTime, UNIX_EPOCH};

use vhost_user_timer_protocol::wire::{self, present};
use vhost_user_timer_protocol::{Abi, MAX_VCPUS, Register};

use crate::RegValue;

/// A VM's timers, saved: every vCPU's registers, and what they mean.
///
/// It comes from [`Frontend::save`](crate::Frontend::save), or from registers that a VMM has read
/// elsewhere ([`SavedVm::new`]), and goes to [`Frontend::restore`](crate::Frontend::restore).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedVm {
    abi: Abi,
    frequency: NonZeroU64,
    realtime_ns: u64,
    virt_count: u64,
    phys_count: u64,
    /// At least one and at most [`MAX_VCPUS`], each at the place of its index.
    vcpus: Vec<SavedVcpu>,
}

/// One vCPU's timer registers.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SavedVcpu(wire::Vcpu);

/// Why something is no saved VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SavedVmError {
    /// An id that is none of the ABI's timer registers.
    #[error("register {id:#018x} is no timer register of {abi}")]
    UnknownRegister {
        /// The KVM id.
        id: u64,
        /// The ABI.
        abi: Abi,
    },
    /// A register that is given twice.
    #[error("register {0:#018x} is given twice")]
    RepeatedRegister(u64),
    /// No vCPU, or more than a VM can have.
    #[error("a VM of {0} vCPUs: must be 1 to {MAX_VCPUS}")]
    Vcpus(usize),
    /// The vCPUs are not each there once, by index from 0 on.
    #[error("vCPU {found} is where vCPU {expected} must be")]
    VcpuOrder {
        /// The index that must be there.
        expected: u32,
        /// The index that is there.
        found: u32,
    },
    /// A counter frequency of 0 Hz.
    #[error("a counter frequency of 0 Hz")]
    Frequency,
    /// Bytes that do not begin as a saved VM does.
    #[error("these bytes are no saved VM: they do not begin with its magic number")]
    Magic,
    /// A version of the byte form that this library does not know.
    #[error("a saved VM of version {0}: this library knows version 1")]
    Version(u32),
    /// More or fewer bytes than the saved VM says that it has.
    #[error("a saved VM of {expected} bytes in {found} bytes")]
    Length {
        /// The length that it says, in bytes.
        expected: usize,
        /// The length that is there, in bytes.
        found: usize,
    },
    /// Bytes that changed since they were written.
    #[error("the saved VM's checksum is {found:#010x}, its bytes' {expected:#010x}")]
    Checksum {
        /// Of the bytes.
        expected: u32,
        /// In the bytes.
        found: u32,
    },
    /// An ABI of an unknown code.
    #[error("a saved VM of unknown ABI {0}")]
    Abi(u32),
    /// Reserved bytes, or bits for registers, that are not zero.
    #[error("a saved VM with values that version 1 does not have")]
    Reserved,
}

/// CLOCK_REALTIME now, ns since 1970.
pub(crate) fn realtime_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    let ns = since_1970.map_or(0, |since| since.as_nanos());
    u64::try_from(ns).unwrap_or(u64::MAX)
}

impl SavedVm {
    /// A VM of registers that were read elsewhere, such as from KVM: vCPU `n` is `vcpus[n]`. The
    /// counter's `frequency` is in Hz.
    ///
    /// The counts of the VM are the largest that a vCPU has. The time of the save is not known
    /// until [`saved_at`](Self::saved_at) tells it.
    ///
    /// # Errors
    ///
    /// [`SavedVmError::Vcpus`] and [`SavedVmError::VcpuOrder`].
    pub fn new(
        abi: Abi,
        frequency: NonZeroU64,
        vcpus: Vec<SavedVcpu>,
    ) -> Result<Self, SavedVmError> {
        let largest = |register| vcpus.iter().filter_map(|vcpu| vcpu.get(register)).max();
        let virt_count = largest(Register::TimerCnt).unwrap_or(0);
        let phys_count = largest(Register::PtimerCnt).unwrap_or(0);
        SavedVm {
            abi,
            frequency,
            realtime_ns: 0,
            virt_count,
            phys_count,
            vcpus,
        }
        .checked()
    }

    /// Says when the registers were read: CLOCK_REALTIME, ns since 1970.
    #[must_use]
    pub fn saved_at(mut self, realtime_ns: u64) -> Self {
        self.realtime_ns = realtime_ns;
        self
    }

    /// What the backend answered to a save at `realtime_ns`.
    pub(crate) fn read(abi: Abi, realtime_ns: u64, vm: crate::Vm) -> Result<Self, SavedVmError> {
        SavedVm {
            abi,
            frequency: NonZeroU64::new(vm.frequency).ok_or(SavedVmError::Frequency)?,
            realtime_ns,
            virt_count: vm.virt_count,
            phys_count: vm.phys_count,
            vcpus: vm.vcpus,
        }
        .checked()
    }

    fn checked(self) -> Result<Self, SavedVmError> {
        let len = self.vcpus.len();
        if !(1..=MAX_VCPUS as usize).contains(&len) {
            return Err(SavedVmError::Vcpus(len));
        }
        let found = self.vcpus.iter().map(SavedVcpu::index);
        match (0..).zip(found).find(|(expected, found)| expected != found) {
            Some((expected, found)) => Err(SavedVmError::VcpuOrder { expected, found }),
            None => Ok(self),
        }
    }

    /// The ABI of the VM's registers.
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// The counter's frequency, Hz.
    pub fn frequency(&self) -> NonZeroU64 {
        self.frequency
    }

    /// When the registers were read: CLOCK_REALTIME, ns since 1970; 0 where that is not known.
    pub fn realtime_ns(&self) -> u64 {
        self.realtime_ns
    }

    /// The VM's virtual count.
    pub fn virt_count(&self) -> u64 {
        self.virt_count
    }

    /// The VM's physical count.
    pub fn phys_count(&self) -> u64 {
        self.phys_count
    }

    /// Every vCPU's registers, by index.
    pub fn vcpus(&self) -> &[SavedVcpu] {
        &self.vcpus
    }
}

impl SavedVcpu {
    /// A vCPU of which no register is known yet.
    pub fn new(index: u32) -> Self {
        SavedVcpu(wire::Vcpu {
            vcpu: index.into(),
            ..Default::default()
        })
    }

    /// A vCPU of registers by their KVM ids, in any order.
    ///
    /// # Errors
    ///
    /// [`SavedVmError::UnknownRegister`] for an id that is none of the ABI's timer registers, and
    /// [`SavedVmError::RepeatedRegister`].
    pub fn from_regs(abi: Abi, index: u32, regs: &[RegValue]) -> Result<Self, SavedVmError> {
        let mut vcpu = SavedVcpu::new(index);
        for &RegValue { id, value } in regs {
            let register = Register::from_id(id, abi)
                .map_err(|_| SavedVmError::UnknownRegister { id, abi })?;
            if vcpu.get(register).is_some() {
                return Err(SavedVmError::RepeatedRegister(id));
            }
            vcpu.set(register, value);
        }
        Ok(vcpu)
    }

    /// Takes over the registers that are marked as present, and nothing else.
    pub(crate) fn from_wire(from: &wire::Vcpu) -> Self {
        // Mostly all of them, of thousands of vCPUs.
        if from.present == present::ALL {
            return SavedVcpu(*from);
        }
        let mut vcpu = SavedVcpu::new(from.vcpu.get());
        for register in Register::ALL {
            if from.has(register) {
                vcpu.set(register, from.get(register));
            }
        }
        vcpu
    }

    pub(crate) fn wire(&self) -> &wire::Vcpu {
        &self.0
    }

    /// The vCPU's index.
    pub fn index(&self) -> u32 {
        self.0.vcpu.get()
    }

    /// A register's value; `None` where it is not known.
    pub fn get(&self, register: Register) -> Option<u64> {
        self.0.has(register).then(|| self.0.get(register))
    }

    /// Sets a register.
    pub fn set(&mut self, register: Register, value: u64) {
        self.0.set(register, value);
    }

    /// As [`set`](Self::set), for a vCPU that is being built.
    #[must_use]
    pub fn with(mut self, register: Register, value: u64) -> Self {
        self.set(register, value);
        self
    }

    /// The registers that are known, by their KVM ids.
    pub fn regs(&self, abi: Abi) -> impl Iterator<Item = RegValue> + use<> {
        let vcpu = *self;
        let known = move |&(register, id)| Some(RegValue::new(id, vcpu.get(register)?));
        abi.registers().iter().filter_map(known)
    }
}

impl fmt::Debug for SavedVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        map.entry(&format_args!("vcpu"), &self.index());
        for register in Register::ALL {
            if let Some(value) = self.get(register) {
                map.entry(&format_args!("{register}"), &value);
            }
        }
        map.finish()
    }
}
