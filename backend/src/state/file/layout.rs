//! Where everything is in a state file. `STATE-FILE.md` has the drawing.

use vhost_user_timer_protocol::MAX_VCPUS;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the header.
pub(super) const HEADER: usize = 128;
const VM_SLOTS: usize = HEADER;
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

/// For how many vCPUs a file of this length, bytes, has slots. No VM has more than [`MAX_VCPUS`].
pub(super) fn vcpus_in(len: u64) -> u32 {
    let vcpus = len.saturating_sub(VCPU_SLOTS as u64) / (2 * VCPU_SLOT as u64);
    vcpus.min(MAX_VCPUS.into()) as u32
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SlotHead {
    /// The change that wrote the slot; 0 where none did, [`VOID`] where none that is whole did.
    pub(super) generation: u64,
    /// Of the generation and all that the slot's form has.
    pub(super) crc: u32,
    /// [`RECORD`] or [`RECORD_AND_COUNT`].
    pub(super) form: u32,
}

/// The form of a slot that has a record and nothing else.
pub(super) const RECORD: u32 = 0;
/// The form of a VM's slot that has the record and then a host count.
pub(super) const RECORD_AND_COUNT: u32 = 1;
/// Bytes of the VM's record and the host count.
pub(super) const VM_AND_COUNT: usize = VM_RECORD + size_of::<u64>();

/// Bytes of a slot's head; the record follows.
pub(super) const HEAD: usize = size_of::<SlotHead>();
/// The generation of a slot that is being written.
pub(super) const VOID: u64 = u64::MAX;

const _: () = {
    assert!(HEAD + VM_AND_COUNT <= VM_SLOT);
    assert!(HEAD + CLOCK_RECORD <= CLOCK_SLOT);
    assert!(HEAD + VCPU_RECORD <= VCPU_SLOT);
};

/// Of a generation and what its slot has: a record, and by its form a host count.
pub(super) fn checksum(generation: u64, written: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(written);
    hasher.finalize()
}
