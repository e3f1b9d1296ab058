//! Files that the first releases of versions 2 and 3 wrote.

use vhost_user_timer_protocol::wire::configure_flags;

use super::*;

/// A state file of each version as it was first released, but for its boot id, which is all zeros.
const GOLDEN: [(u32, &[u8]); 2] = [
    (2, include_bytes!("../../../../tests/data/state-file/2.bin")),
    (3, include_bytes!("../../../../tests/data/state-file/3.bin")),
];
const BOOT_ID: std::ops::Range<usize> = 24..60;

/// The life that the golden file of this version has recorded. Version 3's ends in ARMED, after
/// a restore.
fn golden_life(version: u32, path: &Path) -> (Kept, RtcRecord) {
    let mut random = generator(version.into());
    let mut kept = Kept::new(path);
    let mut record = RtcRecord::default();
    let commit_clock = |kept: &Kept, record: &RtcRecord| {
        kept.store
            .commit(|change| change.put(Record::Clock, record.as_bytes()));
    };
    commit_clock(&kept, &record);
    match version {
        2 => kept.configure(4),
        _ => kept.configure_with(4, configure_flags::ALL),
    }
    for _ in 0..60 {
        match version {
            2 => kept.perform_random(&mut random),
            _ => kept.perform_random_confirming(&mut random),
        }
        kept.commit();
        if random(4) == 0 {
            record.as_mut_bytes().fill_with(|| random(256) as u8);
            commit_clock(&kept, &record);
        }
    }
    if version == 3 {
        kept.perform(Op::Pause, VM_WIDE, &[0; 8]);
        kept.restore_to_armed(1 << 40);
        kept.commit();
        assert_eq!(kept.vm.phase(), Phase::Armed);
    }
    (kept, record)
}

#[test]
fn the_same_life_writes_the_golden_file_to_the_byte() {
    for (version, golden) in GOLDEN {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        drop(golden_life(version, &path));
        let mut written = std::fs::read(&path).unwrap();
        written[BOOT_ID].copy_from_slice(&golden[BOOT_ID]);
        assert!(
            written == golden,
            "the layout of version {version} has changed"
        );
    }
}

#[test]
fn the_golden_file_is_the_vm_and_the_clocks_that_it_was() {
    for (version, golden) in GOLDEN {
        let folder = tempfile::tempdir().unwrap();
        let (path, life) = (folder.path().join("state"), folder.path().join("life"));
        let (kept, record) = golden_life(version, &life);
        let mut golden = golden.to_vec();
        golden[BOOT_ID].copy_from_slice(&std::fs::read(&life).unwrap()[BOOT_ID]);
        std::fs::write(&path, golden).unwrap();
        assert_eq!(records(&reopened(&path, kept.host)), records(&kept.vm));
        let (store, _) = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap();
        let clock = store.clock(|bytes| RtcRecord::read_from_bytes(bytes).map_err(|_| "length"));
        assert_eq!(clock.unwrap(), Some(record));
    }
}
