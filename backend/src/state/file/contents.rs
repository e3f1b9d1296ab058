//! What a state file holds when it is opened: the records that count, or what is wrong with it.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    CLOCK_SLOT, CLOCK_SLOTS, COMMIT, HEAD, SlotHead, VCPU_SLOT, VCPU_SLOTS, VM_SLOT, VM_SLOTS,
    VOID, checksum,
};
use vhost_user_timer_model::rtc::RtcRecord;
use vhost_user_timer_model::vm::{VcpuRecord, VmRecord};

/// All of a file that may be one.
pub(super) struct Mapping {
    pub(super) region: MmapRegion,
}

/// What there is in a file.
pub(super) struct Contents {
    pub(super) commit: u64,
    pub(super) vm: VmRecord,
    pub(super) vm_in_use: usize,
    pub(super) clock: Option<RtcRecord>,
    pub(super) clock_in_use: usize,
    pub(super) vcpus: Vec<VcpuRecord>,
    pub(super) vcpu_in_use: Vec<u8>,
    /// Slots of a change that never became whole.
    pub(super) never_whole: Vec<usize>,
}

/// Which of a record's slots counts.
#[derive(Default)]
struct Newest<T> {
    record: T,
    generation: u64,
    slot: usize,
}

/// How many vCPUs have their slots there.
pub(super) fn vcpu_slots(region: &MmapRegion) -> usize {
    region.len().saturating_sub(VCPU_SLOTS) / (2 * VCPU_SLOT)
}

impl Mapping {
    /// Reads all records that count.
    pub(super) fn read_back(&self) -> Result<Contents, String> {
        let load: Result<u64, _> = self
            .region
            .as_volatile_slice()
            .load(COMMIT, Ordering::Acquire);
        let mut contents = Contents {
            commit: load.map_err(|error| error.to_string())?,
            vm: VmRecord::default(),
            vm_in_use: 0,
            clock: None,
            clock_in_use: 0,
            vcpus: Vec::new(),
            vcpu_in_use: Vec::new(),
            never_whole: Vec::new(),
        };
        let slots = [VM_SLOTS, VM_SLOTS + VM_SLOT];
        let newest = self.newest(slots, &mut contents, "the VM's record")?;
        // Every change writes it.
        if newest.generation != contents.commit {
            return Err("the VM's record is not of the last change".to_owned());
        }
        (contents.vm, contents.vm_in_use) = (newest.record, newest.slot);
        let slots = [CLOCK_SLOTS, CLOCK_SLOTS + CLOCK_SLOT];
        let newest = self.newest(slots, &mut contents, "the clock device's record")?;
        contents.clock = (newest.generation != 0).then_some(newest.record);
        contents.clock_in_use = newest.slot;
        for index in 0..vcpu_slots(&self.region) {
            let first = VCPU_SLOTS + 2 * VCPU_SLOT * index;
            let slots = [first, first + VCPU_SLOT];
            let newest = self.newest(slots, &mut contents, "a vCPU's record")?;
            if newest.generation == 0 && index < contents.vm.vcpus() as usize {
                return Err(format!("vCPU {index} has no record"));
            }
            contents.vcpus.push(newest.record);
            contents.vcpu_in_use.push(newest.slot as u8);
        }
        if contents.vm.vcpus() as usize > contents.vcpus.len() {
            return Err("it is cut off".to_owned());
        }
        Ok(contents)
    }

    /// The newest record of these two slots.
    fn newest<T: FromBytes + IntoBytes + Default + Immutable + KnownLayout>(
        &self,
        slots: [usize; 2],
        contents: &mut Contents,
        name: &str,
    ) -> Result<Newest<T>, String> {
        let mut newest = Newest::default();
        for (slot, at) in slots.into_iter().enumerate() {
            let mut head = SlotHead::default();
            let mut record = T::default();
            let bytes = self.region.as_volatile_slice();
            let read = bytes
                .read_slice(head.as_mut_bytes(), at)
                .and_then(|()| bytes.read_slice(record.as_mut_bytes(), at + HEAD));
            read.map_err(|error| error.to_string())?;
            let generation = head.generation;
            let right = match generation {
                VOID => continue,
                0 => head.crc == 0,
                _ => head.crc == checksum(generation, record.as_bytes()),
            };
            if !right {
                return Err(format!("{name} has a wrong checksum"));
            }
            if generation == contents.commit + 1 {
                contents.never_whole.push(at);
            } else if generation > contents.commit {
                return Err(format!("{name} is of a change that is to come"));
            } else if generation > newest.generation {
                newest = Newest {
                    record,
                    generation,
                    slot,
                };
            }
        }
        Ok(newest)
    }
}
