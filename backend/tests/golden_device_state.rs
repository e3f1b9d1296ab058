//! Streams of every version that a backend ever wrote are read forever.
//!
//! The files in `data/device-state` are never changed. `VUT_WRITE_GOLDEN=1 cargo test --test
//! golden_device_state` writes those that are not there, of the version that is written now; a new
//! version gets files and expectations of its own.

use std::path::PathBuf;
use std::sync::Once;

use vhost_user_timer::state::stream::{decode, encode};
use vhost_user_timer_kit::reference::Ask;
use vhost_user_timer_model::vm::{
    Effects, Handled, Incoming, LoadError, Now, Profile, Saved, SavedTimer, Token, Vm, VmFlags,
};
use vhost_user_timer_protocol::wire::{configure_flags, info_flags};
use vhost_user_timer_protocol::{Abi, CounterSource, MAX_MESSAGE, Phase};

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
        let now = Now::at(5);
        vm.load(now, &saved, &mut Effects::default()).unwrap();
        assert_eq!(vm.phase(), Phase::Restoring);
        let has = |flag| vm.info(now).flags & flag != 0;
        assert_eq!(has(info_flags::CONFIRM), saved.flags.confirm);
        assert_eq!(has(info_flags::ONE_OFFSET), saved.flags.one_offset);
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

fn performed(vm: &mut Vm, ask: &Ask, host: u64) {
    let bytes = ask.bytes();
    let call = Incoming::parse(&bytes, MAX_MESSAGE, Token { queue: 1, head: 0 });
    let mut effects = Effects::default();
    assert_eq!(
        vm.handle(Now::at(host), &call, &mut effects),
        Handled::Answered
    );
    assert_eq!(effects.response[..4], [0; 4], "{ask:?}");
}

/// A VM that was configured with these flags, or one in NEW.
fn vm_with(flags: Option<u8>) -> Vm {
    let mut vm = Vm::new(Profile {
        max_vcpus: 8,
        request_queues: 1,
        frequency: 62_500_000,
        frequency_fixed: false,
        source: CounterSource::NotTold,
    });
    if let Some(flags) = flags {
        performed(&mut vm, &Ask::configure_with(2, 0, flags, 0), 1);
    }
    vm
}

#[test]
fn flags_travel_with_a_vm_unless_it_is_configured_where_it_arrives() {
    for source in 0..=configure_flags::ALL {
        let saved = vm_with(Some(source)).save(Now::at(2)).unwrap();
        let stream = encode(&saved);
        for destination in [None]
            .into_iter()
            .chain((0..=configure_flags::ALL).map(Some))
        {
            let mut vm = vm_with(destination);
            let saved = decode(&stream).unwrap();
            vm.load(Now::at(3), &saved, &mut Effects::default())
                .unwrap();
            let flags = vm.info(Now::at(3)).flags;
            let has = |flag| flags & flag != 0;
            let expected = destination.unwrap_or(source);
            assert_eq!(
                (has(info_flags::CONFIRM), has(info_flags::ONE_OFFSET)),
                (
                    expected & configure_flags::CONFIRM != 0,
                    expected & configure_flags::ONE_OFFSET != 0
                ),
                "{source} to {destination:?}"
            );
        }
    }
}

#[test]
fn an_armed_vm_is_saved_at_one_instant_as_a_running_one_and_takes_no_load() {
    let mut vm = vm_with(Some(configure_flags::ALL));
    performed(&mut vm, &Ask::resume(), 100);
    assert_eq!(vm.phase(), Phase::Armed);
    let before = vm.clone();
    let saved = vm.save(Now::at(107)).unwrap();
    assert_eq!(saved.counts, [7, 7], "both clocks count in ARMED");
    assert_eq!(decode(&encode(&saved)).unwrap(), saved);
    let refused = vm.load(Now::at(108), &saved, &mut Effects::default());
    assert_eq!(refused, Err(LoadError::Phase(Phase::Armed)));
    assert_eq!(vm, before);
}
