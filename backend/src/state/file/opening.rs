//! A state file that is locked and examined, and not yet changed.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;
use vhost_user_timer_counter::{CounterId, HostCounter, Source};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use zerocopy::{FromBytes, IntoBytes};

use crate::failpoint::{Point, reached};
use crate::state::file::contents::{Contents, read_back};
use crate::state::file::layout::{
    COMMIT, FIRST_VERSION, Header, MAGIC, NEWEST_VERSION, VOID, file_len,
};
use crate::state::file::{StateFile, StateFileError};

/// See the module.
pub struct Opening {
    path: PathBuf,
    /// Holds the lock.
    file: File,
    boot_id: [u8; 36],
    /// What a backend of this version has left since the host was booted.
    previous: Option<Previous>,
}

struct Previous {
    counter: CounterId,
    contents: Contents,
}

impl Opening {
    /// Opens the file, or creates it with mode 0600, and locks it. What a backend of this version
    /// has left there since the host was booted is found; what one of another version or boot has
    /// left is discarded by [`accept`](Self::accept), and the log says so.
    ///
    /// # Errors
    ///
    /// [`StateFileError`] where the file is not what a backend leaves behind, or the system
    /// refuses.
    pub fn new(path: &Path) -> Result<Self, StateFileError> {
        let file = open_locked(path)?;
        let boot_id = boot_id().map_err(StateFileError::io(path, "Reading the boot id for"))?;
        let usable = read_header(&file, path)?.filter(|header| {
            let why = why_discarded(header, boot_id);
            if let Some(why) = &why {
                log::warn!(
                    "Discarding the VM in the state file {}: {why}",
                    path.display()
                );
            }
            why.is_none()
        });
        let damaged = |what: &dyn Display| StateFileError::damaged(path, what);
        let previous = match usable {
            None => None,
            Some(header) => Some(Previous {
                counter: header
                    .counter()
                    .ok_or_else(|| damaged(&"its counter has a wrong checksum"))?,
                contents: read_back(&map(&file, path)?).map_err(|what| damaged(&what))?,
            }),
        };
        Ok(Opening {
            path: path.to_owned(),
            file,
            boot_id,
            previous,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The host counter that the file was written with.
    pub fn counter(&self) -> Option<CounterId> {
        self.previous.as_ref().map(|previous| previous.counter)
    }

    /// That counter, ready to be read, at the rate that it had.
    ///
    /// # Errors
    ///
    /// [`StateFileError::UnknownCounter`] and [`StateFileError::NoCounter`].
    pub fn host_counter(&self) -> Result<Option<HostCounter>, StateFileError> {
        let Some(id) = self.counter() else {
            return Ok(None);
        };
        let path = self.path.clone();
        let Some(counter) = Source::from_code(id.source) else {
            let code = id.source;
            return Err(StateFileError::UnknownCounter { path, code });
        };
        match HostCounter::open(counter) {
            Ok(opened) => Ok(Some(opened.at_rate(id.frequency))),
            Err(source) => Err(StateFileError::NoCounter {
                path,
                counter,
                source,
            }),
        }
    }

    /// Refuses a file that was written with another counter than this one.
    ///
    /// # Errors
    ///
    /// [`StateFileError::OtherCounter`].
    pub fn expect_counter(&self, counter: CounterId) -> Result<(), StateFileError> {
        match self.counter() {
            Some(wrote) if wrote != counter => Err(StateFileError::OtherCounter {
                path: self.path.clone(),
                wrote,
                given: counter,
            }),
            _ => Ok(()),
        }
    }

    fn contents(&self) -> Option<&Contents> {
        let contents = self.previous.as_ref().map(|previous| &previous.contents);
        contents.filter(|contents| contents.commit != 0)
    }

    /// The VM's record, where the file has a VM.
    pub fn vm(&self) -> Option<&[u8]> {
        self.contents().map(|contents| contents.vm.as_slice())
    }

    /// The records of a VM with so many vCPUs.
    ///
    /// # Errors
    ///
    /// [`StateFileError`] where it has more than `max_vcpus`, or one of them has no record.
    pub fn vcpus(&self, vcpus: u32, max_vcpus: u32) -> Result<Vec<&[u8]>, StateFileError> {
        let all = self.contents().map_or(&[][..], |contents| &contents.vcpus);
        let Some(records) = all.get(..vcpus as usize) else {
            return Err(self.damaged(&"it is cut off"));
        };
        let records = (0..)
            .zip(records)
            .map(|(index, record): (u32, _)| match record {
                Some(record) => Ok(record.as_slice()),
                None => Err(self.damaged(&format_args!("vCPU {index} has no record"))),
            })
            .collect::<Result<_, _>>()?;
        if vcpus > max_vcpus {
            return Err(StateFileError::Vcpus {
                path: self.path.clone(),
                vcpus,
                max_vcpus,
            });
        }
        Ok(records)
    }

    /// The error of a record that is whole and says what cannot be.
    pub fn damaged(&self, what: &dyn Display) -> StateFileError {
        StateFileError::damaged(&self.path, what)
    }

    /// Goes on with what was found, or empties the file and makes it one without a VM. `vm` is the
    /// VM's record as it is now.
    ///
    /// # Errors
    ///
    /// [`StateFileError`] where the file was written with another counter, or the system refuses.
    pub fn accept(
        self,
        counter: CounterId,
        max_vcpus: u32,
        vm: &[u8],
    ) -> Result<StateFile, StateFileError> {
        self.expect_counter(counter)?;
        let len = file_len(max_vcpus) as u64;
        let Some(previous) = self.previous else {
            return self.begin(counter, len, vm);
        };
        extend(&self.file, len).map_err(StateFileError::io(&self.path, "Sizing"))?;
        let region = map(&self.file, &self.path)?;
        // Their generation will be that of another change.
        for at in &previous.contents.torn_slots {
            let voided = region
                .as_volatile_slice()
                .store(VOID, *at, Ordering::Release);
            debug_assert!(voided.is_ok());
        }
        let Contents {
            commit,
            clock,
            in_use,
            ..
        } = previous.contents;
        Ok(StateFile::new(
            self.path, self.file, region, commit, &in_use, vm, clock,
        ))
    }

    fn begin(self, counter: CounterId, len: u64, vm: &[u8]) -> Result<StateFile, StateFileError> {
        let failed = |what| StateFileError::io(&self.path, what);
        // Zeros first: if this is cut short, a header without its magic is no state file yet.
        self.file.set_len(0).map_err(failed("Emptying"))?;
        reached(Point::Emptied);
        extend(&self.file, len).map_err(failed("Sizing"))?;
        reached(Point::Sized);
        let region = map(&self.file, &self.path)?;
        let header = Header::new(counter, self.boot_id);
        let rest = header.as_bytes().get(MAGIC.len()..).unwrap_or_default();
        let bytes = region.as_volatile_slice();
        let written = bytes.write_slice(rest, MAGIC.len()).and_then(|()| {
            reached(Point::HeaderHalf);
            bytes.store(u64::from_ne_bytes(MAGIC), 0, Ordering::Release)
        });
        written.map_err(|error| failed("Writing")(io::Error::other(error)))?;
        reached(Point::Created);
        Ok(StateFile::new(
            self.path,
            self.file,
            region,
            0,
            &[],
            vm,
            None,
        ))
    }
}

fn boot_id() -> io::Result<[u8; 36]> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    let id = text.first_chunk().copied();
    id.ok_or_else(|| io::Error::other("the kernel's boot id is no UUID"))
}

/// A shared mapping of the whole file.
fn map(file: &File, path: &Path) -> Result<MmapRegion, StateFileError> {
    let failed = |what| StateFileError::io(path, what);
    let len = file.metadata().map_err(failed("Examining"))?.len();
    let clone = file.try_clone().map_err(failed("Mapping"))?;
    MmapRegion::from_file(FileOffset::new(clone, 0), len as usize)
        .map_err(|error| failed("Mapping")(io::Error::other(error)))
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
        .map_err(StateFileError::io(path, "Opening"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(StateFileError::InUse(path.to_owned())),
        Err(error) => Err(StateFileError::io(path, "Locking")(error.into())),
    }
}

/// Makes the file at least this long, in zeros that have their place in the file system: a store
/// to a mapping that finds the file system full would be the end of the process.
fn extend(file: &File, len: u64) -> io::Result<()> {
    let old_len = file.metadata()?.len();
    if old_len >= len {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Err(Errno::OPNOTSUPP) => file.write_all_at(&vec![0; (len - old_len) as usize], old_len),
        allocated => Ok(allocated?),
    }
}

/// The header; `None` in a file that no backend has finished making.
fn read_header(file: &File, path: &Path) -> Result<Option<Header>, StateFileError> {
    let failed = |what| StateFileError::io(path, what);
    let len = file.metadata().map_err(failed("Examining"))?.len();
    let mut bytes = [0; COMMIT];
    let there = bytes.len().min(len as usize);
    let (present, _) = bytes.split_at_mut(there);
    file.read_exact_at(present, 0).map_err(failed("Reading"))?;
    if bytes[..MAGIC.len()] == [0; MAGIC.len()] {
        return Ok(None);
    }
    match Header::read_from_bytes(&bytes) {
        Ok(header) if header.magic == MAGIC && len >= file_len(0) as u64 => Ok(Some(header)),
        Ok(header) if header.magic == MAGIC => Err(StateFileError::damaged(path, &"it is cut off")),
        _ => Err(StateFileError::Foreign(path.to_owned())),
    }
}

/// Why the VM of this header is gone, or cannot be read.
fn why_discarded(header: &Header, boot_id: [u8; 36]) -> Option<String> {
    let version = header.version;
    if !(FIRST_VERSION..=NEWEST_VERSION).contains(&version) {
        return Some(format!(
            "the file has version {version}, and this backend reads versions {FIRST_VERSION} to \
             {NEWEST_VERSION}"
        ));
    }
    (header.boot_id != boot_id).then(|| "the host was rebooted since".to_owned())
}
