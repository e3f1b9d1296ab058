//! How a file becomes one of the present version and size. A kill at any instruction leaves a file
//! that says what it is: `STATE-FILE.md` has the argument.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{Ordering, compiler_fence};

use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use zerocopy::IntoBytes;

use crate::failpoint::{Point, reached};
use crate::state::file::StateFileError;
use crate::state::file::access::{map, reserve};
use crate::state::file::header::{ADDED, Header, NEWEST_VERSION, SEAL_AT, VERSION_AT};
use crate::state::file::layout::{VOID, file_len};

/// Empties the file and makes it one without a VM, with slots for so many vCPUs.
pub(super) fn begin(
    file: &File,
    header: Header,
    vcpus: u32,
    path: &Path,
) -> Result<MmapRegion, StateFileError> {
    let failed = |what| StateFileError::io(path, what);
    file.set_len(0).map_err(failed("emptying"))?;
    reached(Point::Emptied);
    // Short enough for the kernel to write all or nothing of it.
    file.write_all_at(header.as_bytes(), 0)
        .map_err(failed("writing"))?;
    reached(Point::HeaderWritten);
    let len = file_len(vcpus);
    reserve(file, len as u64).map_err(failed("sizing"))?;
    reached(Point::Sized);
    let region = map(file, len, path)?;
    seal(&region, header.sealed(vcpus), path)?;
    reached(Point::Created);
    Ok(region)
}

/// Makes a whole file, with slots for `had` vCPUs, one of the present version with slots for
/// `vcpus`, never fewer than there are. What is in the slots stays, but for the torn ones.
pub(super) fn bring_up_to_date(
    file: &File,
    header: Header,
    had: u32,
    vcpus: u32,
    torn_slots: &[usize],
    path: &Path,
) -> Result<MmapRegion, StateFileError> {
    let failed = |what| StateFileError::io(path, what);
    if vcpus > had {
        // What another program appended, or a kill left, is no slot's.
        file.set_len(file_len(had) as u64)
            .map_err(failed("sizing"))?;
        reached(Point::Trimmed);
    }
    let len = file_len(vcpus);
    reserve(file, len as u64).map_err(failed("sizing"))?;
    reached(Point::Extended);
    let region = map(file, len, path)?;
    // Their generation will be that of another change.
    for at in torn_slots {
        let voided = region
            .as_volatile_slice()
            .store(VOID, *at, Ordering::Release);
        debug_assert!(voided.is_ok());
    }
    if header.version < NEWEST_VERSION {
        convert(&region, header.converted(vcpus), path)?;
    } else if vcpus > had {
        seal(&region, header.sealed(vcpus), path)?;
        reached(Point::Grown);
    }
    Ok(region)
}

/// Stores how many vCPUs there is room for, and the header's checksum, in one.
fn seal(region: &MmapRegion, header: Header, path: &Path) -> Result<(), StateFileError> {
    let bytes = region.as_volatile_slice();
    compiler_fence(Ordering::SeqCst);
    bytes
        .store(header.seal(), SEAL_AT, Ordering::Release)
        .map_err(|error| StateFileError::io(path, "writing")(io::Error::other(error)))
}

/// Writes what this version has more, where an earlier one has zeros that it does not read, and
/// then the version.
fn convert(region: &MmapRegion, header: Header, path: &Path) -> Result<(), StateFileError> {
    let bytes = region.as_volatile_slice();
    let added = header.as_bytes().get(ADDED).unwrap_or_default();
    let (first, second) = added.split_at(added.len() / 4);
    let written = bytes
        .write_slice(first, ADDED.start)
        .and_then(|()| {
            reached(Point::ConvertedHalf);
            bytes.write_slice(second, ADDED.start + first.len())
        })
        .and_then(|()| {
            reached(Point::ConversionReady);
            compiler_fence(Ordering::SeqCst);
            bytes.store(header.version, VERSION_AT, Ordering::Release)
        });
    written.map_err(|error| StateFileError::io(path, "converting")(io::Error::other(error)))?;
    reached(Point::Converted);
    Ok(())
}
