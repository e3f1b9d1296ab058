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

mod access;
mod contents;
mod error;
mod header;
mod layout;
mod making;
mod opening;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, compiler_fence};

use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileSlice};
use zerocopy::IntoBytes;

use crate::failpoint::{Point, reached};
use contents::Contents;
pub use error::StateFileError;
use header::{COMMIT_AT, commit_word};
pub use header::{FIRST_VERSION, NEWEST_VERSION};
pub use layout::{CLOCK_RECORD, Record, VCPU_RECORD, VM_RECORD};
use layout::{HEAD, RECORD, RECORD_AND_COUNT, SlotHead, VM_AND_COUNT, VOID, checksum};
pub use opening::Opening;

/// A state file that this process has locked.
pub struct StateFile {
    path: PathBuf,
    region: MmapRegion,
    /// Holds the lock.
    _file: File,
    /// The generation of the last change.
    commit: u64,
    /// By [`Record::index`].
    slots: Vec<Slots>,
    /// The records that the change under way has written, by their index.
    written: Vec<usize>,
    /// The VM's record as it is in the file, or will be with the first change; then what the VM's
    /// host counter was when it last changed, if that is known.
    vm: [u8; VM_AND_COUNT],
    host_count_is_known: bool,
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
    /// The file with slots for so many vCPUs, of which this was found. `vm` is the VM's record as
    /// it is now.
    fn new(
        path: PathBuf,
        file: File,
        region: MmapRegion,
        vcpus: u32,
        found: Contents,
        vm: &[u8],
    ) -> Self {
        let records = Record::Vcpu(vcpus).index();
        let mut slots = vec![Slots::default(); records];
        for (slots, in_use) in slots.iter_mut().zip(found.in_use) {
            slots.in_use = in_use;
        }
        let mut state = StateFile {
            path,
            region,
            _file: file,
            commit: found.commit,
            slots,
            // Nothing is allocated for a change.
            written: Vec::with_capacity(records),
            vm: [0; VM_AND_COUNT],
            host_count_is_known: false,
            clock: found.clock,
        };
        state.keep_vm(vm);
        if let Some(count) = found.host_count {
            state.keep_host_count(count);
        }
        state
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
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

    fn keep_vm(&mut self, record: &[u8]) {
        debug_assert_eq!(record.len(), VM_RECORD);
        let (kept, _) = self.vm.split_at_mut(VM_RECORD);
        if let Ok(record) = <&[u8; VM_RECORD]>::try_from(record) {
            kept.copy_from_slice(record);
        }
    }

    fn keep_host_count(&mut self, count: u64) {
        let (_, kept) = self.vm.split_at_mut(VM_RECORD);
        kept.copy_from_slice(count.as_bytes());
        self.host_count_is_known = true;
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
            if self.host_count_is_known {
                self.write_slot(at, generation, RECORD_AND_COUNT, &self.vm);
            } else {
                let (record, _) = self.vm.split_at(VM_RECORD);
                self.write_slot(at, generation, RECORD, record);
            }
        }
        reached(Point::CommitReady);
        // The one store that counts.
        let word = commit_word(generation);
        let stored = self.bytes().store(word, COMMIT_AT, Ordering::Release);
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
    fn write_slot(&self, at: usize, generation: u64, form: u32, written: &[u8]) {
        let head = SlotHead {
            generation,
            crc: checksum(generation, written),
            form,
        };
        let bytes = self.bytes();
        let (_, crc_and_form) = head.as_bytes().split_at(size_of_val(&generation));
        let (first, second) = written.split_at(written.len() / 2);
        reached(Point::SlotBegun);
        let voided = bytes.store(VOID, at, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
        reached(Point::SlotVoid);
        let begun = bytes.write_slice(first, at + HEAD);
        reached(Point::SlotHalf);
        let written = bytes
            .write_slice(second, at + HEAD + first.len())
            .and_then(|()| bytes.write_slice(crc_and_form, at + size_of_val(&generation)));
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
    /// States what the VM's host counter is at this change, ticks of the VM's frequency. The next
    /// process refuses the file if the counter is less by then.
    pub fn at_host_count(&mut self, count: u64) {
        self.file.keep_host_count(count);
    }

    /// Puts a record into the change.
    pub fn put(&mut self, which: Record, record: &[u8]) {
        match which {
            // Written last.
            Record::Vm => self.file.keep_vm(record),
            _ => {
                debug_assert_eq!(record.len(), which.len());
                if let Some(at) = self.file.claim(which) {
                    self.file.write_slot(at, self.generation, RECORD, record);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
