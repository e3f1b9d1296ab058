use std::fs::File;
use std::process::Command;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::*;
use crate::children;

const PAGE: u64 = 0x1000;
const GUEST: u64 = 0x10_0000;

fn trap() -> Arc<Trap> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    Trap::new(eventfd(0, flags).unwrap()).unwrap()
}

fn is_woken(trap: &Trap) -> bool {
    rustix::io::read(trap, &mut [0_u8; 8]).is_ok()
}

/// A file and a region of all of it, watched.
fn shared(flags: MemfdFlags, len: u64, trap: &Arc<Trap>) -> (File, GuestMemoryMmap, Watched) {
    let file = File::from(memfd_create("shared", flags | MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    let backing = FileOffset::new(file.try_clone().unwrap(), 0);
    let mapping: MmapRegion = MmapRegion::from_file(backing, len as usize).unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(GUEST)).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
    let watched = trap.watch_regions(&memory).unwrap();
    (file, memory, watched)
}

#[test]
fn memory_whose_file_became_shorter_reads_as_zeros_and_marks_its_connection_alone() {
    let (trap, other) = (trap(), trap());
    let (file, memory, _watched) = shared(MemfdFlags::empty(), 16 * PAGE, &trap);
    let at = GuestAddress(GUEST + 4 * PAGE);
    memory.write_obj(7_u64, GuestAddress(GUEST)).unwrap();
    memory.write_obj(7_u64, at).unwrap();
    assert!(!trap.lost().is_set() && trap.sprung().is_none() && !is_woken(&trap));

    file.set_len(PAGE).unwrap();
    assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
    assert!(trap.lost().is_set() && is_woken(&trap));
    let sprung = trap.sprung().unwrap().to_string();
    let what = "its memory region of 0x10000 bytes at 0x100000 cannot be touched: ";
    assert!(sprung.starts_with(what), "{sprung}");
    let count = "(4 KiB of private memory took the place of what was lost)";
    assert!(sprung.ends_with(count), "{sprung}");
    let intact: u64 = memory.read_obj(GuestAddress(GUEST)).unwrap();
    assert_eq!(intact, 7, "what is there stays");
    memory.write_obj(9_u64, at).unwrap();
    assert_eq!(memory.read_obj::<u64>(at).unwrap(), 9);
    assert!(!other.lost().is_set() && other.sprung().is_none() && !is_woken(&other));
    assert!(!is_woken(&trap), "woken once");
}

#[test]
fn a_region_that_is_lost_page_by_page_takes_few_signals() {
    let trap = trap();
    let (file, memory, _watched) = shared(MemfdFlags::empty(), 4096 * PAGE, &trap);
    file.set_len(0).unwrap();
    for page in 0..4096 {
        let at = GuestAddress(GUEST + page * PAGE);
        memory.write_obj(page, at).unwrap();
    }
    let losses = trap.slot.losses();
    assert!((2..=13).contains(&losses), "{losses}");
    let in_place = trap.slot.in_place() as u64;
    assert!(
        (4096 * PAGE..=2 * 4096 * PAGE).contains(&in_place),
        "{in_place}"
    );
}

#[test]
fn huge_pages_that_the_host_does_not_have_are_replaced_whole() {
    let trap = trap();
    let huge = 2 << 20;
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let (_file, memory, watched) = shared(flags, 4 * huge, &trap);
    let at = GuestAddress(GUEST + huge + PAGE);
    memory.write_obj(7_u64, at).unwrap();
    assert_eq!(memory.read_obj::<u64>(at).unwrap(), 7);
    // A host with free huge pages has nothing to replace. One without sysfs does not tell.
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if let Ok(free) = free {
        assert_eq!(trap.lost().is_set(), free.trim() == "0");
    }
    drop(watched);
    // Its end unmaps all of it, private pages too.
    drop(memory);
}

#[test]
fn a_part_of_a_huge_page_is_replaced_with_the_rest_of_it() {
    let trap = trap();
    let huge = 2 << 20;
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let (file, memory, watched) = shared(flags, 2 * huge, &trap);
    drop(watched);
    file.set_len(0).unwrap();
    let start = memory.iter().next().unwrap().as_ptr().expose_provenance();
    let _watched = trap.watch_log(start, 100).unwrap();
    memory.write_obj(7_u64, GuestAddress(GUEST + 8)).unwrap();
    assert_eq!(memory.read_obj::<u64>(GuestAddress(GUEST + 8)).unwrap(), 7);
    assert!(trap.lost().is_set());
}

#[test]
fn a_log_is_named_as_such() {
    let trap = trap();
    let (file, memory, watched) = shared(MemfdFlags::empty(), PAGE, &trap);
    drop(watched);
    let start = memory.iter().next().unwrap().as_ptr().expose_provenance();
    let _watched = trap.watch_log(start, 1).unwrap();
    file.set_len(0).unwrap();
    memory.write_obj(1_u8, GuestAddress(GUEST)).unwrap();
    let sprung = trap.sprung().unwrap().to_string();
    assert!(sprung.starts_with("its dirty log cannot be touched: "));
}

#[test]
fn a_slot_is_as_new_for_the_next_connection() {
    let first = trap();
    let (file, memory, watched) = shared(MemfdFlags::empty(), PAGE, &first);
    file.set_len(0).unwrap();
    memory.write_obj(1_u8, GuestAddress(GUEST)).unwrap();
    assert!(first.lost().is_set());
    drop(watched);
    drop(first);
    for _ in 0..200 {
        let next = trap();
        assert!(!next.lost().is_set() && next.sprung().is_none());
    }
}

/// Runs this test again in a process of its own, with a variable that names what to do.
fn in_child(test: &str, what: &str) -> std::process::ExitStatus {
    let program = std::env::current_exe().unwrap();
    // Where Cargo runs tests by an emulator, this must as well.
    let mut command = match std::env::var_os("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER") {
        Some(runner) if cfg!(target_arch = "aarch64") => {
            let mut command = Command::new(runner);
            command.arg(program);
            command
        }
        _ => Command::new(program),
    };
    command.args([
        "--exact",
        &format!("{}::{test}", module_path!().split_once("::").unwrap().1),
    ]);
    command.env("TRAP_CHILD", what);
    children::output(&mut command).unwrap().status
}

#[test]
fn a_fault_elsewhere_or_a_signal_from_outside_ends_the_process() {
    use std::os::unix::process::ExitStatusExt;
    match std::env::var("TRAP_CHILD").as_deref() {
        Ok("fault") => {
            let trap = trap();
            let (file, memory, watched) = shared(MemfdFlags::empty(), PAGE, &trap);
            drop(watched);
            file.set_len(0).unwrap();
            memory.write_obj(1_u8, GuestAddress(GUEST)).unwrap();
        }
        Ok("kill") => {
            let _trap = trap();
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::BUS).unwrap();
            // Another thread may have the signal. Without its end this is the end of the test.
            std::thread::sleep(std::time::Duration::from_secs(30));
        }
        _ => {
            let test = "a_fault_elsewhere_or_a_signal_from_outside_ends_the_process";
            for what in ["fault", "kill"] {
                let status = in_child(test, what);
                assert_eq!(status.signal(), Some(libc::SIGBUS), "{what}: {status}");
            }
        }
    }
}
