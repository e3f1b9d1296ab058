//! A VM: RAM, a vGICv3, and vCPUs that do not run yet.

use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, kvm_userspace_memory_region, kvm_vcpu_init,
};
use kvm_ioctls::{Kvm, VmFd};
use std::sync::atomic::Ordering;
use vm_memory::{AtomicAccess, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::error::{Context, Error};
use super::gic::Gic;
use super::registers;
use super::vcpu::Vcpu;
use crate::guest::{self, Board, Record};

/// Bits of a guest-physical address: as few as KVM takes. When a VM ends, KVM walks all of them in
/// small steps, which takes seconds for 40 bits where the host is emulated.
const ADDRESS_BITS: u32 = 32;

/// A VM. Its vCPUs are [`Vcpu`]s, which threads take along.
pub(crate) struct Vm {
    pub(crate) fd: VmFd,
    pub(crate) gic: Gic,
    pub(crate) ram: Ram,
    init: kvm_vcpu_init,
}

/// The guest's RAM. Clones are the same RAM.
#[derive(Clone)]
pub(crate) struct Ram(GuestMemoryMmap);

impl Vm {
    /// Makes a VM of `vcpus` vCPUs, all before any runs: a vCPU that is made later resets the
    /// counter offset of the VM, unless KVM_ARM_SET_COUNTER_OFFSET has fixed it
    /// (arch/arm64/kvm/arch_timer.c, kvm_timer_vcpu_init).
    pub(crate) fn new(vcpus: u32) -> Result<(Vm, Vec<Vcpu>), Error> {
        let kvm = Kvm::new().context("open /dev/kvm")?;
        let fd = kvm
            .create_vm_with_ipa_size(ADDRESS_BITS)
            .context("KVM_CREATE_VM")?;
        let ram = Ram::new()?;
        ram.give_to(&fd)?;

        let mut init = kvm_vcpu_init::default();
        fd.get_preferred_target(&mut init)
            .context("KVM_ARM_PREFERRED_TARGET")?;
        init.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        let created = (0..vcpus)
            .map(|index| {
                let vcpu = fd.create_vcpu(index.into()).context("KVM_CREATE_VCPU")?;
                vcpu.vcpu_init(&with_power(init, index))
                    .context("KVM_ARM_VCPU_INIT")?;
                Ok(Vcpu::new(index, vcpu))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let gic = Gic::new(&fd, vcpus)?;
        let vm = Vm { fd, gic, ram, init };
        Ok((vm, created))
    }

    /// Tries to make one more vCPU, which KVM refuses once a VM has a vGICv3: the number of vCPUs
    /// is fixed.
    pub(crate) fn has_no_place_for_a_late_vcpu(&self, vcpus: u32) -> Result<(), Error> {
        match self.fd.create_vcpu(vcpus.into()) {
            Err(error) if error.errno() == libc::EBUSY => Ok(()),
            Err(error) => Err(error).context("make a late vCPU: expected EBUSY"),
            Ok(_) => Err(Error::new("make a late vCPU: KVM did not refuse it")),
        }
    }

    /// Puts the guest's program into RAM, and vCPU 0 at its entry. The others are off: vCPU 0
    /// turns them on.
    pub(crate) fn load_program(&self, vcpus: &[Vcpu]) -> Result<(), Error> {
        self.ram.write(guest::RAM, guest::program())?;
        registers::set_entry(&vcpus[0], guest::RAM)
    }

    /// Resets every vCPU and the GIC, as PSCI SYSTEM_RESET asks for. The counter goes on: neither
    /// KVM_ARM_VCPU_INIT nor anything here sets it, and the board keeps what was published.
    pub(crate) fn reset(
        &self,
        vcpus: &[Vcpu],
        initial_gic: &super::gic::State,
    ) -> Result<(), Error> {
        for vcpu in vcpus {
            vcpu.fd
                .vcpu_init(&with_power(self.init, vcpu.index))
                .context("KVM_ARM_VCPU_INIT")?;
        }
        self.gic.load(initial_gic)?;
        self.load_program(vcpus)
    }
}

/// Only vCPU 0 is on from the beginning.
fn with_power(mut init: kvm_vcpu_init, index: u32) -> kvm_vcpu_init {
    if index != 0 {
        init.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    init
}

impl Ram {
    fn new() -> Result<Self, Error> {
        let range = (GuestAddress(guest::RAM), guest::RAM_SIZE);
        let memory = GuestMemoryMmap::from_ranges(&[range]).context("map the guest's RAM")?;
        Ok(Ram(memory))
    }

    #[expect(
        unsafe_code,
        reason = "KVM_SET_USER_MEMORY_REGION takes a host address"
    )]
    fn give_to(&self, vm: &VmFd) -> Result<(), Error> {
        let host = self
            .0
            .get_host_address(GuestAddress(guest::RAM))
            .context("find the guest's RAM")?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: guest::RAM,
            memory_size: guest::RAM_SIZE as u64,
            userspace_addr: host.addr() as u64,
        };
        // SAFETY: the mapping has this address and size. `Vm` holds it beside the VM's descriptor,
        // and vCPU threads are joined before `Vm` is dropped.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; guest::RAM_SIZE];
        self.0
            .read_slice(&mut bytes, GuestAddress(guest::RAM))
            .context("read the guest's RAM")?;
        Ok(bytes)
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        self.0
            .write_slice(bytes, GuestAddress(address))
            .context("write the guest's RAM")
    }

    /// A field of the board, by its offset in [`Board`].
    pub(crate) fn field(&self, offset: usize) -> u64 {
        self.load(offset)
    }

    /// Sets a field of the board, by its offset in [`Board`].
    pub(crate) fn set_field(&self, offset: usize, value: u64) {
        let address = GuestAddress(guest::BOARD + offset as u64);
        self.0
            .store(value, address, Ordering::Release)
            .expect("the board is in RAM");
    }

    /// A field of a vCPU's record, by its offset in [`Record`].
    pub(crate) fn record(&self, vcpu: u32, offset: usize) -> u64 {
        let records = std::mem::offset_of!(Board, records);
        self.load(records + vcpu as usize * size_of::<Record>() + offset)
    }

    fn load<T: AtomicAccess>(&self, offset: usize) -> T {
        let address = GuestAddress(guest::BOARD + offset as u64);
        self.0
            .load(address, Ordering::Acquire)
            .expect("the board is in RAM")
    }
}
