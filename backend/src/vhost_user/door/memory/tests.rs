use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

fn memfd(len: u64) -> OwnedFd {
    let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file.into()
}

fn refusal(file: impl AsFd, offset: u64, len: u64) -> String {
    let refused = check_region(file.as_fd(), offset, len);
    refused.expect_err("it is refused").to_string()
}

#[test]
fn a_file_system_of_another_process_or_host_is_refused_by_name() {
    check_file_system(FileSystem::Local).unwrap();
    let why = check_file_system(FileSystem::Far("nfs4".to_owned())).unwrap_err();
    assert!(why.starts_with("lies on nfs4, "), "{why}");
    let unknown = check_file_system(FileSystem::Unknown).unwrap_err();
    assert!(unknown.contains("not mounted"), "{unknown}");
}

#[test]
fn a_memfd_and_a_file_on_a_local_disk_are_accepted_as_far_as_they_reach() {
    let page = page_size() as u64;
    let file = memfd(4 * page);
    for (offset, len) in [(0, 4 * page), (0, 1), (page, 3 * page), (3 * page, page)] {
        check_region(file.as_fd(), offset, len).unwrap();
        check_log(file.as_fd(), offset, len).unwrap();
    }
    for (offset, len) in [
        (0, 4 * page + 1),
        (4 * page, 1),
        (page, 4 * page),
        (u64::MAX, 2),
        (!(page - 1), u64::MAX),
    ] {
        let why = refusal(&file, offset, len);
        assert!(why.contains("has 0x4000 bytes") || page != 0x1000, "{why}");
        assert!(why.contains("extend the file"), "{why}");
    }
    assert!(refusal(&file, 0, 0).contains("length 0"));
    assert!(refusal(&file, 1, page).contains("a multiple of its page size"));

    let disk = tempfile::tempfile().unwrap();
    disk.set_len(page).unwrap();
    check_region(disk.as_fd(), 0, page).unwrap();
    assert!(refusal(&disk, 0, page + 1).contains("extend the file"));
}

#[test]
fn a_mapping_of_huge_pages_has_whole_ones() {
    let huge = 2 << 20;
    check_length(4 * huge, huge, 2 * huge, huge).unwrap();
    for (offset, len) in [(huge, huge + 0x1000), (0x1000, huge)] {
        let why = check_length(4 * huge, offset, len, huge).unwrap_err();
        assert!(why.ends_with("page size, 0x200000"), "{why}");
    }
}

#[test]
fn what_is_no_file_is_refused_by_its_kind() {
    let (pipe, _writer) = std::io::pipe().unwrap();
    let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
    let kinds: [(OwnedFd, &str); 6] = [
        (
            File::open("/dev/zero").unwrap().into(),
            "a character device",
        ),
        (File::open("/").unwrap().into(), "a directory"),
        (pipe.into(), "a pipe"),
        (socket.into(), "a socket"),
        (
            eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            "no file but a kernel object",
        ),
        (File::open("/proc/version").unwrap().into(), "lies on proc"),
    ];
    for (file, kind) in kinds {
        let why = refusal(&file, 0, 0x1000);
        assert!(why.contains(kind), "{why}");
    }
}

#[test]
fn a_file_that_cannot_be_written_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(0x1000).unwrap();
    let read_only = File::open(file.path()).unwrap();
    assert!(refusal(&read_only, 0, 0x1000).contains("O_RDWR"));
}

#[test]
fn the_descriptors_of_the_process_are_shared_evenly_among_the_frontends_regions() {
    assert_eq!(region_limit(1024, 1), 509);
    assert_eq!(region_limit(1024, 2), 448);
    assert_eq!(region_limit(1 << 20, 2), 509);
    assert_eq!(region_limit(64, 2), 1);
    assert_eq!(region_limit(1024, 0), 509);
}
