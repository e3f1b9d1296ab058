//! How a file is made, grown and taken over from an earlier version, and what passes for one that
//! is not made yet.

use std::io::{Seek, SeekFrom, Write};

use super::header::{MAX_GENERATION, VERSION_AT};
use super::layout::file_len;
use super::*;

const GOLDEN_2: &[u8] = include_bytes!("../../../../tests/data/state-file/2.bin");

/// What a program of version 2 left that was killed while it made a file for eight vCPUs.
fn older_beginnings() -> [Vec<u8>; 2] {
    let zeros = vec![0; file_len(8)];
    let mut header = zeros.clone();
    header[8..64].copy_from_slice(&GOLDEN_2[8..64]);
    [zeros, header]
}

fn refused_as_foreign(path: &Path, bytes: &[u8]) {
    write_private(path, bytes);
    let refused = open(path, PROFILE.max_vcpus, |_| COUNTER);
    assert!(
        matches!(refused, Err(StateFileError::Foreign(_))),
        "{refused:?}"
    );
    assert!(std::fs::read(path).unwrap() == bytes, "it is left as it is");
}

#[test]
fn what_begins_with_zeros_and_is_not_ours_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    // No length of a state file.
    for len in [1, 8, 128, file_len(0), file_len(8) + 1, 1 << 20] {
        refused_as_foreign(&path, &vec![0; len]);
    }
    refused_as_foreign(&path, &vec![0; file_len(4097)]);
    // The length of a state file, and not only zeros.
    for beginning in older_beginnings() {
        for at in [0, 7, 8, 23, 60, 64, 72, 127, 128, file_len(8) - 1] {
            let mut foreign = beginning.clone();
            foreign[at] ^= 0x40;
            refused_as_foreign(&path, &foreign);
        }
    }
}

#[test]
fn what_an_earlier_program_had_not_finished_making_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    for beginning in older_beginnings() {
        write_private(&path, &beginning);
        let mut kept = Kept::new(&path);
        kept.configure(3);
        let expected = records(&kept.vm);
        drop(kept);
        assert_eq!(records(&reopened(&path, 0)), expected);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_file_that_was_made_empty_for_the_backend_is_filled_in_place() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    write_private(&path, &[]);
    let inode = std::fs::metadata(&path).unwrap().ino();
    let mut kept = Kept::new(&path);
    kept.configure(3);
    assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
}

#[test]
fn what_lies_past_the_slots_is_not_read_and_gives_way_to_more_slots() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(4);
    let expected = records(&kept.vm);
    drop(kept);
    let mut file = OpenOptions::new().write(true).open(&path).unwrap();
    file.seek(SeekFrom::End(0)).unwrap();
    file.write_all(&[0xaa; 1_000]).unwrap();
    // Sparse, and longer than any memory.
    file.set_len(1 << 40).unwrap();
    drop(file);
    assert_eq!(records(&reopened(&path, 0)), expected);
    for max_vcpus in [PROFILE.max_vcpus + 1, 64] {
        let (_file, found) = open(&path, max_vcpus, |_| COUNTER).unwrap();
        assert!(found.is_some());
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file.len(), file_len(max_vcpus));
        assert_eq!(header(&file).vcpus, max_vcpus);
        let after = &file[file_len(PROFILE.max_vcpus)..];
        assert!(after.iter().all(|byte| *byte == 0));
    }
    // A backend for fewer leaves the slots there.
    let (_file, _) = open(&path, 4, |_| COUNTER).unwrap();
    assert_eq!(header(&std::fs::read(&path).unwrap()).vcpus, 64);
}

#[test]
fn a_conversion_cut_short_anywhere_leaves_a_file_of_the_version_before_or_after() {
    let folder = tempfile::tempdir().unwrap();
    let (path, torn_path) = (folder.path().join("state"), folder.path().join("torn"));
    let boot_id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap();
    let mut before = GOLDEN_2.to_vec();
    before[24..60].copy_from_slice(&boot_id[..36]);
    write_private(&path, &before);
    let expected = records(&reopened(&path, 0));
    let after = std::fs::read(&path).unwrap();
    assert_eq!((before[VERSION_AT], after[VERSION_AT]), (2, 4));
    let mut random = generator(5);
    for round in 0..200 {
        let mut torn = before.clone();
        for at in 64..HEADER {
            if random(2) == 0 {
                torn[at] = after[at];
            }
        }
        write_private(&torn_path, &torn);
        for _ in 0..2 {
            assert_eq!(records(&reopened(&torn_path, 0)), expected, "{round}");
        }
        assert_eq!(std::fs::read(&torn_path).unwrap(), after);
    }
}

#[test]
fn a_number_of_changes_that_no_backend_reaches_is_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let boot_id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap();
    let mut file = GOLDEN_2.to_vec();
    file[24..60].copy_from_slice(&boot_id[..36]);
    file[64..72].copy_from_slice(&(MAX_GENERATION + 1).to_ne_bytes());
    write_private(&path, &file);
    let refused = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap_err();
    assert!(
        matches!(refused, StateFileError::Damaged { .. }),
        "{refused}"
    );
}
