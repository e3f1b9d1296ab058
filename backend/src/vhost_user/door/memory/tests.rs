use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

/// Lines as proc_pid_mountinfo(5) has them, with and without optional fields.
const MOUNTS: &str = "\
22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 22 0:45 / /mnt/far rw,nosuid shared:7 master:2 - nfs4 host:/x rw,addr=::1
32 22 0:46 / /mnt/a\\040b rw - fuse.sshfs user@host:/ rw,user_id=0
33 22 8:17 / /mnt/ntfs rw - fuseblk /dev/sdb1 rw
34 22 0:52 /sub /mnt/sub rw - btrfs /dev/sdc rw
35 22 0:60 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/u
36 22 0:61 / /mnt/host rw - virtiofs host rw
";

fn mount(id: Option<u64>, device: (u32, u32)) -> Mount {
    Mount { id, device }
}

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
fn file_systems_of_this_host_are_accepted_and_others_are_refused_by_name() {
    for id in [22, 34, 35] {
        check_file_system(MOUNTS, &mount(Some(id), (0, 0))).unwrap();
    }
    for (id, name) in [
        (31, "nfs4"),
        (32, "fuse.sshfs"),
        (33, "fuseblk"),
        (36, "virtiofs"),
    ] {
        let why = check_file_system(MOUNTS, &mount(Some(id), (253, 0))).unwrap_err();
        assert!(why.starts_with(&format!("lies on {name}, ")), "{why}");
    }
}

#[test]
fn a_mount_of_another_namespace_is_told_by_its_device_and_refused_where_that_is_unknown() {
    check_file_system(MOUNTS, &mount(Some(900), (253, 0))).unwrap();
    check_file_system(MOUNTS, &mount(None, (253, 0))).unwrap();
    let far = check_file_system(MOUNTS, &mount(Some(900), (0, 45))).unwrap_err();
    assert!(far.contains("nfs4"), "{far}");
    for unknown in [
        check_file_system(MOUNTS, &mount(Some(900), (0, 99))),
        check_file_system("", &mount(Some(22), (253, 0))),
        check_file_system("22\n22 1\n22 1 x:y", &mount(None, (253, 0))),
    ] {
        assert!(unknown.unwrap_err().contains("not mounted"));
    }
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
        (
            File::open("/proc/self/maps").unwrap().into(),
            "lies on proc",
        ),
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
