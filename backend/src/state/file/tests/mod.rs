//! The VM and the clock device in a state file, through the timer device's own way to it.

mod confirming;
mod golden;
mod making;
mod refusals;

use std::fs::OpenOptions;
use std::path::Path;

use vhost_user_timer_counter::CounterId;
use vhost_user_timer_model::rtc::RtcRecord;
use vhost_user_timer_model::vm::{Effects, Incoming, Now, Profile, Token, Vm};
use vhost_user_timer_protocol::wire::{self, RequestHeader};
use vhost_user_timer_protocol::{Abi, CounterSource, Op, Phase, Register, VM_WIDE};
use zerocopy::FromBytes;

use super::header::Header;
use super::layout::{HEADER, VOID};
use super::*;
use crate::children;
use crate::device::persist::{self, Found};
use crate::state::Store;

/// Where a slot begins, and its length.
fn slot(record: Record, which: u8) -> (usize, usize) {
    let at = record.slot(which);
    (at, record.slot(1) - record.slot(0))
}

const COUNTER: CounterId = CounterId {
    source: 1,
    frequency: 1_000_000_000,
};

const PROFILE: Profile = Profile {
    max_vcpus: 8,
    request_queues: 1,
    frequency: 1_000_000_000,
    frequency_fixed: false,
    source: CounterSource::NotTold,
};

/// A VM whose every change goes into a state file.
struct Kept {
    vm: Vm,
    effects: Effects,
    store: Store,
    host: u64,
}

/// [`Opening::new`], while no child of another test has what this one has closed.
fn opening(path: &Path) -> Result<Opening, StateFileError> {
    let _none_starts = children::none_starts();
    Opening::new(path)
}

/// Opens a state file as the timer device does.
fn open(
    path: &Path,
    max_vcpus: u32,
    counter: impl FnOnce(Option<CounterId>) -> CounterId,
) -> Result<(Store, Option<Found>), StateFileError> {
    let opening = opening(path)?;
    let counter = counter(opening.counter());
    opening.expect_counter(counter)?;
    let found = Found::new(&opening, max_vcpus)?;
    let profile = Profile {
        max_vcpus,
        ..PROFILE
    };
    let vm = match &found {
        None => Vm::new(profile),
        Some(found) => found.vm(profile, |_| Now::at(0)).unwrap(),
    };
    let file = opening.accept(counter, max_vcpus, vm.vm_record().as_bytes())?;
    Ok((Store::from(file), found))
}

impl Kept {
    fn new(path: &Path) -> Self {
        let (store, found) = open(path, PROFILE.max_vcpus, |_| COUNTER).unwrap();
        assert!(found.is_none());
        Kept {
            vm: Vm::new(PROFILE),
            effects: Effects::default(),
            store,
            host: 1_000,
        }
    }

    /// Performs an operation, without taking it into the file.
    fn perform(&mut self, op: Op, vcpu: u32, body: &[u8]) {
        self.perform_with(0, op, vcpu, body);
    }

    /// The same with these flags in its header.
    fn perform_with(&mut self, flags: u16, op: Op, vcpu: u32, body: &[u8]) {
        let header = RequestHeader {
            op: op.code().into(),
            flags: flags.into(),
            vcpu: vcpu.into(),
            ..Default::default()
        };
        let request = [header.as_bytes(), body].concat();
        let call = Incoming::parse(&request, 4096, Token { queue: 1, head: 0 });
        self.host += 10;
        let _ = self.vm.handle(Now::at(self.host), &call, &mut self.effects);
        self.effects.released.clear();
        self.effects.notices.clear();
    }

    fn commit(&mut self) {
        self.effects
            .take_changed(|changed| persist::commit(&self.store, &self.vm, changed, self.host));
    }

    fn op(&mut self, op: Op, vcpu: u32, body: &[u8]) {
        self.perform(op, vcpu, body);
        self.commit();
    }

    fn configure(&mut self, vcpus: u32) {
        self.configure_with(vcpus, 0);
    }

    fn configure_with(&mut self, vcpus: u32, flags: u8) {
        let configure = wire::ConfigureVm {
            vcpus: vcpus.into(),
            flags,
            ..Default::default()
        };
        self.op(Op::ConfigureVm, VM_WIDE, configure.as_bytes());
        assert_eq!(self.vm.phase(), Phase::Paused);
    }

    /// A random operation that mostly succeeds.
    fn perform_random(&mut self, random: &mut dyn FnMut(u64) -> u64) {
        let vcpu = random(4) as u32;
        let register = Register::ALL[random(6) as usize].id(Abi::Arm64);
        let entry = wire::RegValue {
            id: register.into(),
            value: random(1 << 20).into(),
        };
        let begin = wire::RestoreBegin {
            vcpus: 4.into(),
            flags: (random(8) as u32).into(),
            timeout_ns: random(50).into(),
            ..Default::default()
        };
        let mut staged = wire::Vcpu {
            vcpu: vcpu.into(),
            ..Default::default()
        };
        for register in Register::ALL {
            staged.set(register, random(1 << 20));
        }
        match random(10) {
            0 => self.perform(Op::Pause, VM_WIDE, &[0; 8]),
            1 => self.perform(Op::Resume, VM_WIDE, &[]),
            2 => self.perform(Op::RestoreBegin, VM_WIDE, begin.as_bytes()),
            3 => self.perform(Op::RestoreAbort, VM_WIDE, &[]),
            4 => self.perform(Op::SetVm, VM_WIDE, staged.as_bytes()),
            5 => self.perform(Op::RestoreDone, vcpu, &[]),
            6 => self.perform(Op::SetCounterOffset, VM_WIDE, &[random(2) as u8; 16]),
            7 => self.perform(Op::SetCounterAnchor, VM_WIDE, &[random(99) as u8; 16]),
            _ => self.perform(Op::SetRegs, vcpu, entry.as_bytes()),
        }
    }
}

/// All that a VM's records say.
fn records(vm: &Vm) -> Vec<u8> {
    let mut bytes = vm.vm_record().as_bytes().to_vec();
    for index in 0..vm.vcpu_records() {
        bytes.extend_from_slice(vm.vcpu_record(index).as_bytes());
    }
    bytes
}

/// The header of a file of the present version.
fn header(file: &[u8]) -> Header {
    Header::read_from_prefix(file).unwrap().0
}

/// The same file with its header changed by `change`, and the checksum made right again.
fn with_header(file: &[u8], change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut changed = header(file);
    change(&mut changed);
    let mut file = file.to_vec();
    file[..HEADER].copy_from_slice(changed.sealed(changed.vcpus).as_bytes());
    file
}

/// Writes a file that only its owner can write, whatever the umask.
fn write_private(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, bytes).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
}

fn reopened(path: &Path, host: u64) -> Vm {
    let (_file, found) = open(path, PROFILE.max_vcpus, |_| COUNTER).unwrap();
    let found = found.expect("a VM in the file");
    found.vm(PROFILE, |_| Now::at(host)).unwrap()
}

fn generator(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

#[test]
fn whatever_was_committed_is_what_the_next_process_finds() {
    let folder = tempfile::tempdir().unwrap();
    for seed in 0..20 {
        let mut random = generator(seed);
        let path = folder.path().join(seed.to_string());
        let mut kept = Kept::new(&path);
        kept.configure(4);
        for _ in 0..200 {
            kept.perform_random(&mut random);
            kept.commit();
        }
        let (expected, host) = (records(&kept.vm), kept.host);
        drop(kept);
        assert_eq!(records(&reopened(&path, host)), expected, "seed {seed}");
    }
}

/// Where slots begin, and their lengths.
fn slots(len: usize) -> impl Iterator<Item = (usize, usize)> {
    let records = [Record::Vm, Record::Clock].into_iter();
    let vcpus = (0..).map(Record::Vcpu);
    records
        .chain(vcpus)
        .flat_map(|record| [slot(record, 0), slot(record, 1)])
        .take_while(move |(at, _)| *at < len)
}

/// What a file may be after a kill in the middle of a commit, at any instruction but the last.
fn cut_short(before: &[u8], after: &[u8], random: &mut impl FnMut(u64) -> u64) -> Vec<u8> {
    let mut torn = before.to_vec();
    for (at, len) in slots(torn.len()) {
        let slot = at..at + len;
        if before[slot.clone()] == after[slot.clone()] {
            continue;
        }
        match random(3) {
            0 => {}
            1 => torn[slot.clone()].copy_from_slice(&after[slot]),
            _ => {
                // Void, and any of its bytes may have been written.
                for at in slot {
                    if random(2) == 0 {
                        torn[at] = after[at];
                    }
                }
                torn[at..at + 8].copy_from_slice(&VOID.to_le_bytes());
            }
        }
    }
    torn
}

#[test]
fn the_clock_devices_record_is_kept_with_the_vm_and_as_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (path, torn_path) = (folder.path().join("state"), folder.path().join("torn"));
    let mut random = generator(11);
    let mut kept = Kept::new(&path);
    kept.configure(4);
    // What another process finds in a file of these bytes.
    let reopen = |bytes: &[u8], host: u64| {
        write_private(&torn_path, bytes);
        let (store, found) = open(&torn_path, PROFILE.max_vcpus, |_| COUNTER).unwrap();
        let vm = found.unwrap().vm(PROFILE, |_| Now::at(host)).unwrap();
        let clock = store.clock(|bytes| RtcRecord::read_from_bytes(bytes).map_err(|_| "length"));
        (records(&vm), clock.unwrap())
    };
    let mut record = None;
    for round in 0..100 {
        kept.perform_random(&mut random);
        kept.commit();
        let before = (std::fs::read(&path).unwrap(), record);
        // A change of the VM that is not committed yet.
        let vm = records(&kept.vm);
        kept.perform_random(&mut random);
        let mut new = RtcRecord::default();
        new.as_mut_bytes().fill_with(|| random(256) as u8);
        kept.store
            .commit(|change| change.put(Record::Clock, new.as_bytes()));
        record = Some(new);
        let after = std::fs::read(&path).unwrap();
        let torn = cut_short(&before.0, &after, &mut random);
        let host = kept.host;
        assert_eq!(reopen(&torn, host), (vm.clone(), before.1), "round {round}");
        assert_eq!(reopen(&after, host), (vm, record), "round {round}");
        // What else changes leaves it alone.
        kept.commit();
        let last = std::fs::read(&path).unwrap();
        assert_eq!(reopen(&last, host), (records(&kept.vm), record));
    }
}

/// Cuts commits short, and checks that the VM is the one from before each.
fn cut_commits_short(
    configure_flags: u8,
    mut perform: impl FnMut(&mut Kept, &mut dyn FnMut(u64) -> u64),
) {
    let folder = tempfile::tempdir().unwrap();
    let (path, torn_path) = (folder.path().join("state"), folder.path().join("torn"));
    let mut random = generator(7);
    let mut kept = Kept::new(&path);
    kept.configure_with(4, configure_flags);
    for round in 0..300 {
        let before = (std::fs::read(&path).unwrap(), records(&kept.vm));
        perform(&mut kept, &mut random);
        kept.commit();
        let after = std::fs::read(&path).unwrap();
        for _ in 0..3 {
            let torn = cut_short(&before.0, &after, &mut random);
            write_private(&torn_path, &torn);
            let vm = reopened(&torn_path, kept.host);
            assert_eq!(records(&vm), before.1, "round {round}");
            // And the process after that one, too, though nothing was committed meanwhile.
            assert_eq!(
                records(&reopened(&torn_path, kept.host)),
                before.1,
                "round {round}"
            );
        }
    }
}

#[test]
fn a_commit_cut_short_anywhere_leaves_the_vm_from_before_it() {
    cut_commits_short(0, |kept, random| kept.perform_random(random));
}

#[test]
fn no_single_bit_that_flips_makes_another_vm_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut random = generator(3);
    let mut kept = Kept::new(&path);
    kept.configure(4);
    for _ in 0..40 {
        kept.perform_random(&mut random);
        kept.commit();
    }
    // One change more: a bit of the commit that flips must not take back an odd one or an even one.
    for _ in 0..2 {
        kept.op(Op::SetCounterOffset, VM_WIDE, &[7; 16]);
        let (expected, host) = (records(&kept.vm), kept.host);
        let good = std::fs::read(&path).unwrap();
        every_bit_flipped(&folder.path().join("flipped"), &good, &expected, host);
    }
}

/// Flips each bit of a good file: the file is refused and left as it is, or it is the same VM.
fn every_bit_flipped(path: &Path, good: &[u8], expected: &[u8], host: u64) {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    // Written in place: truncating a file and writing it again may wait for the disk.
    let in_place = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .unwrap();
    for bit in 0..good.len() * 8 {
        let mut flipped = good.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        in_place.write_all_at(&flipped, 0).unwrap();
        let opened = open(path, PROFILE.max_vcpus, |old| old.unwrap_or(COUNTER));
        let Ok((file, found)) = opened else {
            assert_eq!(
                std::fs::read(path).unwrap(),
                flipped,
                "{bit}: it is left as it is"
            );
            continue;
        };
        assert!(bit >= HEADER * 8, "{bit}: the header is checked");
        drop(file);
        let found = found.unwrap_or_else(|| panic!("bit {bit} makes the VM go away"));
        let now = |_: &Vm| Now::at(host);
        let vm = found.vm(PROFILE, now).unwrap();
        assert_eq!(records(&vm), expected, "{bit}");
    }
}

#[test]
fn a_backend_for_more_vcpus_makes_room_for_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(2);
    let expected = records(&kept.vm);
    drop(kept);
    let (store, found) = open(&path, 64, |_| COUNTER).unwrap();
    let found = found.unwrap();
    let larger = Profile {
        max_vcpus: 64,
        ..PROFILE
    };
    let vm = found.vm(larger, |_| Now::at(0)).unwrap();
    assert_eq!(records(&vm), expected);
    let mut kept = Kept {
        vm,
        effects: Effects::default(),
        store,
        host: 2_000,
    };
    kept.vm.reset(&mut kept.effects);
    kept.commit();
    kept.configure(64);
    let expected = records(&kept.vm);
    drop(kept);
    let (_file, found) = open(&path, 64, |_| COUNTER).unwrap();
    let found = found.unwrap();
    let vm = found.vm(larger, |_| Now::at(0)).unwrap();
    assert_eq!(records(&vm), expected);
}

#[test]
fn what_a_commit_cut_short_left_is_never_taken_for_part_of_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(4);
    let entry = wire::RegValue {
        id: Register::TimerCval.id(Abi::Arm64).into(),
        value: 99.into(),
    };
    let before = std::fs::read(&path).unwrap();
    kept.op(Op::SetRegs, 3, entry.as_bytes());
    let mut torn = std::fs::read(&path).unwrap();
    let commit = COMMIT_AT..COMMIT_AT + 8;
    torn[commit.clone()].copy_from_slice(&before[commit]);
    drop(kept);
    write_private(&path, &torn);

    let (store, found) = open(&path, PROFILE.max_vcpus, |_| COUNTER).unwrap();
    let found = found.unwrap();
    let vm = found.vm(PROFILE, |_| Now::at(0)).unwrap();
    let mut kept = Kept {
        vm,
        effects: Effects::default(),
        store,
        host: 2_000,
    };
    kept.op(Op::SetRegs, 0, entry.as_bytes());
    let expected = records(&kept.vm);
    drop(kept);
    assert_eq!(records(&reopened(&path, 2_000)), expected);
}

#[test]
fn a_running_vm_goes_on_and_tells_what_fell_due_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut kept = Kept::new(&path);
    kept.configure(2);
    for (register, value) in [(Register::TimerCval, 5_000), (Register::TimerCtl, 1)] {
        let entry = wire::RegValue {
            id: register.id(Abi::Arm64).into(),
            value: value.into(),
        };
        kept.op(Op::SetRegs, 1, entry.as_bytes());
    }
    kept.op(Op::Resume, VM_WIDE, &[]);
    let resumed = kept.host;
    drop(kept);
    let now = Now::at(resumed + 7_000);
    let mut vm = reopened(&path, now.host);
    assert_eq!(vm.phase(), Phase::Running);
    let event = vm.next_event(now).unwrap();
    assert_eq!((event.vcpu.get(), event.count.get()), (1, 7_000));
    assert_eq!(vm.next_event(now), None);
}
