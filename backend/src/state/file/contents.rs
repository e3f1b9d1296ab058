//! What a state file holds when it is opened: the records that count, or what is wrong with it.

use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use zerocopy::IntoBytes;

use crate::state::file::layout::{
    COUNT, HEAD, RECORD, RECORD_AND_COUNT, Record, SlotHead, VOID, checksum,
};

/// What there is in a file.
#[derive(Default)]
pub(super) struct Contents {
    pub(super) commit: u64,
    pub(super) vm: Vec<u8>,
    /// What the VM's host counter was at the last change, as far as a change said so.
    pub(super) host_count: Option<u64>,
    pub(super) clock: Option<Vec<u8>>,
    /// By vCPU; `None` where no change wrote one.
    pub(super) vcpus: Vec<Option<Vec<u8>>>,
    /// Which slot counts, by [`Record::index`].
    pub(super) in_use: Vec<u8>,
    /// Slots of a change that never became whole.
    pub(super) torn_slots: Vec<usize>,
}

/// The slot of a record that counts.
#[derive(Default)]
struct Newest {
    record: Vec<u8>,
    host_count: Option<u64>,
    generation: u64,
    slot: u8,
}

impl Newest {
    /// The record, where a change ever wrote it.
    fn record(self) -> Option<Vec<u8>> {
        (self.generation != 0).then_some(self.record)
    }
}

/// Reads all records that count, of a file with this commit and slots for so many vCPUs.
pub(super) fn read_back(region: &MmapRegion, commit: u64, vcpus: u32) -> Result<Contents, String> {
    let mut contents = Contents {
        commit,
        ..Contents::default()
    };
    let newest = contents.newest(region, Record::Vm, "the VM's record")?;
    // Every change writes it.
    if newest.generation != contents.commit {
        return Err("the VM's record is not of the last change".to_owned());
    }
    contents.vm = newest.record;
    contents.host_count = newest.host_count;
    contents.clock = contents
        .newest(region, Record::Clock, "the clock device's record")?
        .record();
    for index in 0..vcpus {
        let newest = contents.newest(region, Record::Vcpu(index), "a vCPU's record")?;
        contents.vcpus.push(newest.record());
    }
    Ok(contents)
}

impl Contents {
    /// The newest slot of a record, at or before the commit.
    fn newest(&mut self, region: &MmapRegion, which: Record, name: &str) -> Result<Newest, String> {
        let mut newest = Newest::default();
        let bytes = region.as_volatile_slice();
        for slot in 0..2 {
            let at = which.slot(slot);
            let mut head = SlotHead::default();
            let mut record = vec![0; which.len()];
            let mut count = [0; COUNT];
            let read = bytes
                .read_slice(head.as_mut_bytes(), at)
                .and_then(|()| bytes.read_slice(&mut record, at + HEAD))
                .and_then(|()| match which {
                    Record::Vm => bytes.read_slice(&mut count, at + HEAD + record.len()),
                    _ => Ok(()),
                });
            read.map_err(|error| error.to_string())?;
            let generation = head.generation;
            let host_count = match (head.form, which) {
                (RECORD, _) => Some(None),
                (RECORD_AND_COUNT, Record::Vm) => Some(Some(u64::from_ne_bytes(count))),
                _ => None,
            };
            let right = match (generation, host_count) {
                (VOID, _) => continue,
                (_, None) => false,
                (0, Some(_)) => head.crc == 0 && head.form == RECORD,
                (_, Some(host_count)) => head.crc == checksum(generation, &record, host_count),
            };
            if !right {
                return Err(format!("{name} has a wrong checksum"));
            }
            if self.commit.checked_add(1) == Some(generation) {
                self.torn_slots.push(at);
            } else if generation > self.commit {
                return Err(format!("{name} is of a future change"));
            } else if generation > newest.generation {
                newest = Newest {
                    record,
                    host_count: host_count.flatten(),
                    generation,
                    slot,
                };
            }
        }
        self.in_use.push(newest.slot);
        Ok(newest)
    }
}
