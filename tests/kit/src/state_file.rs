//! State files as a test edits them, with the layout of `STATE-FILE.md` written down by hand.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Bytes of the header of version 4.
pub const HEADER: usize = 128;
/// Where the version is: a `u32`.
pub const VERSION: usize = 8;
/// Where the boot id is.
pub const BOOT_ID: Range<usize> = 24..60;
/// Where the commit is: a `u64`, 7 bytes of generation and their exclusive or.
pub const COMMIT: Range<usize> = 72..80;
/// Where the number of vCPUs is for which there are slots: a `u32`; 0 while the file is being made.
pub const VCPUS: Range<usize> = 80..84;
/// Where the header's checksum is: a `u32`.
pub const CRC: Range<usize> = 84..88;
/// Where the VM's two slots begin: the generation, the checksum, the form, then the record.
pub const VM_SLOTS: [usize; 2] = [128, 384];
const CLOCK_SLOTS: [usize; 2] = [640, 896];
const CLOCK_RECORD: usize = 112;
const VCPU_SLOTS: usize = 1152;
const VCPU_SLOT: usize = 96;
const VCPU_RECORD: usize = 64;
/// Bytes of a slot's head.
pub const SLOT_HEAD: usize = 16;
/// Bytes of the VM's record; the host count follows.
pub const VM_RECORD: usize = 136;

/// The CRC-32 of IEEE 802.3, bit by bit.
pub fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let odd = crc & 1 != 0;
            crc = crc >> 1 ^ if odd { 0xedb8_8320 } else { 0 };
        }
    }
    !crc
}

/// Makes the header's checksum right again.
pub fn seal(file: &mut [u8]) {
    let mut covered = file[..HEADER].to_vec();
    covered[COMMIT].fill(0);
    covered[CRC].fill(0);
    file[CRC].copy_from_slice(&crc32(&covered).to_ne_bytes());
}

/// Gives the file this boot id.
pub fn set_boot_id(file: &mut [u8], id: &[u8]) {
    file[BOOT_ID].copy_from_slice(id);
    if file[VERSION] >= 4 {
        seal(file);
    }
}

/// The file as one of this boot of the host.
///
/// # Panics
///
/// Where the host does not say its boot id.
pub fn of_this_boot(file: &[u8]) -> Vec<u8> {
    let id = fs::read("/proc/sys/kernel/random/boot_id").expect("the boot id");
    let mut file = file.to_vec();
    set_boot_id(&mut file, &id[..36]);
    file
}

/// The file as one of another boot of the host.
pub fn of_another_boot(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    let mut id = file[BOOT_ID].to_vec();
    id[0] ^= 1;
    set_boot_id(&mut file, &id);
    file
}

fn number(file: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(file[at..at + 8].try_into().expect("8 bytes"))
}

/// Makes the checksum of a slot right for its first bytes after the head.
fn seal_slot(file: &mut [u8], slot: usize, bytes: usize) {
    let record = slot + SLOT_HEAD..slot + SLOT_HEAD + bytes;
    let covered = [&file[slot..slot + 8], &file[record]].concat();
    file[slot + 8..slot + 12].copy_from_slice(&crc32(&covered).to_ne_bytes());
}

/// Makes the checksums of all slots right again that a change has written.
pub fn seal_slots(file: &mut [u8]) {
    let vm = VM_SLOTS.map(|slot| match file[slot + 12] {
        1 => (slot, VM_RECORD + 8),
        _ => (slot, VM_RECORD),
    });
    let clock = CLOCK_SLOTS.map(|slot| (slot, CLOCK_RECORD));
    let vcpus = (VCPU_SLOTS..file.len().saturating_sub(VCPU_SLOT - 1)).step_by(VCPU_SLOT);
    let vcpus = vcpus.map(|slot| (slot, VCPU_RECORD));
    for (slot, bytes) in vm.into_iter().chain(clock).chain(vcpus) {
        if ![0, u64::MAX].contains(&number(file, slot)) {
            seal_slot(file, slot, bytes);
        }
    }
}

/// The file as if the host count had been this much larger when the VM last changed, ticks.
///
/// # Panics
///
/// Unless the file is a whole one of version 4 with a VM.
pub fn with_larger_host_count(file: &[u8], ticks: u64) -> Vec<u8> {
    let mut file = file.to_vec();
    let last = number(&file, COMMIT.start) & u64::MAX >> 8;
    let slot = VM_SLOTS.into_iter().find(|at| number(&file, *at) == last);
    let slot = slot.expect("the slot of the last change");
    let at = slot + SLOT_HEAD + VM_RECORD;
    let count = number(&file, at).wrapping_add(ticks);
    file[at..at + 8].copy_from_slice(&count.to_ne_bytes());
    seal_slot(&mut file, slot, VM_RECORD + 8);
    file
}

/// The file as a program of version 2 would have left it.
pub fn as_of_version_2(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    let last = number(&file, COMMIT.start) & u64::MAX >> 8;
    file[VERSION] = 2;
    file[64..72].copy_from_slice(&last.to_ne_bytes());
    file[72..HEADER].fill(0);
    for slot in VM_SLOTS {
        if ![0, u64::MAX].contains(&number(&file, slot)) {
            file[slot + 12..slot + SLOT_HEAD].fill(0);
            file[slot + SLOT_HEAD + VM_RECORD..][..8].fill(0);
            seal_slot(&mut file, slot, VM_RECORD);
        }
    }
    file
}

/// Writes a new file that only its owner can read and write, whatever the umask.
///
/// # Errors
///
/// Those of the system.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.set_permissions(PermissionsExt::from_mode(0o600))?;
    file.write_all(bytes)
}
