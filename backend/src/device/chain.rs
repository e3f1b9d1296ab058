//! A descriptor chain as bytes: gathered from whatever descriptors it is made of, and
//! scattered into them.

use vhost_user_timer_protocol::MAX_MESSAGE;
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Device-writable memory of one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    address: GuestAddress,
    len: usize,
}

/// One request as it was found in the ring. Reused from request to request.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    request: Vec<u8>,
    writable: Vec<Segment>,
    room: usize,
    /// How many chains were gathered.
    count: u64,
    /// How many of them had too little room.
    complaints: u64,
}

impl Gathered {
    /// Copies the readable bytes out and notes where the writable ones are.
    ///
    /// What cannot be read, or is longer than any request, is taken as no bytes at all, which
    /// no request is. What cannot be written is taken as no room.
    pub(super) fn gather<B: Bitmap + 'static>(
        &mut self,
        mem: &GuestMemoryMmap<B>,
        chain: DescriptorChain<&GuestMemoryMmap<B>>,
    ) {
        self.request.clear();
        self.writable.clear();
        self.room = 0;
        self.count += 1;
        let mut readable = true;
        let mut writable = true;
        for descriptor in chain {
            let (address, len) = (descriptor.addr(), descriptor.len() as usize);
            if descriptor.is_write_only() {
                writable &= mem.check_range(address, len);
                let len = len.min(MAX_MESSAGE - self.room);
                if len != 0 {
                    self.writable.push(Segment { address, len });
                    self.room += len;
                }
            } else {
                readable = readable && self.read(mem, address, len);
            }
        }
        if !readable {
            self.request.clear();
        }
        if !writable {
            self.writable.clear();
            self.room = 0;
        }
    }

    fn read<B: Bitmap + 'static>(
        &mut self,
        mem: &GuestMemoryMmap<B>,
        address: GuestAddress,
        len: usize,
    ) -> bool {
        let start = self.request.len();
        if len > MAX_MESSAGE - start {
            return false;
        }
        self.request.resize(start + len, 0);
        let target = self.request.get_mut(start..).unwrap_or_default();
        mem.read_slice(target, address).is_ok()
    }

    /// The request's bytes; none where they could not be had.
    pub(super) fn request(&self) -> &[u8] {
        &self.request
    }

    /// How many bytes an answer may have.
    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// How many chains were gathered so far.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether an answer may have `needed` bytes. Logs the first, second, fourth, eighth … chain
    /// that has less.
    pub(super) fn has_room(&mut self, queue: u16, needed: usize) -> bool {
        if self.room >= needed {
            return true;
        }
        self.complaints = self.complaints.saturating_add(1);
        if self.complaints.is_power_of_two() {
            log::warn!(
                "A chain on queue {queue} has {} writable bytes and needs {needed}: it is given \
                 back as it is (such chains so far: {})",
                self.room,
                self.complaints
            );
        }
        false
    }

    /// Where an answer goes.
    pub(super) fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Where an answer of this length goes, to be kept.
    pub(super) fn writable_for(&self, len: usize) -> Vec<Segment> {
        let mut rest = len;
        let mut kept = Vec::new();
        for segment in &self.writable {
            let len = segment.len.min(rest);
            if len == 0 {
                break;
            }
            kept.push(Segment { len, ..*segment });
            rest -= len;
        }
        kept
    }
}

/// Writes `bytes` over the segments. Returns how many were written: all, or, where the memory
/// is gone or too small, none that count.
pub(super) fn scatter<B: Bitmap + 'static>(
    mem: &GuestMemoryMmap<B>,
    segments: &[Segment],
    bytes: &[u8],
) -> u32 {
    let mut rest = bytes;
    for segment in segments {
        let (now, later) = rest.split_at(segment.len.min(rest.len()));
        if mem.write_slice(now, segment.address).is_err() {
            return 0;
        }
        rest = later;
        if rest.is_empty() {
            return bytes.len() as u32;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// Gathers a chain of (address, length, flags) descriptors.
    fn gathered(mem: &GuestMemoryMmap, descriptors: &[(u64, u32, u16)]) -> Gathered {
        let ring = MockSplitQueue::new(mem, 64);
        let raw: Vec<RawDescriptor> = descriptors
            .iter()
            .enumerate()
            .map(|(i, &(address, len, flags))| {
                let next = if i + 1 < descriptors.len() { NEXT } else { 0 };
                RawDescriptor::from(Descriptor::new(address, len, flags | next, i as u16 + 1))
            })
            .collect();
        ring.add_desc_chains(&raw, 0).unwrap();
        let mut queue: Queue = ring.create_queue().unwrap();
        queue.set_ready(true);
        let chain = queue.iter(mem).unwrap().next().unwrap();
        let mut gathered = Gathered::default();
        gathered.gather(mem, chain);
        gathered
    }

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap()
    }

    #[test]
    fn bytes_are_gathered_and_scattered_over_any_boundaries() {
        let mem = memory();
        mem.write_slice(b"abcdef", GuestAddress(0x10000)).unwrap();
        let chain = gathered(
            &mem,
            &[
                (0x10000, 2, 0),
                (0x10002, 0, 0),
                (0x10002, 4, 0),
                (0x11000, 1, WRITE),
                (0x12000, 0, WRITE),
                (0x13000, 7, WRITE),
            ],
        );
        assert_eq!(chain.request(), b"abcdef");
        assert_eq!(chain.room(), 8);
        assert_eq!(scatter(&mem, chain.writable(), b"12345"), 5);
        let mut read = [0; 8];
        mem.read_slice(&mut read[..1], GuestAddress(0x11000))
            .unwrap();
        mem.read_slice(&mut read[1..], GuestAddress(0x13000))
            .unwrap();
        assert_eq!(&read, b"12345\0\0\0");
    }

    #[test]
    fn kept_segments_hold_no_more_than_the_answer() {
        let mem = memory();
        let chain = gathered(
            &mem,
            &[
                (0x10000, 10, WRITE),
                (0x11000, 10, WRITE),
                (0x12000, 9, WRITE),
            ],
        );
        let kept = chain.writable_for(15);
        assert_eq!(kept.iter().map(|s| s.len).collect::<Vec<_>>(), [10, 5]);
        assert_eq!(scatter(&mem, &kept, &[1; 15]), 15);
        assert_eq!(scatter(&mem, &kept, &[1; 16]), 0);
    }

    #[test]
    fn memory_that_is_not_shared_is_neither_read_nor_written() {
        let mem = memory();
        let chain = gathered(
            &mem,
            &[(0x10000, 4, 0), (0x1f_fffe, 4, 0), (0x10000, 16, WRITE)],
        );
        assert_eq!((chain.request(), chain.room()), (&[][..], 16));
        let chain = gathered(&mem, &[(0x10000, 4, 0), (u64::MAX - 2, 16, WRITE)]);
        assert_eq!((chain.request().len(), chain.room()), (4, 0));
    }

    #[test]
    fn more_than_the_longest_request_is_none_and_more_room_is_not_looked_at() {
        let mem = memory();
        let most = MAX_MESSAGE as u32;
        let chain = gathered(&mem, &[(0x10000, most, 0), (0x10000, most + 9, WRITE)]);
        assert_eq!(
            (chain.request().len(), chain.room()),
            (MAX_MESSAGE, MAX_MESSAGE)
        );
        let chain = gathered(
            &mem,
            &[(0x10000, most, 0), (0x10000, 1, 0), (0x10000, 16, WRITE)],
        );
        assert_eq!((chain.request().len(), chain.room()), (0, 16));
    }
}
