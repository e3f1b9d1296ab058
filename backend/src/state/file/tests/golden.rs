//! A file that the first release of version 2 wrote.

use super::*;

/// A state file as version 2 was first released, but for its boot id, which is all zeros.
const GOLDEN: &[u8] = include_bytes!("../../../../tests/data/state-file/2.bin");
const BOOT_ID: std::ops::Range<usize> = 24..60;

/// The life that the golden file has recorded.
fn golden_life(path: &Path) -> (Kept, RtcRecord) {
    let mut random = generator(2);
    let mut kept = Kept::new(path);
    let mut record = RtcRecord::default();
    let commit_clock = |kept: &Kept, record: &RtcRecord| {
        kept.store
            .commit(|change| change.put(Record::Clock, record.as_bytes()));
    };
    commit_clock(&kept, &record);
    kept.configure(4);
    for _ in 0..60 {
        kept.perform_random(&mut random);
        kept.commit();
        if random(4) == 0 {
            record.as_mut_bytes().fill_with(|| random(256) as u8);
            commit_clock(&kept, &record);
        }
    }
    (kept, record)
}

#[test]
fn the_same_life_writes_the_golden_file_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    drop(golden_life(&path));
    let mut written = std::fs::read(&path).unwrap();
    written[BOOT_ID].copy_from_slice(&GOLDEN[BOOT_ID]);
    assert!(written == GOLDEN, "the layout has changed");
}

#[test]
fn the_golden_file_is_the_vm_and_the_clocks_that_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (path, life) = (folder.path().join("state"), folder.path().join("life"));
    let (kept, record) = golden_life(&life);
    let mut golden = GOLDEN.to_vec();
    golden[BOOT_ID].copy_from_slice(&std::fs::read(&life).unwrap()[BOOT_ID]);
    std::fs::write(&path, golden).unwrap();
    assert_eq!(records(&reopened(&path, kept.host)), records(&kept.vm));
    let (store, _) = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap();
    let clock = store.clock(|bytes| RtcRecord::read_from_bytes(bytes).map_err(|_| "length"));
    assert_eq!(clock.unwrap(), Some(record));
}
