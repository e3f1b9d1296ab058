//! Whether a file's pages come from this host's kernel alone.
//!
//! A page fault waits for the file system. One whose files come from another process or host (FUSE,
//! NFS and others) lets that peer block a thread of ours in a fault that no signal ends.

use rustix::fs::{Statx, StatxFlags};

/// File systems whose pages the kernel of this host fills by itself, as /proc/self/mountinfo calls
/// them. On overlayfs, a file that can be written lies in the upper layer. Since Linux 5.8 that may
/// be on FUSE, but only root can mount such a one where this process sees it.
const LOCAL_FILE_SYSTEMS: [&str; 19] = [
    "bcachefs",
    "btrfs",
    "devtmpfs",
    "exfat",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "hugetlbfs",
    "jfs",
    "nilfs2",
    "ntfs3",
    "overlay",
    "ramfs",
    "rootfs",
    "tmpfs",
    "vfat",
    "xfs",
    "zfs",
];

/// A file's file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FileSystem {
    /// The kernel of this host fills its pages by itself.
    Local,
    /// It may wait for another process or host. Its type, as mount(8) names it.
    Far(String),
    /// It is not mounted where this process sees it.
    Unknown,
}

impl FileSystem {
    /// Of the file that was examined, with [`StatxFlags::MNT_ID`] asked for. Asks no file system.
    pub(crate) fn of(stat: &Statx) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self::by(&mounts, &Mount::of(stat))
    }

    /// The same by the text of /proc/self/mountinfo.
    fn by(mounts: &str, of: &Mount) -> Self {
        match kind_of(mounts, of) {
            None => FileSystem::Unknown,
            Some(kind) if LOCAL_FILE_SYSTEMS.contains(&kind) => FileSystem::Local,
            Some(kind) => FileSystem::Far(kind.to_owned()),
        }
    }
}

/// Where a file is mounted.
#[derive(Debug)]
struct Mount {
    /// `None` before Linux 5.8.
    id: Option<u64>,
    device: (u32, u32),
}

impl Mount {
    fn of(stat: &Statx) -> Self {
        let known = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::MNT_ID);
        Mount {
            id: known.then_some(stat.stx_mnt_id),
            device: (stat.stx_dev_major, stat.stx_dev_minor),
        }
    }
}

/// The file system's type: by the mount, or by the device where the mount is in another mount
/// namespace and the same file system is mounted in this one.
fn kind_of<'a>(mounts: &'a str, of: &Mount) -> Option<&'a str> {
    // proc_pid_mountinfo(5): ID, parent, device, …, "-", type, source, options.
    let mut same_device = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let id = fields.next()?.parse::<u64>().ok();
        let device = fields.nth(1).and_then(|device| {
            let (major, minor) = device.split_once(':')?;
            Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
        });
        let kind = fields.skip_while(|field| *field != "-").nth(1);
        if id.is_some() && id == of.id {
            return kind;
        }
        if device == Some(of.device) {
            same_device = kind;
        }
    }
    same_device
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn file_systems_of_this_host_are_local_and_others_have_a_name() {
        for id in [22, 34, 35] {
            let local = FileSystem::by(MOUNTS, &mount(Some(id), (0, 0)));
            assert_eq!(local, FileSystem::Local);
        }
        for (id, name) in [
            (31, "nfs4"),
            (32, "fuse.sshfs"),
            (33, "fuseblk"),
            (36, "virtiofs"),
        ] {
            let far = FileSystem::by(MOUNTS, &mount(Some(id), (253, 0)));
            assert_eq!(far, FileSystem::Far(name.to_owned()));
        }
    }

    #[test]
    fn a_mount_of_another_namespace_is_told_by_its_device_and_unknown_where_that_is_too() {
        for id in [Some(900), None] {
            let local = FileSystem::by(MOUNTS, &mount(id, (253, 0)));
            assert_eq!(local, FileSystem::Local);
        }
        let far = FileSystem::by(MOUNTS, &mount(Some(900), (0, 45)));
        assert_eq!(far, FileSystem::Far("nfs4".to_owned()));
        for unknown in [
            FileSystem::by(MOUNTS, &mount(Some(900), (0, 99))),
            FileSystem::by("", &mount(Some(22), (253, 0))),
            FileSystem::by("22\n22 1\n22 1 x:y", &mount(None, (253, 0))),
        ] {
            assert_eq!(unknown, FileSystem::Unknown);
        }
    }
}
