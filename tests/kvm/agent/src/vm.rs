//! A VM on KVM that has vCPUs and no memory: enough for what does not run.

use std::num::NonZeroU64;
use std::time::Duration;

use kvm_bindings::{KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, kvm_vcpu_init};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_frontend::{Abi, Backend, Register, SavedVcpu, SavedVm, SpawnOptions, kvm};

use crate::Result;

/// How long a request may take on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// The VM.
pub(crate) struct Vm {
    pub(crate) fd: VmFd,
    pub(crate) vcpus: Vec<VcpuFd>,
}

impl Vm {
    /// Makes one with so many vCPUs, all of them powered off.
    pub(crate) fn new(vcpus: u64) -> Result<Self> {
        Self::with_type(vcpus, 0)
    }

    /// [`new`](Self::new), of this type (KVM_CREATE_VM's argument).
    pub(crate) fn with_type(vcpus: u64, kind: u64) -> Result<Self> {
        let fd = Kvm::new()?.create_vm_with_type(kind)?;
        let mut init = kvm_vcpu_init::default();
        fd.get_preferred_target(&mut init)?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2 | 1 << KVM_ARM_VCPU_POWER_OFF;
        let vcpus = (0..vcpus).map(|index| {
            let vcpu = fd.create_vcpu(index)?;
            vcpu.vcpu_init(&init)?;
            Ok(vcpu)
        });
        let vcpus = vcpus.collect::<Result<_>>()?;
        Ok(Vm { fd, vcpus })
    }

    /// Its vCPUs' timers.
    pub(crate) fn save(&self) -> Result<Vec<SavedVcpu>> {
        let saved = (0..).zip(&self.vcpus);
        let saved = saved.map(|(index, vcpu)| Ok(kvm::save_vcpu(vcpu, index)?));
        saved.collect()
    }

    /// Them as a saved VM.
    pub(crate) fn save_whole(&self) -> Result<SavedVm> {
        let frequency = host_counter()?.native_frequency();
        let frequency = NonZeroU64::new(frequency).ok_or("CNTFRQ_EL0 is 0")?;
        Ok(SavedVm::new(Abi::Arm64, frequency, self.save()?)?)
    }

    /// For each vCPU, how far this count is ahead of what the offset makes it, in ticks: at least
    /// and at most. KVM reads the count between two readings of the host's.
    pub(crate) fn ahead(&self, register: Register, offset: u64) -> Result<Vec<[i64; 2]>> {
        let host = host_counter()?;
        let frequency = host.native_frequency();
        let of_vcpu = |vcpu: &VcpuFd| {
            let mut bytes = [0; 8];
            let before = host.read(frequency);
            vcpu.get_one_reg(register.id(Abi::Arm64), &mut bytes)?;
            let after = host.read(frequency);
            let count = u64::from_le_bytes(bytes);
            let ahead_at = |at: u64| count.wrapping_sub(at.wrapping_sub(offset)).cast_signed();
            Ok([ahead_at(after), ahead_at(before)])
        };
        self.vcpus.iter().map(of_vcpu).collect()
    }
}

/// CNTVCT_EL0.
pub(crate) fn host_counter() -> Result<HostCounter> {
    Ok(HostCounter::open(Source::Cntvct)?)
}

/// Starts a backend with these options.
pub(crate) fn backend(program: &str, args: &[&str]) -> Result<Backend> {
    let options = SpawnOptions::default().arg("--log-level=warn");
    let options = args.iter().fold(options, |options, arg| options.arg(*arg));
    Ok(Backend::spawn(program, options)?)
}
