//! A state file that is locked and examined, and not yet changed.

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vhost_user_timer_counter::{CounterId, HostCounter, Source};

use crate::state::file::access::{len_of, map, open_locked, read_head};
use crate::state::file::contents::{Contents, read_back};
use crate::state::file::header::{Head, Header, is_an_older_beginning, may_be_an_older_beginning};
use crate::state::file::layout::file_len;
use crate::state::file::{StateFile, StateFileError, making};

/// See the module.
pub struct Opening {
    path: PathBuf,
    /// Holds the lock.
    file: File,
    boot_id: [u8; 36],
    /// What a backend has left since the host was booted.
    previous: Option<Previous>,
}

struct Previous {
    header: Header,
    /// For how many vCPUs there are slots.
    vcpus: u32,
    contents: Contents,
}

impl Opening {
    /// Opens the file, or creates it with mode 0600, and locks it. What a backend has left there
    /// since the host was booted is found; what one of another boot has left is discarded by
    /// [`accept`](Self::accept), and the log says so.
    ///
    /// # Errors
    ///
    /// [`StateFileError`] where the file is not what a backend leaves behind, others can change it,
    /// or the system refuses.
    pub fn new(path: &Path) -> Result<Self, StateFileError> {
        let file = open_locked(path)?;
        let boot_id = boot_id().map_err(StateFileError::io(path, "reading the boot id for"))?;
        let damaged = |what: &dyn Display| StateFileError::damaged(path, what);
        let previous = match whole(&file, path)? {
            None => None,
            Some((header, _)) if header.boot_id != boot_id => {
                log::warn!(
                    "Discarding the VM in the state file {}: the host was rebooted since",
                    path.display()
                );
                None
            }
            Some((header, vcpus)) => {
                let commit = header.commit();
                let commit = commit.ok_or_else(|| damaged(&"its commit has wrong check bits"))?;
                let region = map(&file, file_len(vcpus), path)?;
                Some(Previous {
                    header,
                    vcpus,
                    contents: read_back(&region, commit, vcpus).map_err(|what| damaged(&what))?,
                })
            }
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
        let previous = self.previous.as_ref();
        previous.map(|previous| previous.header.counter())
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

    /// Refuses a VM of this frequency where only another one is accepted, both Hz.
    ///
    /// # Errors
    ///
    /// [`StateFileError::Frequency`].
    pub fn expect_frequency(&self, vm: u64, only: u64) -> Result<(), StateFileError> {
        if vm == only {
            return Ok(());
        }
        let path = self.path.clone();
        Err(StateFileError::Frequency { path, vm, only })
    }

    /// Refuses a file whose VM's host count, which now `reads` this many ticks of `frequency` Hz,
    /// was larger at the last change. (A count that is larger now is time that passed.)
    ///
    /// # Errors
    ///
    /// [`StateFileError::WentBack`].
    pub fn expect_count(&self, reads: u64, frequency: u64) -> Result<(), StateFileError> {
        match self.contents().and_then(|contents| contents.host_count) {
            // Counts are modulo 2^64.
            Some(wrote) if reads.wrapping_sub(wrote).cast_signed() < 0 => {
                Err(StateFileError::WentBack {
                    path: self.path.clone(),
                    wrote,
                    reads,
                    frequency,
                })
            }
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
        let Opening { path, file, .. } = self;
        let (region, vcpus, contents) = match self.previous {
            None => {
                let header = Header::new(counter, self.boot_id);
                let region = making::begin(&file, header, max_vcpus, &path)?;
                (region, max_vcpus, Contents::default())
            }
            Some(previous) => {
                let vcpus = previous.vcpus.max(max_vcpus);
                let region = making::bring_up_to_date(
                    &file,
                    previous.header,
                    previous.vcpus,
                    vcpus,
                    &previous.contents.torn_slots,
                    &path,
                )?;
                (region, vcpus, previous.contents)
            }
        };
        Ok(StateFile::new(path, file, region, vcpus, contents, vm))
    }
}

fn boot_id() -> io::Result<[u8; 36]> {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    let id = text.first_chunk().copied();
    id.ok_or_else(|| io::Error::other("the kernel's boot id is no UUID"))
}

/// The header of a file that a backend has finished making, and for how many vCPUs the file has
/// slots; `None` where there is nothing yet. Nothing that is not surely this program's own passes
/// for nothing.
fn whole(file: &File, path: &Path) -> Result<Option<(Header, u32)>, StateFileError> {
    let len = len_of(file, path)?;
    match Head::of(read_head(file, len, path)?, len) {
        Head::Empty | Head::Unfinished => Ok(None),
        Head::Whole(header, vcpus) => Ok(Some((header, vcpus))),
        Head::Damaged(what) => Err(StateFileError::damaged(path, &what)),
        Head::OtherVersion(version) => Err(StateFileError::OtherVersion {
            path: path.to_owned(),
            version,
        }),
        Head::Foreign if may_be_an_older_beginning(len) => {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, 0)
                .map_err(StateFileError::io(path, "reading"))?;
            if is_an_older_beginning(&bytes) {
                Ok(None)
            } else {
                Err(StateFileError::Foreign(path.to_owned()))
            }
        }
        Head::Foreign => Err(StateFileError::Foreign(path.to_owned())),
    }
}
