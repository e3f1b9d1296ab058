//! The VM in a file, for the next process after a crash of this one.
//!
//! The file holds records of fixed size: the VM's, the clock device's and each vCPU's. What is in a
//! record is for the devices to say. Every change is in a shared mapping of the file before its
//! answer can be seen, so an answered request survives the process, whatever ends it. (It does not
//! survive the host; nor does the VM.) `STATE-FILE.md` draws the format, and argues why the file is
//! whole after a kill at any instruction; in short:
//!
//! A change writes each record that it touches to that one of its two slots that is not in use:
//! first the slot is marked as void, then comes the record with its checksum, last the next
//! generation. When all are written, that generation is stored as the commit: one aligned store
//! makes the change whole, or leaves the one before. Of a record's slots, the newest at or before
//! the commit counts.
//!
//! A kill leaves nothing else behind, so anything else is damage, and is refused: a wrong checksum,
//! a generation past the next, a VM's record that is not of the last change.
//!
//! The order of the stores matters to the compiler alone: a process is killed between two
//! instructions, and what it had stored until then is in the mapping.

mod contents;
mod error;
mod layout;
mod opening;

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{Ordering, compiler_fence};

use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};
use zerocopy::IntoBytes;

use crate::failpoint::{Point, reached};
pub use error::StateFileError;
pub use layout::{CLOCK_RECORD, FIRST_VERSION, NEWEST_VERSION, Record, VCPU_RECORD, VM_RECORD};
use layout::{COMMIT, HEAD, SlotHead, VERSION_AT, VOID, checksum, vcpus_in};
pub use opening::Opening;

/// A state file that this process has locked.
pub struct StateFile {
    path: PathBuf,
    region: MmapRegion,
    /// Holds the lock.
    _file: File,
    /// As the header has it.
    version: u32,
    /// The generation of the last change.
    commit: u64,
    /// By [`Record::index`].
    slots: Vec<Slots>,
    /// The records that the change under way has written, by their index.
    written: Vec<usize>,
    /// The VM's record as it is in the file, or will be with the first change.
    vm: [u8; VM_RECORD],
    /// The clock device's record as it was found.
    clock: Option<Vec<u8>>,
}

/// A record's two slots.
#[derive(Clone, Copy, Default)]
struct Slots {
    in_use: u8,
    /// The change under way has written the other one.
    written: bool,
}

impl std::fmt::Debug for StateFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateFile")
            .field("path", &self.path)
            .field("commit", &self.commit)
            .finish_non_exhaustive()
    }
}

impl StateFile {
    fn new(
        path: PathBuf,
        file: File,
        region: MmapRegion,
        commit: u64,
        in_use: &[u8],
        vm: &[u8],
        clock: Option<Vec<u8>>,
    ) -> Self {
        let records = Record::Vcpu(vcpus_in(region.len())).index();
        let mut slots = vec![Slots::default(); records];
        for (slots, in_use) in slots.iter_mut().zip(in_use) {
            slots.in_use = *in_use;
        }
        let version = region
            .as_volatile_slice()
            .load(VERSION_AT, Ordering::Acquire);
        let mut state = StateFile {
            path,
            region,
            _file: file,
            version: version.unwrap_or(FIRST_VERSION),
            commit,
            slots,
            // Nothing is allocated for a change.
            written: Vec::with_capacity(records),
            vm: [0; VM_RECORD],
            clock,
        };
        state.keep_vm(vm);
        state
    }

    fn bytes(&self) -> VolatileSlice<'_> {
        self.region.as_volatile_slice()
    }

    /// The error of a record that is whole and says what cannot be.
    pub fn damaged(&self, what: &dyn std::fmt::Display) -> StateFileError {
        StateFileError::damaged(&self.path, what)
    }

    /// The clock device's record, where one was found when the file was opened.
    pub fn clock(&self) -> Option<&[u8]> {
        self.clock.as_deref()
    }

    /// Makes the file one of this version, if it is of an earlier one. A version can hold all that
    /// an earlier one can, so the file is whole before the change that needs it and after.
    fn raise_version(&mut self, version: u32) {
        if version > self.version {
            let stored = self.bytes().store(version, VERSION_AT, Ordering::Release);
            debug_assert!(stored.is_ok());
            compiler_fence(Ordering::SeqCst);
            reached(Point::VersionRaised);
            self.version = version;
        }
    }

    fn keep_vm(&mut self, record: &[u8]) {
        debug_assert_eq!(record.len(), VM_RECORD);
        if let Ok(record) = record.try_into() {
            self.vm = record;
        }
    }

    /// Makes one change of the records that `write` puts into it. When this returns, the change is
    /// in the file; until then, the one before is.
    pub fn commit(&mut self, write: impl FnOnce(&mut Change<'_>)) {
        reached(Point::CommitBegun);
        let generation = self.commit + 1;
        write(&mut Change {
            file: self,
            generation,
        });
        // With every change, so that it tells whether the last one is whole.
        if let Some(at) = self.claim(Record::Vm) {
            self.write_slot(at, generation, &self.vm);
        }
        reached(Point::CommitReady);
        // The one store that counts.
        let stored = self.bytes().store(generation, COMMIT, Ordering::Release);
        debug_assert!(stored.is_ok());
        compiler_fence(Ordering::SeqCst);
        reached(Point::CommitStored);
        self.commit = generation;
        for index in self.written.drain(..) {
            if let Some(slots) = self.slots.get_mut(index) {
                slots.in_use = 1 - slots.in_use;
                slots.written = false;
            }
        }
    }

    /// The record's free slot, which counts once the change under way is whole. A record that is
    /// written twice in a change goes there twice.
    fn claim(&mut self, which: Record) -> Option<usize> {
        let index = which.index();
        let slots = self.slots.get_mut(index)?;
        if !std::mem::replace(&mut slots.written, true) {
            self.written.push(index);
        }
        Some(which.slot(1 - slots.in_use))
    }

    /// Writes a slot that does not count, and will when its generation is the commit. The offsets
    /// are inside the mapping and aligned by construction.
    fn write_slot(&self, at: usize, generation: u64, record: &[u8]) {
        let head = SlotHead {
            generation,
            crc: checksum(generation, record),
            reserved: 0,
        };
        let bytes = self.bytes();
        let (_, crc) = head.as_bytes().split_at(size_of_val(&generation));
        let (first, second) = record.split_at(record.len() / 2);
        reached(Point::SlotBegun);
        let voided = bytes.store(VOID, at, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
        reached(Point::SlotVoid);
        let begun = bytes.write_slice(first, at + HEAD);
        reached(Point::SlotHalf);
        let written = bytes
            .write_slice(second, at + HEAD + first.len())
            .and_then(|()| bytes.write_slice(crc, at + size_of_val(&generation)));
        reached(Point::SlotFull);
        compiler_fence(Ordering::SeqCst);
        let done = bytes.store(generation, at, Ordering::Release);
        reached(Point::SlotDone);
        debug_assert!(voided.and(begun).and(written).and(done).is_ok());
    }
}

/// A change that is being made.
pub struct Change<'a> {
    file: &'a mut StateFile,
    generation: u64,
}

impl Change<'_> {
    /// States which version of the layout the records of this change need. A program that reads
    /// only earlier versions then discards the file instead of misreading a record.
    pub fn needs_version(&mut self, version: u32) {
        self.file.raise_version(version);
    }

    /// Puts a record into the change.
    pub fn put(&mut self, which: Record, record: &[u8]) {
        match which {
            // Written last.
            Record::Vm => self.file.keep_vm(record),
            _ => {
                debug_assert_eq!(record.len(), which.len());
                if let Some(at) = self.file.claim(which) {
                    self.file.write_slot(at, self.generation, record);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
