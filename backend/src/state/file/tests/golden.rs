//! Files that the first programs of each version wrote.

use vhost_user_timer_protocol::wire::configure_flags;

use super::*;

/// A state file as the first program of its version wrote it, but for the boot id, which is all
/// zeros.
struct Golden {
    version: u32,
    /// Whether the VM has flags of CONFIGURE_VM, and ends in ARMED after a restore.
    armed: bool,
    file: &'static [u8],
}

const GOLDEN: [Golden; 4] = [
    Golden {
        version: 2,
        armed: false,
        file: include_bytes!("../../../../tests/data/state-file/2.bin"),
    },
    Golden {
        version: 3,
        armed: true,
        file: include_bytes!("../../../../tests/data/state-file/3.bin"),
    },
    Golden {
        version: 4,
        armed: false,
        file: include_bytes!("../../../../tests/data/state-file/4.bin"),
    },
    Golden {
        version: 4,
        armed: true,
        file: include_bytes!("../../../../tests/data/state-file/4-armed.bin"),
    },
];
const BOOT_ID: std::ops::Range<usize> = 24..60;

impl Golden {
    /// The file as one of this boot.
    fn of_this_boot(&self) -> Vec<u8> {
        let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap();
        self.with_boot_id(self.file, id.first_chunk().unwrap())
    }

    /// A file of the same version with this boot id.
    fn with_boot_id(&self, file: &[u8], id: &[u8; 36]) -> Vec<u8> {
        if self.version < 4 {
            let mut file = file.to_vec();
            file[BOOT_ID].copy_from_slice(id);
            file
        } else {
            with_header(file, |header| header.boot_id = *id)
        }
    }
}

/// The life that a golden file has recorded.
fn golden_life(armed: bool, path: &Path) -> (Kept, RtcRecord) {
    let mut random = generator(if armed { 3 } else { 2 });
    let mut kept = Kept::new(path);
    let mut record = RtcRecord::default();
    let commit_clock = |kept: &Kept, record: &RtcRecord| {
        kept.store
            .commit(|change| change.put(Record::Clock, record.as_bytes()));
    };
    commit_clock(&kept, &record);
    kept.configure_with(4, if armed { configure_flags::ALL } else { 0 });
    for _ in 0..60 {
        if armed {
            kept.perform_random_confirming(&mut random);
        } else {
            kept.perform_random(&mut random);
        }
        kept.commit();
        if random(4) == 0 {
            record.as_mut_bytes().fill_with(|| random(256) as u8);
            commit_clock(&kept, &record);
        }
    }
    if armed {
        kept.perform(Op::Pause, VM_WIDE, &[0; 8]);
        kept.restore_to_armed(1 << 40);
        kept.commit();
        assert_eq!(kept.vm.phase(), Phase::Armed);
    }
    (kept, record)
}

#[test]
fn the_same_life_writes_the_golden_file_to_the_byte() {
    for golden in GOLDEN.iter().filter(|golden| golden.version == 4) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        drop(golden_life(golden.armed, &path));
        let written = std::fs::read(&path).unwrap();
        assert!(
            golden.with_boot_id(&written, &[0; 36]) == golden.file,
            "the layout has changed"
        );
    }
}

#[test]
fn the_golden_file_is_the_vm_and_the_clocks_that_it_was() {
    for golden in &GOLDEN {
        let folder = tempfile::tempdir().unwrap();
        let (path, life) = (folder.path().join("state"), folder.path().join("life"));
        let (kept, record) = golden_life(golden.armed, &life);
        write_private(&path, &golden.of_this_boot());
        // The first program makes a file of the present version of it, the second one reads that.
        for _ in 0..2 {
            assert_eq!(records(&reopened(&path, kept.host)), records(&kept.vm));
            let (store, _) = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap();
            let clock =
                store.clock(|bytes| RtcRecord::read_from_bytes(bytes).map_err(|_| "length"));
            assert_eq!(clock.unwrap(), Some(record));
            assert_eq!(header(&std::fs::read(&path).unwrap()).version, 4);
        }
    }
}
