//! The three requests to KVM that this module makes, as traits, and over any KVM descriptor.

use std::io;
use std::os::fd::AsRawFd;

use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_WRITE, ioctl_expr, ioctl_with_ref, ioctl_with_val};

/// The registers of one vCPU.
///
/// Every KVM vCPU descriptor is one: the `VcpuFd` of any version of kvm-ioctls, and an `OwnedFd`. A
/// VMM that hides its descriptors implements the two functions.
pub trait OneReg {
    /// KVM_GET_ONE_REG of a 64-bit register.
    ///
    /// # Errors
    ///
    /// KVM's: ENOENT where the vCPU has no such register, ENOEXEC before KVM_ARM_VCPU_INIT.
    fn get_one_reg(&self, id: u64) -> io::Result<u64>;

    /// KVM_SET_ONE_REG of a 64-bit register.
    ///
    /// # Errors
    ///
    /// As [`get_one_reg`](Self::get_one_reg).
    fn set_one_reg(&self, id: u64, value: u64) -> io::Result<()>;
}

/// The counter offset of one VM.
///
/// Every KVM VM descriptor is one: the `VmFd` of any version of kvm-ioctls, and an `OwnedFd`. A VMM
/// that hides its descriptors implements the two functions.
pub trait CounterOffset {
    /// KVM_CHECK_EXTENSION of KVM_CAP_COUNTER_OFFSET on the VM, not on `/dev/kvm`: a protected VM
    /// lacks what its host has.
    ///
    /// # Errors
    ///
    /// KVM's.
    fn has_counter_offset(&self) -> io::Result<bool>;

    /// KVM_ARM_SET_COUNTER_OFFSET: host count − guest count in ticks, of both counts.
    ///
    /// # Errors
    ///
    /// KVM's: EBUSY while a vCPU is in an ioctl, EINVAL for a protected VM and a realm.
    fn set_counter_offset(&self, offset: u64) -> io::Result<()>;
}

// include/uapi/linux/kvm.h.
const KVMIO: u32 = 0xae;
const KVM_CHECK_EXTENSION: u64 = ioctl_expr(_IOC_NONE, KVMIO, 0x03, 0);
const KVM_GET_ONE_REG: u64 = ioctl_expr(_IOC_WRITE, KVMIO, 0xab, size_of::<KvmOneReg>() as u32);
const KVM_SET_ONE_REG: u64 = ioctl_expr(_IOC_WRITE, KVMIO, 0xac, size_of::<KvmOneReg>() as u32);
const KVM_ARM_SET_COUNTER_OFFSET: u64 = ioctl_expr(
    _IOC_WRITE,
    KVMIO,
    0xb5,
    size_of::<KvmArmCounterOffset>() as u32,
);
const KVM_CAP_COUNTER_OFFSET: u64 = 227;

/// `struct kvm_one_reg`.
#[repr(C)]
struct KvmOneReg {
    id: u64,
    /// Of the value, in this process.
    addr: u64,
}

/// `struct kvm_arm_counter_offset`.
#[repr(C)]
struct KvmArmCounterOffset {
    counter_offset: u64,
    /// Zero.
    reserved: u64,
}

/// Bits 55–52 of a register's id: log2 of its size in bytes (KVM_REG_SIZE_MASK), here 8.
fn is_u64(id: u64) -> bool {
    id & 0x00f0_0000_0000_0000 == 0x0030_0000_0000_0000
}

/// What an ioctl returned, or why it failed.
fn checked(returned: i32) -> io::Result<i32> {
    match returned {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

impl<T: AsRawFd> OneReg for T {
    #[expect(
        unsafe_code,
        reason = "no crate has this ioctl for every KVM descriptor"
    )]
    fn get_one_reg(&self, id: u64) -> io::Result<u64> {
        if !is_u64(id) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut value = 0u64;
        let register = KvmOneReg {
            id,
            addr: (&raw mut value).expose_provenance() as u64,
        };
        // SAFETY: KVM reads `register` and writes the 8 bytes of `value`, as the id's size says.
        // Both outlive the call.
        checked(unsafe { ioctl_with_ref(self, KVM_GET_ONE_REG, &register) })?;
        Ok(value)
    }

    #[expect(
        unsafe_code,
        reason = "no crate has this ioctl for every KVM descriptor"
    )]
    fn set_one_reg(&self, id: u64, value: u64) -> io::Result<()> {
        if !is_u64(id) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let register = KvmOneReg {
            id,
            addr: (&raw const value).expose_provenance() as u64,
        };
        // SAFETY: KVM reads `register` and the 8 bytes of `value`, as the id's size says. Both
        // outlive the call.
        checked(unsafe { ioctl_with_ref(self, KVM_SET_ONE_REG, &register) })?;
        Ok(())
    }
}

impl<T: AsRawFd> CounterOffset for T {
    #[expect(
        unsafe_code,
        reason = "no crate has this ioctl for every KVM descriptor"
    )]
    fn has_counter_offset(&self) -> io::Result<bool> {
        // SAFETY: the argument is a number; KVM neither reads nor writes memory.
        let has = unsafe { ioctl_with_val(self, KVM_CHECK_EXTENSION, KVM_CAP_COUNTER_OFFSET) };
        Ok(checked(has)? > 0)
    }

    #[expect(unsafe_code, reason = "no crate has this ioctl")]
    fn set_counter_offset(&self, offset: u64) -> io::Result<()> {
        let offset = KvmArmCounterOffset {
            counter_offset: offset,
            reserved: 0,
        };
        // SAFETY: KVM reads `offset`, which outlives the call.
        checked(unsafe { ioctl_with_ref(self, KVM_ARM_SET_COUNTER_OFFSET, &offset) })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_have_the_kernels_numbers() {
        assert_eq!(KVM_CHECK_EXTENSION, 0xae03);
        assert_eq!(KVM_GET_ONE_REG, 0x4010_aeab);
        assert_eq!(KVM_SET_ONE_REG, 0x4010_aeac);
        assert_eq!(KVM_ARM_SET_COUNTER_OFFSET, 0x4010_aeb5);
        assert_eq!(
            KVM_CAP_COUNTER_OFFSET,
            u64::from(kvm_bindings::KVM_CAP_COUNTER_OFFSET)
        );
    }

    #[cfg(target_arch = "aarch64")]
    #[test]
    fn the_structures_are_the_kernels() {
        use kvm_bindings::{kvm_arm_counter_offset, kvm_one_reg};
        use std::mem::offset_of;

        assert_eq!(size_of::<KvmOneReg>(), size_of::<kvm_one_reg>());
        assert_eq!(offset_of!(KvmOneReg, addr), offset_of!(kvm_one_reg, addr));
        assert_eq!(
            size_of::<KvmArmCounterOffset>(),
            size_of::<kvm_arm_counter_offset>()
        );
        assert_eq!(
            offset_of!(KvmArmCounterOffset, reserved),
            offset_of!(kvm_arm_counter_offset, reserved)
        );
    }

    #[test]
    fn a_descriptor_that_is_no_kvm_vcpu_is_an_error_and_not_a_value() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let ctl = 0x6030_0000_0013_df19;
        assert!(file.get_one_reg(ctl).is_err());
        assert!(file.set_one_reg(ctl, 0).is_err());
        assert!(file.has_counter_offset().is_err());
        assert!(file.set_counter_offset(0).is_err());
    }

    #[test]
    fn a_register_of_another_size_than_64_bits_never_reaches_kvm() {
        // The descriptor is closed, so that KVM's error would be EBADF.
        let closed = -1;
        for id in [0x6020_0000_0010_00d4, 0x6040_0000_0010_0054, 0] {
            let refused = |error: io::Error| error.kind() == io::ErrorKind::InvalidInput;
            assert!(refused(closed.get_one_reg(id).unwrap_err()));
            assert!(refused(closed.set_one_reg(id, 0).unwrap_err()));
        }
    }
}
