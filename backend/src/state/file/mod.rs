//! The VM in a file, for the next process after a crash of this one.
//!
//! Every change is in a shared mapping of the file before its answer can be seen, so an answered
//! request survives the process, whatever ends it. (It does not survive the host; nor does the
//! VM.) The file is whole after a kill at any instruction:
//!
//! ```text
//! 0     header: magic, version, counter source, boot id
//! 64    commit: the generation of the last change that is whole
//! 128   the VM's record, two slots
//! 640   the clock device's record, two slots
//! 1152… each vCPU's record, two slots
//! ```
//!
//! A change writes each record that it touches to the slot that is not in use: first that slot is
//! marked as void, then comes the record with its checksum, last the next generation. When all are
//! written, that generation is stored as the commit: one aligned store makes the change whole, or
//! leaves the one before. Of a record's slots, the newest at or before the commit counts.
//!
//! A kill leaves nothing else behind, so anything else is damage, and is refused: a checksum that is
//! wrong, a generation past the next, a VM's record that is not of the last change.
//!
//! The order of the stores matters to the compiler alone: a process is killed between two
//! instructions, and what it had stored until then is in the mapping.

mod contents;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, compiler_fence};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use vhost_user_timer_counter::CounterId;

use contents::{Mapping, vcpu_slots};

use crate::failpoint::{Point, reached};
use vhost_user_timer_model::rtc::RtcRecord;
use vhost_user_timer_model::vm::{Changed, VcpuRecord, Vm, VmRecord};

const MAGIC: [u8; 8] = *b"vutstate";
/// The layout of this file and of the records in it.
const VERSION: u32 = 2;

const COMMIT: usize = 64;
const VM_SLOTS: usize = 128;
const VM_SLOT: usize = 256;
const CLOCK_SLOTS: usize = VM_SLOTS + 2 * VM_SLOT;
const CLOCK_SLOT: usize = 256;
const VCPU_SLOTS: usize = CLOCK_SLOTS + 2 * CLOCK_SLOT;
const VCPU_SLOT: usize = 96;

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    /// What the host counter is derived from, and at what rate, Hz.
    source: u32,
    source_frequency: u64,
    boot_id: [u8; 36],
    /// Of the source and its rate.
    counter_crc: u32,
}

impl Header {
    fn counter_checksum(&self) -> u32 {
        checksum(self.source_frequency, self.source.as_bytes())
    }
}

#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SlotHead {
    /// The change that wrote it; 0 where none did, [`VOID`] where none that is whole did.
    generation: u64,
    /// Of the generation and the record.
    crc: u32,
    reserved: u32,
}

const HEAD: usize = size_of::<SlotHead>();
const VOID: u64 = u64::MAX;

const _: () = {
    assert!(size_of::<Header>() == COMMIT);
    assert!(HEAD + size_of::<VmRecord>() <= VM_SLOT);
    assert!(HEAD + size_of::<RtcRecord>() <= CLOCK_SLOT);
    assert!(HEAD + size_of::<VcpuRecord>() <= VCPU_SLOT);
};

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateFileError {
    /// The system refuses.
    #[error("{what} the state file {} failed", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it.
    #[error("The state file {} is in use by another backend; each VM needs its own", .0.display())]
    InUse(PathBuf),
    /// It is of a VM that counted otherwise.
    #[error(
        "The state file {} is of a VM whose host counter was another; start the backend with the \
         --counter-source it had, or remove the file to begin anew",
        .0.display()
    )]
    OtherCounter(PathBuf),
    /// It is something else, and not to be overwritten.
    #[error("The file {} is no state file of a vhost-user-timer backend; name another", .0.display())]
    Foreign(PathBuf),
    /// It is of a VM that is too large.
    #[error(
        "The state file {} is of a VM with {vcpus} vCPUs, and this backend takes {max_vcpus}; start \
         it with --max-vcpus {vcpus}, or remove the file to begin anew",
        path.display()
    )]
    Vcpus {
        /// Which file.
        path: PathBuf,
        /// How many vCPUs its VM has.
        vcpus: u32,
        /// The most that this backend takes.
        max_vcpus: u32,
    },
    /// It is not what a backend leaves behind.
    #[error(
        "The state file {} is damaged ({what}); remove it to begin anew, without the VM's time",
        path.display()
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// A state file that this process has locked.
pub struct StateFile {
    path: PathBuf,
    region: MmapRegion,
    /// Holds the lock.
    _file: File,
    commit: u64,
    /// Which slot of the VM's record, and of each vCPU's, is in use.
    vm_in_use: usize,
    clock_in_use: usize,
    vcpu_in_use: Vec<u8>,
    /// The clock device's record, where one was ever written.
    clock: Option<RtcRecord>,
}

impl std::fmt::Debug for StateFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateFile")
            .field("commit", &self.commit)
            .finish_non_exhaustive()
    }
}

/// What was found in a state file.
#[derive(Debug)]
pub struct Found {
    /// The counter that its VM had.
    pub counter: CounterId,
    vm: VmRecord,
    vcpus: Vec<VcpuRecord>,
}

impl Found {
    /// The VM's own record.
    pub fn vm(&self) -> &VmRecord {
        &self.vm
    }

    /// A vCPU's record.
    pub fn vcpu(&self, index: u32) -> VcpuRecord {
        self.vcpus.get(index as usize).copied().unwrap_or_default()
    }
}

fn boot_id() -> io::Result<[u8; 36]> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    let id = text.first_chunk().copied();
    id.ok_or_else(|| io::Error::other("the kernel's boot id is no UUID"))
}

impl StateFile {
    /// Opens the file, or makes it with mode 0600, and locks it. What a backend of this version has
    /// left there since the host was booted is found; what one of another version or boot has left
    /// is begun anew, and the log says so. `counter` is asked for with what was found, and says what
    /// counts from now on.
    ///
    /// # Errors
    ///
    /// [`StateFileError`]: nothing in the file was changed then.
    pub fn open(
        path: &Path,
        max_vcpus: u32,
        counter: impl FnOnce(Option<CounterId>) -> CounterId,
    ) -> Result<(Self, Option<Found>), StateFileError> {
        let failed = |what| io_error(path, what);
        let file = open_locked(path)?;
        let boot_id = boot_id().map_err(failed("Reading the boot id for"))?;
        let old = read_header(&file, path)?;
        let usable = old.filter(|old| match worth_reading(old, boot_id) {
            Ok(()) => true,
            Err(why) => {
                log::warn!("The state file {} is begun anew: {why}", path.display());
                false
            }
        });
        let damaged = |what| StateFileError::Damaged {
            path: path.to_owned(),
            what,
        };
        if usable.is_some_and(|old| old.counter_crc != old.counter_checksum()) {
            return Err(damaged("its counter has a wrong checksum".to_owned()));
        }
        let old_counter = usable.map(|old| CounterId {
            source: old.source,
            frequency: old.source_frequency,
        });
        let counter = counter(old_counter);
        if old_counter.is_some_and(|old| old != counter) {
            return Err(StateFileError::OtherCounter(path.to_owned()));
        }
        let len = (VCPU_SLOTS + 2 * VCPU_SLOT * max_vcpus as usize) as u64;
        if usable.is_none() {
            return Self::begin(file, path, len, counter, boot_id).map(|state| (state, None));
        }
        let contents = Self::map(&file, path)?.read_back().map_err(damaged)?;
        let vcpus = contents.vm.vcpus();
        if vcpus > max_vcpus {
            return Err(StateFileError::Vcpus {
                path: path.to_owned(),
                vcpus,
                max_vcpus,
            });
        }
        extend(&file, len).map_err(failed("Sizing"))?;
        let region = Self::map(&file, path)?.region;
        let mut vcpu_in_use = contents.vcpu_in_use;
        vcpu_in_use.resize(vcpu_slots(&region), 0);
        let state = StateFile {
            path: path.to_owned(),
            region,
            _file: file,
            commit: contents.commit,
            vm_in_use: contents.vm_in_use,
            clock_in_use: contents.clock_in_use,
            vcpu_in_use,
            clock: contents.clock,
        };
        // Their generation will be another change's.
        for at in contents.never_whole {
            let voided = state.bytes().store(VOID, at, Ordering::Release);
            debug_assert!(voided.is_ok());
        }
        let found = (state.commit != 0).then_some(Found {
            counter,
            vm: contents.vm,
            vcpus: contents.vcpus,
        });
        Ok((state, found))
    }

    /// Empties the file and makes it one without a VM.
    fn begin(
        file: File,
        path: &Path,
        len: u64,
        counter: CounterId,
        boot_id: [u8; 36],
    ) -> Result<Self, StateFileError> {
        let failed = |what| io_error(path, what);
        // Zeros first: a header without its magic is begun anew if this is cut short.
        file.set_len(0).map_err(failed("Emptying"))?;
        reached(Point::Emptied);
        extend(&file, len).map_err(failed("Sizing"))?;
        reached(Point::Sized);
        let region = Self::map(&file, path)?.region;
        let state = StateFile {
            path: path.to_owned(),
            vcpu_in_use: vec![0; vcpu_slots(&region)],
            region,
            _file: file,
            commit: 0,
            vm_in_use: 0,
            clock_in_use: 0,
            clock: None,
        };
        let mut header = Header {
            magic: MAGIC,
            version: VERSION,
            source: counter.source,
            source_frequency: counter.frequency,
            boot_id,
            counter_crc: 0,
        };
        header.counter_crc = header.counter_checksum();
        let rest = header.as_bytes().get(MAGIC.len()..).unwrap_or_default();
        let bytes = state.bytes();
        let written = bytes.write_slice(rest, MAGIC.len()).and_then(|()| {
            reached(Point::HeaderHalf);
            bytes.store(u64::from_ne_bytes(MAGIC), 0, Ordering::Release)
        });
        written.map_err(|error| failed("Writing")(io::Error::other(error)))?;
        reached(Point::Created);
        Ok(state)
    }

    /// A shared mapping of the whole file.
    fn map(file: &File, path: &Path) -> Result<Mapping, StateFileError> {
        let failed = |what| io_error(path, what);
        let len = file.metadata().map_err(failed("Examining"))?.len();
        let clone = file.try_clone().map_err(failed("Mapping"))?;
        let region = MmapRegion::from_file(FileOffset::new(clone, 0), len as usize)
            .map_err(|error| failed("Mapping")(io::Error::other(error)))?;
        Ok(Mapping { region })
    }

    fn bytes(&self) -> VolatileSlice<'_> {
        self.region.as_volatile_slice()
    }

    /// The error of a record that is whole and says what cannot be.
    pub fn damaged(&self, bad: &dyn std::fmt::Display) -> StateFileError {
        StateFileError::Damaged {
            path: self.path.clone(),
            what: bad.to_string(),
        }
    }

    /// The clock device's record, as it was taken in last.
    pub fn clock(&self) -> Option<RtcRecord> {
        self.clock
    }

    /// Takes a change in. When this returns, it is in the file; until then, the one before is.
    pub fn commit(&mut self, vm: &Vm, changed: &mut Changed) {
        if changed.any() {
            self.commit_all(vm, changed, None);
        }
    }

    /// Takes the clock device in, and what else has changed.
    pub fn commit_clock(&mut self, vm: &Vm, changed: &mut Changed, clock: &RtcRecord) {
        self.commit_all(vm, changed, Some(clock));
    }

    fn commit_all(&mut self, vm: &Vm, changed: &mut Changed, clock: Option<&RtcRecord>) {
        reached(Point::CommitBegun);
        let generation = self.commit + 1;
        if changed.all {
            changed.vcpus.clear();
            changed.vcpus.extend(0..vm.vcpu_records());
        }
        // A vCPU named twice goes to its free slot twice.
        for &index in &changed.vcpus {
            let Some(in_use) = self.vcpu_in_use.get(index as usize) else {
                continue;
            };
            let free = usize::from(1 - in_use);
            let at = VCPU_SLOTS + VCPU_SLOT * (2 * index as usize + free);
            self.write_slot(at, generation, vm.vcpu_record(index).as_bytes());
        }
        if let Some(clock) = clock {
            let at = CLOCK_SLOTS + CLOCK_SLOT * (1 - self.clock_in_use);
            self.write_slot(at, generation, clock.as_bytes());
        }
        // With every change, so that it tells whether the last one is whole.
        let at = VM_SLOTS + VM_SLOT * (1 - self.vm_in_use);
        self.write_slot(at, generation, vm.vm_record().as_bytes());
        reached(Point::CommitReady);
        // The one store that counts.
        let stored = self.bytes().store(generation, COMMIT, Ordering::Release);
        debug_assert!(stored.is_ok());
        compiler_fence(Ordering::SeqCst);
        reached(Point::CommitStored);
        self.commit = generation;
        self.vm_in_use = 1 - self.vm_in_use;
        if let Some(clock) = clock {
            self.clock_in_use = 1 - self.clock_in_use;
            self.clock = Some(*clock);
        }
        changed.vcpus.sort_unstable();
        changed.vcpus.dedup();
        for &index in &changed.vcpus {
            if let Some(in_use) = self.vcpu_in_use.get_mut(index as usize) {
                *in_use = 1 - *in_use;
            }
        }
        changed.clear();
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

fn io_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> StateFileError {
    move |source| StateFileError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

fn open_locked(path: &Path) -> Result<File, StateFileError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(path)
        .map_err(io_error(path, "Opening"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(StateFileError::InUse(path.to_owned())),
        Err(error) => Err(io_error(path, "Locking")(error.into())),
    }
}

/// Makes the file this long at least, in zeros that have their place in the file system: a store
/// to a mapping that finds it full would be the end of the process.
fn extend(file: &File, len: u64) -> io::Result<()> {
    let old_len = file.metadata()?.len();
    if old_len >= len {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Err(Errno::OPNOTSUPP) => {
            use std::os::unix::fs::FileExt;
            file.write_all_at(&vec![0; (len - old_len) as usize], old_len)
        }
        allocated => Ok(allocated?),
    }
}

fn checksum(generation: u64, record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(record);
    hasher.finalize()
}

/// The header; `None` in a file that no backend has got round to filling.
fn read_header(file: &File, path: &Path) -> Result<Option<Header>, StateFileError> {
    use std::os::unix::fs::FileExt;
    let failed = |what| io_error(path, what);
    let len = file.metadata().map_err(failed("Examining"))?.len();
    let mut bytes = [0; COMMIT];
    let there = bytes.len().min(len as usize);
    let (present, _) = bytes.split_at_mut(there);
    file.read_exact_at(present, 0).map_err(failed("Reading"))?;
    if bytes[..MAGIC.len()] == [0; MAGIC.len()] {
        return Ok(None);
    }
    match Header::read_from_bytes(&bytes) {
        Ok(header) if header.magic == MAGIC && len >= VCPU_SLOTS as u64 => Ok(Some(header)),
        Ok(header) if header.magic == MAGIC => Err(StateFileError::Damaged {
            path: path.to_owned(),
            what: "it is cut off".to_owned(),
        }),
        _ => Err(StateFileError::Foreign(path.to_owned())),
    }
}

/// Whether the VM of this header can still be there.
fn worth_reading(header: &Header, boot_id: [u8; 36]) -> Result<(), String> {
    if header.version != VERSION {
        let version = header.version;
        return Err(format!(
            "it has version {version}, and this backend's is {VERSION}"
        ));
    }
    if header.boot_id != boot_id {
        return Err("the host has been booted since, so its VM is gone".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
