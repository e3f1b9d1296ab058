//! KVM's half of a VM's time on AArch64 (feature `kvm`): a vCPU's timer registers from KVM and
//! back, and the VM's offset into KVM.
//!
//! The backend decides on the offset, but KVM makes the guest's counter. A vCPU that runs before
//! the offset is in KVM, or while another thread puts it there, has the wrong time. So a VM on KVM
//! is configured with CONFIRM and ONE_OFFSET, and one thread calls [`apply`] while the VM is ARMED.
//! The backend releases no vCPU before the library has confirmed that [`apply`] succeeded.
//!
//! | | |
//! |---|---|
//! | [`save_vm`] | a paused VM: its timers from KVM, its counts from PAUSE's answer |
//! | [`save_vcpu`], [`timers_among`], [`paused_vm`] | the same in parts, for a VMM that has read
//! all registers already |
//! | [`restore_vcpu`] | and back: CVAL before CTL, never a count |
//! | [`apply`] | the offset of an ARMED VM into KVM, and the proof that it is in effect |
//! | [`set_counts`] | for Linux before 6.4: the counts one by one, as near as that gets |
//!
//! # Any version of kvm-ioctls, or none
//!
//! Everything takes a descriptor of KVM's ([`AsRawFd`](std::os::fd::AsRawFd)): a `VcpuFd` and a
//! `VmFd` of any version of kvm-ioctls are. A VMM that hides its descriptors behind traits of its
//! own implements [`OneReg`] and [`CounterOffset`], two functions each. The feature adds no
//! dependency.
//!
//! ```no_run
//! use kvm_ioctls::{VcpuFd, VmFd};
//! use vhost_user_timer_frontend::kvm::{self, KvmError};
//! use vhost_user_timer_frontend::{Info, Run, SavedVcpu, SavedVm};
//!
//! /// On the source. No vCPU is in KVM_RUN any more, and PAUSE was answered.
//! fn save(vcpus: &[VcpuFd], paused: &Run, info: &Info) -> Result<SavedVm, KvmError> {
//!     kvm::save_vm(vcpus, paused, info)
//! }
//!
//! /// On the destination, before the vCPU's thread waits for the others.
//! fn restore(vcpu: &VcpuFd, saved: &SavedVcpu) -> Result<(), KvmError> {
//!     kvm::restore_vcpu(vcpu, saved)
//! }
//!
//! /// In the closure that a restore and a resume call once while the VM is ARMED.
//! fn put_in(vm: &VmFd, vcpu: &VcpuFd, info: &Info) -> Result<(), KvmError> {
//!     let applied = kvm::apply(vm, vcpu, info)?;
//!     println!("offset {:#x}, within {}", applied.offset, applied.virt);
//!     Ok(())
//! }
//! # let _ = (save, restore, put_in);
//! ```
//!
//! # What the offset is relative to
//!
//! KVM makes the guest's CNTVCT_EL0 and CNTPCT_EL0 of the host's physical counter less the offset.
//! A host that runs KVM reads the same counter as CNTVCT_EL0 in user space: with VHE the virtual
//! offset is zero by architecture, without VHE KVM sets CNTVOFF_EL2 to zero whenever it leaves the
//! guest (arch/arm64/kvm/arch_timer.c, timer_save_state). So the backend must count by
//! `--counter-source cntvct`, at CNTFRQ_EL0, and [`apply`] refuses every other.
//!
//! # What happens to CNTPCT
//!
//! KVM's ioctl sets one offset for both counts. Before the first [`apply`] the guest's CNTPCT is
//! the host's counter itself, so for a VM that has run without it CNTPCT jumps back by the offset,
//! once. From then on CNTPCT equals CNTVCT. Where the CPU has FEAT_ECV with CNTPOFF_EL2 that costs
//! nothing. Where it has not, KVM traps each of the guest's accesses to CNTPCT_EL0 and to the
//! physical timer (timer_set_traps), which then take microseconds. Linux guests use the virtual
//! timer and counter.
//!
//! # Before registers are read or written
//!
//! A vCPU that left KVM_RUN by an MMIO access has not finished the instruction: KVM writes its
//! result and moves the PC at the *next* KVM_RUN. Registers that are saved before are those in the
//! middle of the instruction, and registers that are set before are changed by its end. So first
//! complete it, without entering the guest, on the thread of each vCPU:
//!
//! ```no_run
//! # #[cfg(target_arch = "aarch64")]
//! # fn complete(vcpu: &mut kvm_ioctls::VcpuFd) -> Result<(), kvm_ioctls::Error> {
//! /// EINTR: `immediate_exit` did what it is for.
//! const EINTR: i32 = 4;
//!
//! vcpu.set_kvm_immediate_exit(1);
//! let exit = vcpu.run().map(|_| ());
//! vcpu.set_kvm_immediate_exit(0);
//! match exit {
//!     Err(error) if error.errno() != EINTR => return Err(error),
//!     _ => {}
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What KVM cannot do
//!
//! | | |
//! |---|---|
//! | Linux before 6.4 | no VM-wide offset: [`KvmError::NoCounterOffset`]. [`set_counts`] comes near
//! |
//! | protected VMs (pKVM) and realms | the host cannot move their time:
//! [`KvmError::NoCounterOffset`] or [`KvmError::ProtectedVm`] | | guests with EL2 | a virtual count
//! of its own on each vCPU, and four timers: [`KvmError::El2Guest`] |
//! | another counter frequency | KVM does not scale: [`KvmError::Frequency`] |

mod apply;
mod best_effort;
mod bracket;
mod error;
mod ioctl;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

pub use apply::{Applied, apply};
pub use best_effort::{BestEffort, set_counts};
pub use bracket::Bracket;
pub use error::KvmError;
pub use ioctl::{CounterOffset, OneReg};
pub use vcpu::{restore_vcpu, save_vcpu, timer_register, timers_among};
pub use vm::{paused_vm, save_vm};
