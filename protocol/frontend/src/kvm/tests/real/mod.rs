//! The same functions on a real KVM, where `/dev/kvm` of an AArch64 host is one. One file for each
//! kind of kernel: on another kind its tests are skipped, and say so.
//!
//! `tests/kvm` of the workspace boots a machine of each kind and runs them there.

mod any_kernel;
mod nested;
mod protected;
mod with_offset;
mod without_offset;

use kvm_bindings::{KVM_ARM_VCPU_PSCI_0_2, kvm_vcpu_init};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vhost_user_timer_counter::{HostCounter, Source};

use super::armed;
use crate::Info;
use crate::kvm::bracket::Host;
use crate::kvm::{Bracket, OneReg};
use vhost_user_timer_protocol::{Abi, Register};

/// A guest's count.
const COUNT: u64 = 0x1234_5678_9abc;

/// Says why a test is skipped.
fn skip(why: &str) {
    eprintln!("skipped: {why}");
}

/// The host's KVM. What a program under QEMU's user-mode emulation finds as `/dev/kvm` is another
/// architecture's, and takes no ioctl.
fn kvm() -> Option<Kvm> {
    const API_VERSION: i32 = 12;

    match Kvm::new() {
        Ok(kvm) if kvm.get_api_version() == API_VERSION => return Some(kvm),
        Ok(_) => skip("this /dev/kvm is no KVM of AArch64"),
        Err(error) => skip(&format!("no KVM here: {error}")),
    }
    None
}

/// A KVM that has, or lacks, KVM_CAP_COUNTER_OFFSET.
fn kvm_with_offset(has: bool) -> Option<Kvm> {
    let kvm = kvm()?;
    if kvm.check_extension(Cap::CounterOffset) == has {
        return Some(kvm);
    }
    let what = if has { "lacks" } else { "has" };
    skip(&format!("this kernel {what} KVM_CAP_COUNTER_OFFSET"));
    None
}

fn counter() -> HostCounter {
    HostCounter::open(Source::Cntvct).unwrap()
}

fn target(vm: &VmFd, features: &[u32]) -> kvm_vcpu_init {
    let mut target = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut target).unwrap();
    for feature in [KVM_ARM_VCPU_PSCI_0_2].iter().chain(features) {
        target.features[0] |= 1 << feature;
    }
    target
}

fn vcpu(vm: &VmFd, index: u64, features: &[u32]) -> VcpuFd {
    let vcpu = vm.create_vcpu(index).unwrap();
    vcpu.vcpu_init(&target(vm, features)).unwrap();
    vcpu
}

/// A VM with 40 bits of guest addresses. Of the most that a CPU has, 52 bits, Linux 7 walks all
/// when the VM ends, which takes seconds under emulation.
fn small_vm(kvm: &Kvm) -> VmFd {
    kvm.create_vm_with_type(0).unwrap()
}

/// A VM with two vCPUs.
fn vm_of(kvm: &Kvm) -> (VmFd, [VcpuFd; 2]) {
    let vm = small_vm(kvm);
    let vcpus = [0, 1].map(|index| vcpu(&vm, index, &[]));
    (vm, vcpus)
}

/// GET_INFO's answer about a VM that is ARMED now with a virtual count of `count`.
fn armed_at(count: u64) -> Info {
    let host = counter();
    let now = host.count();
    armed(now, host.frequency(), now.wrapping_sub(count))
}

/// How far a vCPU's count is ahead of what the offset makes it.
fn ahead(vcpu: &VcpuFd, register: Register, offset: u64) -> Bracket {
    let read = || vcpu.get_one_reg_of(register);
    Bracket::observe(&counter(), offset, || Ok::<_, ()>(read())).unwrap()
}

trait Registers {
    fn get_one_reg_of(&self, register: Register) -> u64;
    fn set_one_reg_of(&self, register: Register, value: u64);
}

impl Registers for VcpuFd {
    fn get_one_reg_of(&self, register: Register) -> u64 {
        OneReg::get_one_reg(self, register.id(Abi::Arm64)).unwrap()
    }

    fn set_one_reg_of(&self, register: Register, value: u64) {
        OneReg::set_one_reg(self, register.id(Abi::Arm64), value).unwrap();
    }
}
