//! Streams of every version that a backend ever wrote are read forever.
//!
//! The files in `data/device-state` are never changed. `VUT_WRITE_GOLDEN=1 cargo test --test
//! golden_device_state` writes those that are not there, of the version that is written now; a new
//! version gets files and expectations of its own.

use std::path::PathBuf;
use std::sync::Once;

use vhost_user_timer::state::stream::{decode, encode};
use vhost_user_timer_model::vm::{Effects, Now, Profile, Saved, SavedTimer, Vm, VmFlags};
use vhost_user_timer_protocol::{Abi, CounterSource, Phase};

/// The folder of this crate's Cargo.toml. It is looked up when the test runs, so that the program
/// can run elsewhere than it was built.
fn manifest_dir() -> PathBuf {
    let folder = std::env::var_os("CARGO_MANIFEST_DIR");
    folder.expect("CARGO_MANIFEST_DIR: cargo sets it").into()
}

fn folder() -> PathBuf {
    static WRITTEN: Once = Once::new();
    let folder = manifest_dir().join("tests/data/device-state");
    WRITTEN.call_once(|| {
        let asked = std::env::var_os("VUT_WRITE_GOLDEN").is_some();
        for (name, saved) in golden() {
            let path = folder.join(name);
            if asked && !path.exists() {
                std::fs::write(&path, encode(&saved)).unwrap();
            }
        }
    });
    folder
}

fn timer(control: u64, compare: u64) -> SavedTimer {
    SavedTimer { control, compare }
}

/// What the files hold, by name.
fn golden() -> [(&'static str, Saved); 4] {
    [
        (
            "v1-1vcpu.bin",
            Saved {
                abi: Abi::Arm,
                frequency: 24_000_000,
                flags: VmFlags::default(),
                counts: [0, u64::MAX],
                vcpus: vec![[timer(0, 0), timer(7, u64::MAX)]],
            },
        ),
        (
            "v1-8vcpus.bin",
            Saved {
                abi: Abi::Arm64,
                frequency: 1_000_000_000,
                flags: VmFlags::default(),
                counts: [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210],
                vcpus: (0..8)
                    .map(|n| {
                        let virt = timer(n, 0x0123_4567_89ab_cdef + n * 0x1_0000_0001);
                        [virt, timer(7 - n, 1 << (8 * n))]
                    })
                    .collect(),
            },
        ),
        (
            "v2-confirm.bin",
            Saved {
                abi: Abi::Arm64,
                frequency: 25_000_000,
                flags: VmFlags {
                    confirm: true,
                    one_offset: false,
                },
                counts: [77, 1 << 63],
                vcpus: vec![[timer(1, 88), timer(3, 99)]],
            },
        ),
        (
            "v2-confirm-one-offset.bin",
            Saved {
                abi: Abi::Arm64,
                frequency: 62_500_000,
                flags: VmFlags {
                    confirm: true,
                    one_offset: true,
                },
                counts: [0x0123_4567_89ab_cdef; 2],
                vcpus: (0..2).map(|n| [timer(n, n), timer(5, n + 2)]).collect(),
            },
        ),
    ]
}

#[test]
fn every_golden_file_says_what_it_always_said() {
    for (name, saved) in golden() {
        let bytes = std::fs::read(folder().join(name));
        let bytes = bytes.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(decode(&bytes).unwrap(), saved, "{name}");
    }
}

#[test]
fn every_golden_file_of_any_version_makes_a_vm() {
    let profile = Profile {
        max_vcpus: 8,
        request_queues: 1,
        frequency: 1_000_000_000,
        frequency_fixed: false,
        source: CounterSource::NotTold,
    };
    let mut files = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let saved = decode(&std::fs::read(&path).unwrap());
        let saved = saved.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut vm = Vm::new(profile);
        vm.load(Now::at(5), &saved, &mut Effects::default())
            .unwrap();
        assert_eq!(vm.phase(), Phase::Restoring);
        files += 1;
    }
    assert!(files >= golden().len());
}

#[test]
fn the_version_that_is_written_now_is_that_of_the_golden_files() {
    for (name, saved) in golden() {
        let bytes = std::fs::read(folder().join(name)).unwrap();
        assert_eq!(encode(&saved), bytes, "{name}");
    }
}
