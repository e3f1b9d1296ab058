//! Requests about vCPUs' registers.

#![expect(unsafe_code, reason = "exports symbols; reads the caller's arrays")]

use std::ffi::c_int;
use std::mem::MaybeUninit;

use vhost_user_timer_frontend::{RegValue, Register, SavedVcpu};

use crate::border::{Failure, border};
use crate::connect::{frontend, vut_frontend};
use crate::pointer::{array, array_mut, put};
use crate::types::deadline;

/// KVM's id of the virtual timer's control on AArch64, 0x603000000013df19 (CNTV_CTL).
pub const VUT_ARM64_TIMER_CTL: u64 = 0x6030_0000_0013_df19;
/// KVM's id of the virtual count on AArch64, 0x603000000013df1a (CNTVCT).
pub const VUT_ARM64_TIMER_CNT: u64 = 0x6030_0000_0013_df1a;
/// KVM's id of the virtual timer's compare value on AArch64, 0x603000000013df02 (CNTV_CVAL).
pub const VUT_ARM64_TIMER_CVAL: u64 = 0x6030_0000_0013_df02;
/// KVM's id of the physical timer's control on AArch64, 0x603000000013df11 (CNTP_CTL).
pub const VUT_ARM64_PTIMER_CTL: u64 = 0x6030_0000_0013_df11;
/// KVM's id of the physical count on AArch64, 0x603000000013df01 (CNTPCT).
pub const VUT_ARM64_PTIMER_CNT: u64 = 0x6030_0000_0013_df01;
/// KVM's id of the physical timer's compare value on AArch64, 0x603000000013df12 (CNTP_CVAL).
pub const VUT_ARM64_PTIMER_CVAL: u64 = 0x6030_0000_0013_df12;

/// Bit of `present`: `ctl` is known.
pub const VUT_PRESENT_CTL: u32 = 1;
/// Bit of `present`: `cnt` is known.
pub const VUT_PRESENT_CNT: u32 = 2;
/// Bit of `present`: `cval` is known.
pub const VUT_PRESENT_CVAL: u32 = 4;
/// Bit of `present`: `pctl` is known.
pub const VUT_PRESENT_PCTL: u32 = 8;
/// Bit of `present`: `pcnt` is known.
pub const VUT_PRESENT_PCNT: u32 = 16;
/// Bit of `present`: `pcval` is known.
pub const VUT_PRESENT_PCVAL: u32 = 32;

/// The most registers of one vut_get_regs() or vut_set_regs(). A vCPU has six.
pub const VUT_MAX_REGS: usize = 16;

const _: () = assert!(VUT_MAX_REGS == vhost_user_timer_frontend::MAX_REGS);

/// A register, by its KVM id, and its value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vut_reg {
    /// As of KVM_GET_ONE_REG: VUT_ARM64_*.
    pub id: u64,
    /// The value; 32 bits of it for CTL on 32-bit Arm.
    pub value: u64,
}

/// The timer registers of one vCPU.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vut_vcpu {
    /// The vCPU's index.
    pub vcpu: u32,
    /// Which of the registers are known: VUT_PRESENT_*. The others are ignored.
    pub present: u32,
    /// The virtual timer's control: bit 0 ENABLE, bit 1 IMASK, bit 2 ISTATUS (read only).
    pub ctl: u64,
    /// The virtual count, ticks; the VM's, whichever vCPU it is read from.
    pub cnt: u64,
    /// The virtual timer's compare value, ticks.
    pub cval: u64,
    /// The physical timer's control.
    pub pctl: u64,
    /// The physical count, ticks.
    pub pcnt: u64,
    /// The physical timer's compare value, ticks.
    pub pcval: u64,
}

/// The VM's counts at one instant.
#[repr(C)]
pub struct vut_vm {
    /// The virtual count, ticks.
    pub virt_count: u64,
    /// The physical count, ticks.
    pub phys_count: u64,
    /// The host counter, ticks.
    pub host_count: u64,
    /// Counter frequency, Hz.
    pub frequency: u64,
}

/// What a write of registers led to.
#[repr(C)]
pub struct vut_lines {
    /// Count writes that were ignored, because the offset is pinned or because the physical count
    /// follows the virtual one.
    pub ignored: u32,
    /// The virtual timer's interrupt line stands high.
    pub virtual_line: bool,
    /// The physical timer's interrupt line stands high.
    pub physical_line: bool,
}

impl vut_vcpu {
    fn values(&self) -> [u64; Register::COUNT] {
        [
            self.ctl, self.cnt, self.cval, self.pctl, self.pcnt, self.pcval,
        ]
    }

    fn read(&self) -> Result<SavedVcpu, Failure> {
        let all = Register::ALL.map(Register::present_bit);
        let unknown = all.iter().fold(self.present, |left, bit| left & !bit);
        if unknown != 0 {
            return Err(Failure::argument(format!(
                "vCPU {}: present {:#x}: {unknown:#x} stands for no register",
                self.vcpu, self.present
            )));
        }
        let mut saved = SavedVcpu::new(self.vcpu);
        for (register, value) in Register::ALL.into_iter().zip(self.values()) {
            if self.present & register.present_bit() != 0 {
                saved.set(register, value);
            }
        }
        Ok(saved)
    }
}

impl From<&SavedVcpu> for vut_vcpu {
    fn from(saved: &SavedVcpu) -> Self {
        let known = Register::ALL
            .into_iter()
            .filter(|r| saved.get(*r).is_some());
        let value = |register| saved.get(register).unwrap_or(0);
        vut_vcpu {
            vcpu: saved.index(),
            present: known.map(Register::present_bit).sum(),
            ctl: value(Register::TimerCtl),
            cnt: value(Register::TimerCnt),
            cval: value(Register::TimerCval),
            pctl: value(Register::PtimerCtl),
            pcnt: value(Register::PtimerCnt),
            pcval: value(Register::PtimerCval),
        }
    }
}

/// The vCPUs that a caller gives.
///
/// # Safety
///
/// As [`array`].
pub(crate) unsafe fn saved_vcpus(
    vcpus: *const vut_vcpu,
    count: u32,
) -> Result<Vec<SavedVcpu>, Failure> {
    // SAFETY: the caller's promise.
    let vcpus = unsafe { array(vcpus, count as usize, "vcpus") }?;
    vcpus.iter().map(vut_vcpu::read).collect()
}

/// Reads registers of one vCPU, all at one instant. Not in NEW. (GET_REGS)
///
/// @param vcpu   index
/// @param regs   `id` of each entry says which register; `value` is filled in
/// @param count  how many entries, up to VUT_MAX_REGS
/// @return 0; -ENXIO for an index past the VM's vCPUs; -ENOENT for an id that is no timer register;
///         -EINVAL for an id of another ABI, and for too many entries; -EBUSY in NEW; or an error
///         of every request. After an error no value has changed
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_get_regs(
    frontend: Option<&vut_frontend>,
    vcpu: u32,
    regs: *mut vut_reg,
    count: usize,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.frontend().queue_of(vcpu);
        // SAFETY: the caller's promise. C may have left the values alone, which are written only.
        let regs = unsafe { array_mut(regs, count, "regs") }?;
        let ids: Vec<_> = regs.iter().map(|reg| reg.id).collect();
        let read = queue.get_regs(vcpu, &ids, deadline(timeout_ns))?;
        for (reg, read) in regs.iter_mut().zip(read.iter()) {
            reg.value = read.value;
        }
        Ok(())
    })
}

/// Writes registers of one vCPU, all together: their order does not matter. Not in NEW; counts in
/// PAUSED and RESTORING only. (SET_REGS)
///
/// @param vcpu   index
/// @param regs   the registers and their values
/// @param count  how many entries, up to VUT_MAX_REGS; with 0 only `lines` is read
/// @param lines  where the levels of the interrupt lines after the write go; may be NULL
/// @return 0; -EBUSY for a count in RUNNING or ARMED, and for a vCPU that is done in the open
///         restore; -EINVAL for one register with two values; or as vut_get_regs()
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_set_regs(
    frontend: Option<&vut_frontend>,
    vcpu: u32,
    regs: *const vut_reg,
    count: usize,
    lines: Option<&mut MaybeUninit<vut_lines>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.frontend().queue_of(vcpu);
        // SAFETY: the caller's promise.
        let regs = unsafe { array(regs, count, "regs") }?;
        let regs: Vec<_> = regs
            .iter()
            .map(|reg| RegValue::new(reg.id, reg.value))
            .collect();
        let set = queue.set_regs(vcpu, &regs, deadline(timeout_ns))?;
        put(
            lines,
            vut_lines {
                ignored: set.ignored,
                virtual_line: set.virtual_line,
                physical_line: set.physical_line,
            },
        );
        Ok(())
    })
}

/// Reads the registers of many vCPUs and the VM's counts, all at one instant. Not in NEW. (GET_VM)
///
/// @param vm     where the VM's counts go; may be NULL
/// @param first  index of the first vCPU
/// @param vcpus  room for `count` vCPUs, all six registers of each
/// @param count  how many vCPUs
/// @return 0; -EINVAL where `first + count` is past the VM's vCPUs; -EBUSY in NEW; or an error of
///         every request
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_get_vm(
    frontend: Option<&vut_frontend>,
    vm: Option<&mut MaybeUninit<vut_vm>>,
    first: u32,
    vcpus: *mut vut_vcpu,
    count: u32,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        let room = vcpus.cast::<MaybeUninit<vut_vcpu>>();
        // SAFETY: the caller's promise.
        let room = unsafe { array_mut(room, count as usize, "vcpus") }?;
        let read = queue.get_vm(first, count, deadline(timeout_ns))?;
        for (to, vcpu) in room.iter_mut().zip(&read.vcpus) {
            to.write(vcpu.into());
        }
        put(
            vm,
            vut_vm {
                virt_count: read.virt_count,
                phys_count: read.phys_count,
                host_count: read.host_count,
                frequency: read.frequency,
            },
        );
        Ok(())
    })
}

/// Stages the registers of many vCPUs in an open restore. With `done` every one of them is also
/// done (RESTORE_DONE), at one instant, all or nothing; the last vCPU of the VM ends the restore.
/// In RESTORING; with `done` in the ARMED of a restore as well. (SET_VM)
///
/// @param vcpus      the vCPUs, in any order
/// @param count      how many vCPUs
/// @param done       whether they have all their registers then
/// @param remaining  with `done`: where the number of vCPUs that are still missing goes; may be
///                   NULL
/// @return 0; -ENODATA where a vCPU that is to be done lacks TIMER_CTL, TIMER_CVAL or TIMER_CNT;
///         -EBUSY in another phase, and for a vCPU that is done; -EINVAL for a vCPU that is named
///         twice, an unknown bit of `present`, and at the end of a strict restore whose counts
///         differ; -ENXIO or -EINVAL for an index past the VM's vCPUs; or an error of every
///         request
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vut_set_vm(
    frontend: Option<&vut_frontend>,
    vcpus: *const vut_vcpu,
    count: u32,
    done: bool,
    remaining: Option<&mut MaybeUninit<u32>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.queue();
        // SAFETY: the caller's promise.
        let vcpus = unsafe { saved_vcpus(vcpus, count) }?;
        let deadline = deadline(timeout_ns);
        match done {
            true => put(remaining, queue.set_vm_done(&vcpus, deadline)?),
            false => queue.set_vm(&vcpus, deadline)?,
        }
        Ok(())
    })
}

/// Says that the vCPU has all its timer registers, as after a load of a device state. In RESTORING
/// and the ARMED of a restore. (RESTORE_DONE)
///
/// @param vcpu       index
/// @param remaining  where the number of vCPUs that are still missing goes; may be NULL
/// @return as vut_set_vm() with `done`
#[unsafe(no_mangle)]
pub extern "C" fn vut_restore_done(
    frontend: Option<&vut_frontend>,
    vcpu: u32,
    remaining: Option<&mut MaybeUninit<u32>>,
    timeout_ns: u64,
) -> c_int {
    border(|| {
        let queue = self::frontend(frontend)?.frontend().queue_of(vcpu);
        put(remaining, queue.restore_done(vcpu, deadline(timeout_ns))?);
        Ok(())
    })
}
