//! What a state file holds when it is opened: the records that count, or what is wrong with it.

use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use zerocopy::IntoBytes;

use crate::state::file::layout::{
    HEAD, RECORD, RECORD_AND_COUNT, Record, SlotHead, VM_AND_COUNT, VOID, checksum,
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
            let most = match which {
                Record::Vm => VM_AND_COUNT,
                _ => which.len(),
            };
            let mut written = vec![0; most];
            let read = bytes
                .read_slice(head.as_mut_bytes(), at)
                .and_then(|()| bytes.read_slice(&mut written, at + HEAD));
            read.map_err(|error| error.to_string())?;
            let generation = head.generation;
            let has_count = head.form == RECORD_AND_COUNT && which == Record::Vm;
            if !has_count {
                written.truncate(which.len());
            }
            let right = match generation {
                VOID => continue,
                0 => head.crc == 0 && head.form == RECORD,
                _ => {
                    (head.form == RECORD || has_count) && head.crc == checksum(generation, &written)
                }
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
                    host_count: written
                        .split_off(which.len())
                        .first_chunk()
                        .map(|count| u64::from_ne_bytes(*count)),
                    record: written,
                    generation,
                    slot,
                };
            }
        }
        self.in_use.push(newest.slot);
        Ok(newest)
    }
}
