//! The VM in a state file.

use vhost_user_timer_counter::HostCounter;
use vhost_user_timer_model::vm::{BadRecord, Changed, Now, Profile, VcpuRecord, Vm, VmRecord};
use vhost_user_timer_protocol::Phase;
use zerocopy::{FromBytes, IntoBytes};

use crate::device::timer::instant::instant;
use crate::state::Store;
use crate::state::file::{Opening, Record, StateFileError, VCPU_RECORD, VM_RECORD};

const _: () = {
    assert!(size_of::<VmRecord>() == VM_RECORD);
    assert!(size_of::<VcpuRecord>() == VCPU_RECORD);
};

/// The VM that a previous process left in a state file.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    vm: VmRecord,
    vcpus: Vec<VcpuRecord>,
}

impl Found {
    /// What there is, where there is a VM.
    ///
    /// # Errors
    ///
    /// [`StateFileError`] where the VM has too many vCPUs, or records are missing.
    pub(crate) fn new(opening: &Opening, max_vcpus: u32) -> Result<Option<Self>, StateFileError> {
        let Some(bytes) = opening.vm() else {
            return Ok(None);
        };
        let damaged = || opening.damaged(&"a record has the wrong length");
        let vm = VmRecord::read_from_bytes(bytes).map_err(|_| damaged())?;
        let vcpus = opening.vcpus(vm.vcpus(), max_vcpus)?;
        let vcpus = vcpus
            .into_iter()
            .map(|bytes| VcpuRecord::read_from_bytes(bytes).map_err(|_| damaged()))
            .collect::<Result<_, _>>()?;
        Ok(Some(Found { vm, vcpus }))
    }

    /// The VM, at the present instant that `now` gives.
    ///
    /// # Errors
    ///
    /// [`BadRecord`] where the records are no VM's.
    pub(crate) fn vm(
        &self,
        profile: Profile,
        now: impl FnOnce(&Vm) -> Now,
    ) -> Result<Vm, BadRecord> {
        let vcpu = |index: u32| self.vcpus.get(index as usize).copied().unwrap_or_default();
        Vm::from_records(profile, &self.vm, vcpu, now)
    }
}

/// Makes the VM that a previous process left in a state file, or a new one, and keeps it there.
///
/// # Errors
///
/// [`StateFileError`]: nothing in the file was changed then.
pub(super) fn resume(
    opening: Opening,
    profile: Profile,
    counter: HostCounter,
) -> Result<(Store, Vm), StateFileError> {
    opening.expect_counter(counter.id())?;
    let vm = match Found::new(&opening, profile.max_vcpus)? {
        None => {
            log::info!("No VM in {} yet", opening.path().display());
            Vm::new(profile)
        }
        Some(found) => {
            let vm = found.vm(profile, |vm| instant(counter, vm));
            let vm = vm.map_err(|bad| opening.damaged(&bad))?;
            if vm.phase() != Phase::New {
                let frequency = vm.frequency();
                if profile.frequency_fixed {
                    opening.expect_frequency(frequency, profile.frequency)?;
                }
                opening.expect_count(instant(counter, &vm).host, frequency)?;
            }
            log::info!(
                "Continuing with the VM in {}: {}, epoch {}",
                opening.path().display(),
                vm.phase(),
                vm.epoch()
            );
            vm
        }
    };
    let record = vm.vm_record();
    let file = opening.accept(counter.id(), profile.max_vcpus, record.as_bytes())?;
    Ok((Store::from(file), vm))
}

/// Puts what changed of the VM into the state file. `host_count` is the VM's, after the change.
pub(crate) fn commit(store: &Store, vm: &Vm, changed: &Changed, host_count: u64) {
    store.commit(|change| {
        let mut put = |index: u32| {
            change.put(Record::Vcpu(index), vm.vcpu_record(index).as_bytes());
        };
        if changed.all {
            (0..vm.vcpu_records()).for_each(&mut put);
        } else {
            changed.vcpus.iter().copied().for_each(&mut put);
        }
        let record = vm.vm_record();
        change.at_host_count(host_count);
        change.put(Record::Vm, record.as_bytes());
    });
}
