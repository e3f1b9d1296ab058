//! Where everything is in a state file. `STATE-FILE.md` has the drawing.

use std::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use vhost_user_timer_counter::CounterId;

pub(super) const MAGIC: [u8; 8] = *b"vutstate";
/// The version of a new file, and the oldest that is read.
pub const FIRST_VERSION: u32 = 2;
/// The newest version. A file has the version that its records need.
pub const NEWEST_VERSION: u32 = 3;
/// Where the version is: a `u32`.
pub(super) const VERSION_AT: usize = offset_of!(Header, version);

/// Where the commit is: a `u64` in the host's byte order, as all numbers here.
pub(super) const COMMIT: usize = 64;
const VM_SLOTS: usize = 128;
const VM_SLOT: usize = 256;
const CLOCK_SLOTS: usize = VM_SLOTS + 2 * VM_SLOT;
const CLOCK_SLOT: usize = 256;
const VCPU_SLOTS: usize = CLOCK_SLOTS + 2 * CLOCK_SLOT;
const VCPU_SLOT: usize = 96;

/// Bytes of the VM's record.
pub const VM_RECORD: usize = 136;
/// Bytes of the clock device's record.
pub const CLOCK_RECORD: usize = 112;
/// Bytes of a vCPU's record.
pub const VCPU_RECORD: usize = 64;

/// A record in a state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The VM's own: [`VM_RECORD`] bytes.
    Vm,
    /// The clock device's: [`CLOCK_RECORD`] bytes.
    Clock,
    /// This vCPU's: [`VCPU_RECORD`] bytes.
    Vcpu(u32),
}

impl Record {
    /// Its number among all records of a file.
    pub(super) fn index(self) -> usize {
        match self {
            Record::Vm => 0,
            Record::Clock => 1,
            Record::Vcpu(index) => 2 + index as usize,
        }
    }

    /// Where one of its two slots begins.
    pub(super) fn slot(self, which: u8) -> usize {
        let which = usize::from(which);
        match self {
            Record::Vm => VM_SLOTS + VM_SLOT * which,
            Record::Clock => CLOCK_SLOTS + CLOCK_SLOT * which,
            Record::Vcpu(index) => VCPU_SLOTS + VCPU_SLOT * (2 * index as usize + which),
        }
    }

    /// Bytes of the record.
    pub(super) fn len(self) -> usize {
        match self {
            Record::Vm => VM_RECORD,
            Record::Clock => CLOCK_RECORD,
            Record::Vcpu(_) => VCPU_RECORD,
        }
    }
}

/// The length of a file for so many vCPUs, bytes.
pub(super) fn file_len(vcpus: u32) -> usize {
    Record::Vcpu(vcpus).slot(0)
}

/// For how many vCPUs a file of this length, bytes, has slots.
pub(super) fn vcpus_in(len: usize) -> u32 {
    let vcpus = len.saturating_sub(VCPU_SLOTS) / (2 * VCPU_SLOT);
    vcpus.try_into().unwrap_or(u32::MAX)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    /// What the host counter is derived from, and at what rate, Hz.
    source: u32,
    source_frequency: u64,
    pub(super) boot_id: [u8; 36],
    /// Of the source and its rate.
    counter_crc: u32,
}

impl Header {
    pub(super) fn new(counter: CounterId, boot_id: [u8; 36]) -> Self {
        let header = Header {
            magic: MAGIC,
            version: FIRST_VERSION,
            source: counter.source,
            source_frequency: counter.frequency,
            boot_id,
            counter_crc: 0,
        };
        Header {
            counter_crc: header.counter_checksum(),
            ..header
        }
    }

    fn counter_checksum(&self) -> u32 {
        checksum(self.source_frequency, self.source.as_bytes())
    }

    /// The counter; `None` where its checksum is wrong.
    pub(super) fn counter(&self) -> Option<CounterId> {
        (self.counter_crc == self.counter_checksum()).then_some(CounterId {
            source: self.source,
            frequency: self.source_frequency,
        })
    }
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SlotHead {
    /// The change that wrote the slot; 0 where none did, [`VOID`] where none that is whole did.
    pub(super) generation: u64,
    /// Of the generation and the record.
    pub(super) crc: u32,
    pub(super) reserved: u32,
}

/// Bytes of a slot's head; the record follows.
pub(super) const HEAD: usize = size_of::<SlotHead>();
/// The generation of a slot that is being written.
pub(super) const VOID: u64 = u64::MAX;

const _: () = {
    assert!(size_of::<Header>() == COMMIT);
    assert!(HEAD + VM_RECORD <= VM_SLOT);
    assert!(HEAD + CLOCK_RECORD <= CLOCK_SLOT);
    assert!(HEAD + VCPU_RECORD <= VCPU_SLOT);
};

pub(super) fn checksum(generation: u64, record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(record);
    hasher.finalize()
}
