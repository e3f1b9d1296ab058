//! The driver's side of a split ring (virtio 1.2 §2.7).

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout::Layout;
use super::memory::{Memory, REGION_GPA, RING_AREA};

/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// The value of device-writable bytes before the device writes them.
pub const POISON: u8 = 0xa5;

/// `struct virtq_desc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Where its bytes are.
    pub address: u64,
    /// How many.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next one's index.
    pub next: u16,
}

/// A descriptor.
pub fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

impl Descriptor {
    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A chain that the device gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its head.
    pub head: u16,
    /// The used length.
    pub len: u32,
    /// All its device-writable bytes, including those past `len`.
    pub writable: Vec<u8>,
}

impl Used {
    /// The bytes that the device says it wrote.
    ///
    /// # Panics
    ///
    /// If the device says that it wrote more than there was room for, or if it wrote past the used
    /// length.
    pub fn bytes(&self) -> &[u8] {
        let (written, rest) = self.writable.split_at(self.len as usize);
        assert!(
            rest.iter().all(|byte| *byte == POISON),
            "bytes past the used length of {} were written",
            self.len
        );
        written
    }
}

impl AsRef<[u8]> for Used {
    /// [`bytes`](Self::bytes).
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

/// A buffer: address and length.
pub type Buffer = (u64, usize);

#[derive(Debug)]
struct Chain {
    descriptors: Vec<u16>,
    buffers: Vec<Buffer>,
    writable: Vec<Buffer>,
}

/// An eventfd's descriptor.
#[expect(unsafe_code, reason = "vmm-sys-util's EventFd does not implement AsFd")]
pub fn fd_of(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the eventfd's, which stays open as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

/// A ring, and the driver's state of it.
#[derive(Debug)]
pub struct Ring {
    base: u64,
    size: u16,
    event_idx: bool,
    kick: EventFd,
    call: EventFd,
    free: Vec<u16>,
    next_avail: u16,
    next_used: u16,
    kicked: u16,
    held: HashMap<u16, Chain>,
}

impl Ring {
    /// A ring with new eventfds, at this queue's place in a [`Memory`].
    ///
    /// # Panics
    ///
    /// If there is no eventfd to be had.
    pub fn new(queue: u16, size: u16, event_idx: bool) -> Self {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("eventfd");
        Ring {
            base: REGION_GPA + u64::from(queue) * RING_AREA,
            size,
            event_idx,
            kick: eventfd(),
            call: eventfd(),
            free: (0..size).rev().collect(),
            next_avail: 0,
            next_used: 0,
            kicked: 0,
            held: HashMap::new(),
        }
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How many descriptors the driver has.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// The kick descriptor.
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// The call descriptor.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// Where the descriptor table is.
    pub fn descriptors_at(&self) -> u64 {
        self.base
    }

    /// Where the available ring is.
    pub fn avail_at(&self) -> u64 {
        self.base + 0x4000
    }

    /// Where the used ring is.
    pub fn used_at(&self) -> u64 {
        self.base + 0x8000
    }

    /// Empties the ring in the memory, as a new driver does.
    pub fn clear(&self, memory: &Memory) {
        memory.write(self.base, &vec![0; RING_AREA as usize]);
    }

    fn load(memory: &Memory, at: u64, order: Ordering) -> u16 {
        let value: u16 = memory
            .map()
            .load(GuestAddress(at), order)
            .expect("a ring in the region");
        u16::from_le(value)
    }

    fn store(memory: &Memory, at: u64, value: u16, order: Ordering) {
        memory
            .map()
            .store(value.to_le(), GuestAddress(at), order)
            .expect("a ring in the region");
    }

    /// The driver's available index.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The device's used index.
    pub fn used_index(&self, memory: &Memory) -> u16 {
        Self::load(memory, self.used_at() + 2, Ordering::Acquire)
    }

    /// Writes a descriptor of the table, unchecked.
    pub fn set_descriptor(&self, memory: &Memory, index: u16, descriptor: Descriptor) {
        let at = self.descriptors_at() + 16 * u64::from(index);
        memory.write(at, &descriptor.to_bytes());
    }

    /// Makes a head available, unchecked.
    pub fn make_available(&mut self, memory: &Memory, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        Self::store(
            memory,
            self.avail_at() + 4 + 2 * slot,
            head,
            Ordering::Relaxed,
        );
        self.set_avail_index(memory, self.next_avail.wrapping_add(1));
    }

    /// Makes a chain available that is one indirect table, unchecked: of any length, with any
    /// flags, in a loop. Its head is 0, and what the device gives back is not to be taken.
    pub fn offer_table(&mut self, memory: &mut Memory, table: &[Descriptor]) {
        let bytes: Vec<u8> = table.iter().flat_map(|one| one.to_bytes()).collect();
        let at = memory.allocate(bytes.len());
        memory.write(at, &bytes);
        let whole = descriptor(at, bytes.len() as u32, INDIRECT, 0);
        self.set_descriptor(memory, 0, whole);
        self.make_available(memory, 0);
    }

    /// Sets the available index, unchecked.
    pub fn set_avail_index(&mut self, memory: &Memory, index: u16) {
        self.next_avail = index;
        Self::store(memory, self.avail_at() + 2, index, Ordering::Release);
    }

    /// Makes a request available. Returns its chain's head.
    ///
    /// # Panics
    ///
    /// If the ring or the memory is full.
    pub fn add(
        &mut self,
        memory: &mut Memory,
        request: &[u8],
        room: usize,
        layout: &Layout,
    ) -> u16 {
        let readable = layout.readable.pieces(request.len());
        let writable = layout.writable.pieces(room);
        let pieces: Vec<(usize, bool)> = (readable.iter().map(|len| (*len, false)))
            .chain(writable.iter().map(|len| (*len, true)))
            .collect();
        let mut places: Vec<(usize, Buffer)> = Vec::new();
        for (index, (len, _)) in pieces.iter().enumerate() {
            places.push((index, (0, *len)));
        }
        if layout.reversed {
            places.reverse();
        }
        for (_, (at, len)) in &mut places {
            *at = memory.allocate(*len);
        }
        places.sort_unstable();
        let mut buffers: Vec<Buffer> = places.into_iter().map(|(_, buffer)| buffer).collect();

        let mut rest = request;
        for ((at, len), (_, write)) in buffers.iter().zip(&pieces) {
            if *write {
                memory.write(*at, &vec![POISON; *len]);
            } else {
                let (now, later) = rest.split_at(*len);
                memory.write(*at, now);
                rest = later;
            }
        }
        let writable: Vec<Buffer> = buffers[readable.len()..].to_vec();

        let in_table = if layout.indirect { 1 } else { pieces.len() };
        assert!(in_table <= self.free.len(), "the ring is full");
        let mut descriptors = self.free.split_off(self.free.len() - in_table);
        descriptors.reverse();
        if layout.reversed {
            descriptors.reverse();
        }
        let indices: Vec<u16> = if layout.indirect {
            (0..pieces.len() as u16).collect()
        } else {
            descriptors.clone()
        };
        let chained: Vec<(u16, Descriptor)> = (0..pieces.len())
            .map(|i| {
                let (address, len) = buffers[i];
                let mut flags = if pieces[i].1 { WRITE } else { 0 };
                let next = indices.get(i + 1).copied();
                flags |= if next.is_some() { NEXT } else { 0 };
                let descriptor = Descriptor {
                    address,
                    len: len as u32,
                    flags,
                    next: next.unwrap_or(0),
                };
                (indices[i], descriptor)
            })
            .collect();
        if layout.indirect {
            let len = 16 * chained.len();
            let table = memory.allocate(len);
            buffers.push((table, len));
            for (index, descriptor) in chained {
                memory.write(table + 16 * u64::from(index), &descriptor.to_bytes());
            }
            let descriptor = Descriptor {
                address: table,
                len: len as u32,
                flags: INDIRECT,
                next: 0,
            };
            self.set_descriptor(memory, descriptors[0], descriptor);
        } else {
            for (index, descriptor) in chained {
                self.set_descriptor(memory, index, descriptor);
            }
        }
        let head = descriptors[0];
        let chain = Chain {
            descriptors,
            buffers,
            writable,
        };
        self.held.insert(head, chain);
        self.make_available(memory, head);
        head
    }

    /// Kicks if the device wants to be told of what was made available.
    ///
    /// # Panics
    ///
    /// If the eventfd is full.
    pub fn kick(&mut self, memory: &Memory) {
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked, self.next_avail);
        let wanted = if self.event_idx {
            let at = self.used_at() + 4 + 8 * u64::from(self.size);
            let event = Self::load(memory, at, Ordering::Relaxed);
            // vring_need_event, virtio 1.2 §2.7.10.
            let new = self.next_avail;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            Self::load(memory, self.used_at(), Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.kick_anyway();
        }
    }

    /// Kicks whether or not the device wants it.
    ///
    /// # Panics
    ///
    /// If the eventfd is full.
    pub fn kick_anyway(&self) {
        self.kick.write(1).expect("a kick");
    }

    /// Takes the next chain that the device gave back.
    ///
    /// # Panics
    ///
    /// If that chain was not made available.
    pub fn take(&mut self, memory: &mut Memory) -> Option<Used> {
        if self.used_index(memory) == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let element = memory.read(self.used_at() + 4 + 8 * slot, 8);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().expect("4"));
        let (head, len) = (word(0) as u16, word(4));
        assert!(word(0) < self.size.into(), "used id {}", word(0));
        self.next_used = self.next_used.wrapping_add(1);
        let chain = self
            .held
            .remove(&head)
            .unwrap_or_else(|| panic!("chain {head} was given back and is not the device's"));
        let mut writable = Vec::new();
        for (at, len) in &chain.writable {
            writable.extend(memory.read(*at, *len));
        }
        assert!(len as usize <= writable.len(), "used length {len}");
        for (at, len) in chain.buffers {
            memory.release(at, len);
        }
        self.free.extend(chain.descriptors);
        Some(Used {
            head,
            len,
            writable,
        })
    }

    /// Addresses and lengths of the device-writable buffers of a chain that the device holds.
    ///
    /// # Panics
    ///
    /// If the device does not hold it.
    pub fn writable(&self, head: u16) -> &[Buffer] {
        &self.held[&head].writable
    }

    /// The device-writable bytes, as they are now, of a chain that the device holds.
    ///
    /// # Panics
    ///
    /// If the device does not hold it.
    pub fn peek(&self, memory: &Memory, head: u16) -> Vec<u8> {
        self.writable(head)
            .iter()
            .flat_map(|(at, len)| memory.read(*at, *len))
            .collect()
    }

    /// Waits, on the call descriptor, for a chain to be given back.
    ///
    /// # Panics
    ///
    /// If polling fails.
    pub fn wait(&mut self, memory: &mut Memory, limit: Duration) -> Option<Used> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(used) = self.take(memory) {
                return Some(used);
            }
            if self.event_idx {
                // used_event, virtio 1.2 §2.7.7: call for the next one.
                let at = self.avail_at() + 4 + 2 * u64::from(self.size);
                Self::store(memory, at, self.next_used, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if let Some(used) = self.take(memory) {
                    return Some(used);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).expect("a short time");
            let mut fds = [PollFd::from_borrowed_fd(fd_of(&self.call), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return None,
                Ok(_) => {
                    let _ = self.call.read();
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("polling the call descriptor failed: {error}"),
            }
        }
    }
}
