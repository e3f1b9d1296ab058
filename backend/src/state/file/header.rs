//! The head of a state file: whose it is, by what its VM counts, and how much of the file counts.
//!
//! One checksum covers the whole header but for the commit, which has check bits of its own,
//! because it changes with every change of the VM.

use std::mem::offset_of;

use vhost_user_timer_counter::CounterId;
use vhost_user_timer_protocol::MAX_VCPUS;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::state::file::layout::{HEADER, file_len, vcpus_in};

/// The first bytes of every state file.
pub(super) const MAGIC: [u8; 8] = *b"vutstate";
/// The oldest version that is read.
pub const FIRST_VERSION: u32 = 2;
/// The version that is written.
pub const NEWEST_VERSION: u32 = 4;

/// Where the version is: a `u32` in the host's byte order, as all numbers here.
pub(super) const VERSION_AT: usize = offset_of!(Header, version);
/// Bytes of the header that versions 2 and 3 have; the commit follows, then zeros.
const OLD_HEADER: usize = offset_of!(Header, old_commit);
/// Where the commit is: a [`commit_word`].
pub(super) const COMMIT_AT: usize = offset_of!(Header, commit);
/// Where the room and the checksum are, which are stored as one: a [`Header::seal`].
pub(super) const SEAL_AT: usize = offset_of!(Header, vcpus);
/// What version 4 has more than the ones before, where those have zeros.
pub(super) const ADDED: std::ops::Range<usize> = COMMIT_AT..HEADER;

#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    /// What the host counter is derived from, and at what rate, Hz.
    source: u32,
    source_frequency: u64,
    pub(super) boot_id: [u8; 36],
    /// Of the source and its rate: all that versions 2 and 3 check.
    counter_crc: u32,
    /// The commit of versions 2 and 3. In a converted file it stays what it was.
    pub(super) old_commit: u64,
    commit: u64,
    /// For how many vCPUs there are slots; 0 while the file is being made.
    pub(super) vcpus: u32,
    /// Of the header, with zeros for the commit and for this.
    crc: u32,
    /// Zeros. The checksum covers them, so a later version can use them.
    reserved: [u8; 40],
}

const _: () = assert!(size_of::<Header>() == HEADER && SEAL_AT.is_multiple_of(8));

impl Header {
    /// The header of a file that is being made.
    pub(super) fn new(counter: CounterId, boot_id: [u8; 36]) -> Self {
        let header = Header {
            magic: MAGIC,
            version: NEWEST_VERSION,
            source: counter.source,
            source_frequency: counter.frequency,
            boot_id,
            counter_crc: 0,
            old_commit: 0,
            commit: 0,
            vcpus: 0,
            crc: 0,
            reserved: [0; 40],
        };
        Header {
            counter_crc: header.counter_checksum(),
            ..header
        }
        .sealed(0)
    }

    /// This header of version 2 or 3 as one of the newest version.
    pub(super) fn converted(self, vcpus: u32) -> Self {
        Header {
            version: NEWEST_VERSION,
            commit: commit_word(self.old_commit),
            reserved: [0; 40],
            ..self
        }
        .sealed(vcpus)
    }

    /// The same for a file with slots for so many vCPUs.
    pub(super) fn sealed(self, vcpus: u32) -> Self {
        let header = Header { vcpus, ..self };
        Header {
            crc: header.checksum(),
            ..header
        }
    }

    /// The room and the checksum, to be stored as one.
    pub(super) fn seal(&self) -> u64 {
        let mut seal = 0_u64;
        let (vcpus, crc) = seal.as_mut_bytes().split_at_mut(size_of_val(&self.vcpus));
        vcpus.copy_from_slice(self.vcpus.as_bytes());
        crc.copy_from_slice(self.crc.as_bytes());
        seal
    }

    fn checksum(&self) -> u32 {
        let covered = Header {
            commit: 0,
            crc: 0,
            ..*self
        };
        crc32fast::hash(covered.as_bytes())
    }

    fn counter_checksum(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.source_frequency.to_le_bytes());
        hasher.update(self.source.as_bytes());
        hasher.finalize()
    }

    pub(super) fn counter(&self) -> CounterId {
        CounterId {
            source: self.source,
            frequency: self.source_frequency,
        }
    }

    /// The generation of the last change; `None` if the check bits are wrong.
    pub(super) fn commit(&self) -> Option<u64> {
        if self.version < NEWEST_VERSION {
            // Older versions have no check bits, and a file that made this many changes does not
            // exist.
            return (self.old_commit <= MAX_GENERATION).then_some(self.old_commit);
        }
        let generation = self.commit & MAX_GENERATION;
        (commit_word(generation) == self.commit).then_some(generation)
    }
}

/// The largest generation: 450 years at 5 million changes a second.
pub(super) const MAX_GENERATION: u64 = u64::MAX >> 8;

/// A generation, and in its top byte the exclusive or of the seven others: one store is a commit,
/// and one flipped bit in it is found.
pub(super) fn commit_word(generation: u64) -> u64 {
    let folded = generation ^ generation >> 32;
    let folded = folded ^ folded >> 16;
    let check = (folded ^ folded >> 8) & 0xff;
    generation & MAX_GENERATION | check << 56
}

/// What the first bytes of a file are.
pub(super) enum Head {
    /// Nothing: there is no file yet, or only an empty one.
    Empty,
    /// What a process left that was killed while it made the file.
    Unfinished,
    /// The header of a state file that is whole, with slots for so many vCPUs.
    Whole(Header, u32),
    /// The header of a state file that this program does not read.
    OtherVersion(u32),
    /// A state file's, in which this is wrong.
    Damaged(&'static str),
    /// Something else's.
    Foreign,
}

impl Head {
    /// What these bytes are in a file of `len` bytes: the first 128, or zeros where the file is
    /// shorter.
    pub(super) fn of(bytes: [u8; HEADER], len: u64) -> Self {
        if len == 0 {
            return Head::Empty;
        }
        let header: Header = zerocopy::transmute!(bytes);
        if header.magic != MAGIC {
            return Head::Foreign;
        }
        match header.version {
            FIRST_VERSION..NEWEST_VERSION => header.of_an_older_version(len),
            _ if len < HEADER as u64 => Head::Damaged("it is cut off"),
            // The version before there were checksums.
            1 => Head::OtherVersion(1),
            _ if header.crc != header.checksum() => {
                Head::Damaged("its header has a wrong checksum")
            }
            NEWEST_VERSION if header.vcpus == 0 => Head::Unfinished,
            NEWEST_VERSION if header.vcpus > MAX_VCPUS => {
                Head::Damaged("its header has no valid number of vCPUs")
            }
            NEWEST_VERSION if len < file_len(header.vcpus) as u64 => Head::Damaged("it is cut off"),
            NEWEST_VERSION => Head::Whole(header, header.vcpus),
            version => Head::OtherVersion(version),
        }
    }
}

impl Header {
    fn of_an_older_version(self, len: u64) -> Head {
        if self.counter_crc != self.counter_checksum() {
            Head::Damaged("its counter has a wrong checksum")
        } else if len < file_len(0) as u64 {
            Head::Damaged("it is cut off")
        } else {
            Head::Whole(self, vcpus_in(len))
        }
    }
}

/// Whether a file of this length may be what [`is_an_older_beginning`] finds.
pub(super) fn may_be_an_older_beginning(len: u64) -> bool {
    let vcpus = vcpus_in(len);
    vcpus > 0 && len == file_len(vcpus) as u64
}

/// Whether this whole file is what a program of an earlier version left that was killed while it
/// made the file: zeros, or zeros and a header that lacks nothing but its magic.
pub(super) fn is_an_older_beginning(file: &[u8]) -> bool {
    let Some((head, slots)) = file.split_first_chunk::<HEADER>() else {
        return false;
    };
    let mut header: Header = zerocopy::transmute!(*head);
    let no_magic = header.magic == [0; MAGIC.len()];
    header.magic = MAGIC;
    let [fixed, added] = [0..OLD_HEADER, OLD_HEADER..HEADER].map(|part| &head[part]);
    let zeros = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    let begun = header.version == FIRST_VERSION && header.counter_crc == header.counter_checksum();
    may_be_an_older_beginning(file.len() as u64)
        && no_magic
        && (begun || zeros(fixed))
        && zeros(added)
        && zeros(slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_says_its_generation_and_no_flipped_bit_makes_another_of_it() {
        let mut generations = vec![0, 1, 2, 0x1_0000, 0xdead_beef_cafe, MAX_GENERATION];
        generations.extend((0..56).map(|bit| 1 << bit));
        for generation in generations {
            let counter = CounterId {
                source: 1,
                frequency: 1,
            };
            let mut header = Header::new(counter, [0; 36]);
            header.commit = commit_word(generation);
            assert_eq!(header.commit(), Some(generation));
            for bit in 0..64 {
                let flipped = Header {
                    commit: header.commit ^ 1 << bit,
                    ..header
                };
                assert_eq!(flipped.commit(), None, "{generation:x}, bit {bit}");
            }
        }
    }
}
