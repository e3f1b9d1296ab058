//! A descriptor chain as bytes: gathered from whatever descriptors it is made of, and scattered
//! into them.

use vhost_user_timer_protocol::MAX_MESSAGE;
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use vm_memory::GuestAddress;
use vm_memory::bitmap::Bitmap;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::virtio::MemoryLost;
use crate::virtio::region_cache::RegionCache;

pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// `struct virtq_desc` (virtio 1.2 §2.7.5).
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Descriptor {
    addr: U64,
    len: U32,
    flags: U16,
    next: U16,
}

/// Bytes of a descriptor.
const DESCRIPTOR: usize = size_of::<Descriptor>();

impl Descriptor {
    fn address(&self) -> GuestAddress {
        GuestAddress(self.addr.get())
    }

    fn is(&self, flag: u16) -> bool {
        self.flags.get() & flag != 0
    }
}

/// The descriptors of one chain, one after the other. An invalid descriptor ends the chain: an
/// index outside its table, more descriptors than the table has, more bytes than 2^32 (virtio 1.2
/// §2.7.5), an indirect table in an indirect table.
pub(crate) struct Chain {
    table: GuestAddress,
    /// Descriptors in the table.
    size: u16,
    /// How many may follow.
    left: u16,
    next: u16,
    bytes: u32,
    indirect: bool,
}

impl Chain {
    /// The chain that begins with descriptor `head` of a table.
    pub(crate) fn new(table: GuestAddress, size: u16, head: u16) -> Self {
        Chain {
            table,
            size,
            left: size,
            next: head,
            bytes: 0,
            indirect: false,
        }
    }

    fn next<B: Bitmap + 'static>(
        &mut self,
        regions: &mut RegionCache<'_, B>,
    ) -> Option<Descriptor> {
        loop {
            if self.left == 0 || self.next >= self.size {
                return None;
            }
            let offset = DESCRIPTOR as u64 * u64::from(self.next);
            let at = GuestAddress(self.table.0.checked_add(offset)?);
            let mut descriptor = Descriptor::default();
            if !regions.read(at, descriptor.as_mut_bytes()) {
                return None;
            }
            if descriptor.is(INDIRECT) {
                self.enter(&descriptor)?;
                continue;
            }
            self.bytes = self.bytes.checked_add(descriptor.len.get())?;
            if descriptor.is(NEXT) {
                self.next = descriptor.next.get();
                self.left -= 1;
            } else {
                self.left = 0;
            }
            return Some(descriptor);
        }
    }

    /// Continues in an indirect table.
    fn enter(&mut self, table: &Descriptor) -> Option<()> {
        const LEN: u32 = DESCRIPTOR as u32;
        let len = table.len.get();
        if self.indirect || !len.is_multiple_of(LEN) {
            return None;
        }
        let size = u16::try_from(len / LEN).ok()?;
        *self = Chain {
            bytes: self.bytes,
            indirect: true,
            ..Chain::new(table.address(), size, 0)
        };
        Some(())
    }
}

/// Device-writable memory of one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    address: GuestAddress,
    len: usize,
}

/// How much of a chain's bytes a device uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChainLimits {
    /// [`MAX_MESSAGE`] of either side. A longer request is malformed; more room is ignored.
    Message,
    /// The first bytes of either side. What follows them is ignored, even its address.
    First {
        /// Of the longest request.
        request: usize,
        /// Of the longest response.
        response: usize,
    },
}

impl ChainLimits {
    fn request(self) -> usize {
        match self {
            ChainLimits::Message => MAX_MESSAGE,
            ChainLimits::First { request, .. } => request,
        }
    }

    fn response(self) -> usize {
        match self {
            ChainLimits::Message => MAX_MESSAGE,
            ChainLimits::First { response, .. } => response,
        }
    }
}

/// The chain that was taken last: its request, and where its answer goes. Reused from chain to
/// chain.
#[derive(Debug)]
pub(crate) struct ChainBuffer {
    limits: ChainLimits,
    lost: Option<MemoryLost>,
    request: Vec<u8>,
    writable: Vec<Segment>,
    room: usize,
    /// How many descriptors the chain has.
    descriptors: usize,
    /// How many chains were gathered.
    count: u64,
    /// How many of them had too little room.
    complaints: u64,
}

impl ChainBuffer {
    /// For chains of rings with up to this many descriptors: nothing is allocated for any of them
    /// after this, unless an indirect table has more descriptors than the ring.
    pub(crate) fn new(max_queue_size: u16, limits: ChainLimits) -> Self {
        ChainBuffer {
            limits,
            lost: None,
            // Not resident before it is used.
            request: Vec::with_capacity(limits.request()),
            writable: Vec::with_capacity(max_queue_size.into()),
            room: 0,
            descriptors: 0,
            count: 0,
            complaints: 0,
        }
    }

    /// Of memory that can be lost.
    pub(crate) fn of_memory(self, lost: MemoryLost) -> Self {
        let lost = Some(lost);
        ChainBuffer { lost, ..self }
    }

    /// Whether what was gathered last may not be what the driver wrote.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.is_some_and(MemoryLost::is_set)
    }

    /// Copies the readable bytes out and notes where the writable ones are.
    ///
    /// A request that cannot be read, or is longer than any request, counts as empty, which is
    /// malformed. Room that cannot be written counts as none. Where excess is
    /// [ignored](ChainLimits::First), a request or its room ends where its memory does.
    pub(crate) fn gather<B: Bitmap + 'static>(
        &mut self,
        regions: &mut RegionCache<'_, B>,
        mut chain: Chain,
    ) {
        self.request.clear();
        self.writable.clear();
        self.room = 0;
        self.descriptors = 0;
        self.count += 1;
        let whole = self.limits == ChainLimits::Message;
        let mut readable = true;
        let mut writable = true;
        while let Some(descriptor) = chain.next(regions) {
            self.descriptors += 1;
            let (address, len) = (descriptor.address(), descriptor.len.get() as usize);
            if descriptor.is(WRITE) {
                let used = len.min(self.limits.response() - self.room);
                let checked = if whole { len } else { used };
                writable = writable && regions.has(address, checked);
                if writable && used != 0 {
                    self.writable.push(Segment { address, len: used });
                    self.room += used;
                }
            } else {
                readable = readable && self.read(regions, address, len);
            }
        }
        // Where excess is ignored, a hole may be excess: what precedes the hole counts.
        if whole && !readable {
            self.request.clear();
        }
        if whole && !writable {
            self.writable.clear();
            self.room = 0;
        }
    }

    fn read<B: Bitmap + 'static>(
        &mut self,
        regions: &mut RegionCache<'_, B>,
        address: GuestAddress,
        len: usize,
    ) -> bool {
        let start = self.request.len();
        let free = self.limits.request() - start;
        if len > free && self.limits == ChainLimits::Message {
            return false;
        }
        self.request.resize(start + len.min(free), 0);
        let target = self.request.get_mut(start..).unwrap_or_default();
        let was_read = regions.read(address, target);
        if !was_read {
            self.request.truncate(start);
        }
        was_read
    }

    /// The request's bytes; empty where they could not be read.
    pub(crate) fn request(&self) -> &[u8] {
        &self.request
    }

    /// How many bytes an answer may have.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// How many descriptors the chain has, those without any bytes included.
    pub(crate) fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// How many chains were gathered so far.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Whether an answer may have `needed` bytes. Logs the first, second, fourth, eighth … chain
    /// with less.
    pub(crate) fn has_room(&mut self, queue: u16, needed: usize) -> bool {
        if self.room >= needed {
            return true;
        }
        self.complaints = self.complaints.saturating_add(1);
        if self.complaints.is_power_of_two() {
            log::warn!(
                "A chain on queue {queue} has {} writable bytes and needs {needed}: given back \
                 unchanged (such chains so far: {})",
                self.room,
                self.complaints
            );
        }
        false
    }

    /// Where an answer goes.
    pub(crate) fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Where an answer of this length goes, to be kept.
    pub(crate) fn writable_for(&self, len: usize) -> Vec<Segment> {
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

/// Writes `bytes` over the segments. Returns how many count: all, or 0 where the memory is gone or
/// too small.
pub(crate) fn scatter<B: Bitmap + 'static>(
    regions: &mut RegionCache<'_, B>,
    segments: &[Segment],
    bytes: &[u8],
) -> u32 {
    let mut rest = bytes;
    for segment in segments {
        let (now, later) = rest.split_at(segment.len.min(rest.len()));
        if !regions.write(segment.address, now) {
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
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestMemoryMmap};

    /// Gathers a chain of (address, length, flags) descriptors.
    fn gathered(mem: &GuestMemoryMmap, descriptors: &[(u64, u32, u16)]) -> ChainBuffer {
        gathered_of(ChainLimits::Message, mem, descriptors)
    }

    fn gathered_of(
        limits: ChainLimits,
        mem: &GuestMemoryMmap,
        descriptors: &[(u64, u32, u16)],
    ) -> ChainBuffer {
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
        let queue: Queue = ring.create_queue().unwrap();
        let chain = Chain::new(GuestAddress(queue.desc_table()), 64, 0);
        let mut gathered = ChainBuffer::new(64, limits);
        gathered.gather(&mut RegionCache::new(mem), chain);
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
        assert_eq!(
            scatter(&mut RegionCache::new(&mem), chain.writable(), b"12345"),
            5
        );
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
        assert_eq!(scatter(&mut RegionCache::new(&mem), &kept, &[1; 15]), 15);
        assert_eq!(scatter(&mut RegionCache::new(&mem), &kept, &[1; 16]), 0);
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

    #[test]
    fn what_is_past_a_limit_is_ignored_where_the_device_says_so() {
        let mem = memory();
        mem.write_slice(b"abcdef", GuestAddress(0x10000)).unwrap();
        let limits = ChainLimits::First {
            request: 5,
            response: 16,
        };
        let most = MAX_MESSAGE as u32;
        let nowhere = u64::MAX - 2;
        for (readable, writable) in [
            (&[(0x10000, 6)][..], &[(0x13000, 16)][..]),
            (&[(0x10000, 5), (0x10000, most)], &[(0x13000, most + 1)]),
            (&[(0x10000, 3), (0x10003, most + 1)], &[(0x1f_fff0, 17)]),
            (
                &[(0x10000, 5), (nowhere, 1 << 30)],
                &[(0x13000, 16), (nowhere, 99)],
            ),
        ] {
            let readable = readable.iter().map(|&(at, len)| (at, len, 0));
            let writable = writable.iter().map(|&(at, len)| (at, len, WRITE));
            let chain: Vec<_> = readable.chain(writable).collect();
            let chain = gathered_of(limits, &mem, &chain);
            assert_eq!((chain.request(), chain.room()), (&b"abcde"[..], 16));
            assert_eq!(chain.request.capacity(), 5);
        }
        let short = [
            (0x10000, 4, 0),
            (nowhere, 1, 0),
            (0x13000, 15, WRITE),
            (nowhere, 1, WRITE),
        ];
        let chain = gathered_of(limits, &mem, &short);
        assert_eq!((chain.request(), chain.room()), (&b"abcd"[..], 15));
    }
}
