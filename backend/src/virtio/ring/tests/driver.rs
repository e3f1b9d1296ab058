//! A driver of a split ring, as plain as can be, and the device beside it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::VringT;
use vm_memory::mmap::NewBitmap;
use vm_memory::{Bytes, GuestAddressSpace};

use super::super::*;
use crate::vhost_user::{ServedRing, Vring};
use crate::virtio::Memory;
use crate::virtio::chain::ChainLimits;

pub(super) const TABLE: u64 = 0x1_0000;
pub(super) const AVAIL: u64 = 0x2_0000;
pub(super) const USED: u64 = 0x3_0000;
/// Where buffers may be, in two regions.
pub(super) const BUFFERS: u64 = 0x4_0000;
/// In the midst of a buffer.
const BORDER: u64 = BUFFERS + 0x1420;
pub(super) const END: u64 = 0x10_0000;

/// The ring as the driver finds it in its memory.
#[derive(Clone)]
pub(super) struct Shared<B: Bitmap + 'static> {
    pub(super) memory: Memory<B>,
    size: u16,
}

impl<B: Bitmap + 'static> Shared<B> {
    pub(super) fn load(&self, at: u64) -> u16 {
        let mem = self.memory.memory();
        let value: u16 = mem.load(GuestAddress(at), Ordering::Acquire).unwrap();
        u16::from_le(value)
    }

    pub(super) fn store(&self, at: u64, value: u16) {
        let mem = self.memory.memory();
        mem.store(value.to_le(), GuestAddress(at), Ordering::Release)
            .unwrap();
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mem = self.memory.memory();
        mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        let mem = self.memory.memory();
        mem.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Where the device says when it wants to be kicked, with EVENT_IDX.
    pub(super) fn avail_event_at(&self) -> u64 {
        USED + 4 + 8 * u64::from(self.size)
    }

    pub(super) fn avail_event(&self) -> u16 {
        self.load(self.avail_event_at())
    }

    pub(super) fn used_flags(&self) -> u16 {
        self.load(USED)
    }

    pub(super) fn used_idx(&self) -> u16 {
        self.load(USED + 2)
    }

    /// Says when the driver wants to be called, with EVENT_IDX.
    pub(super) fn set_used_event(&self, index: u16) {
        self.store(AVAIL + 4 + 2 * u64::from(self.size), index);
    }

    /// Whether it wants to be called at all, without.
    pub(super) fn set_avail_flags(&self, flags: u16) {
        self.store(AVAIL, flags);
    }

    pub(super) fn set_avail_idx(&self, index: u16) {
        self.store(AVAIL + 2, index);
    }

    /// Makes these heads available from an index on.
    pub(super) fn offer_from(&self, index: u16, heads: &[u16]) -> u16 {
        let mut next = index;
        for head in heads {
            self.store(AVAIL + 4 + 2 * u64::from(next % self.size), *head);
            next = next.wrapping_add(1);
        }
        self.set_avail_idx(next);
        next
    }

    /// Writes a descriptor of the table.
    pub(super) fn describe(&self, index: u16, descriptor: [u8; 16]) {
        self.write(TABLE + 16 * u64::from(index), &descriptor);
    }
}

pub(super) fn descriptor(address: u64, len: usize, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&(len as u32).to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// The driver's side.
pub(super) struct Driver<B: Bitmap + 'static> {
    pub(super) shared: Shared<B>,
    pub(super) call: OwnedFd,
    pub(super) next_avail: u16,
    next_used: u16,
}

impl<B: Bitmap + 'static> Driver<B> {
    pub(super) fn offer(&mut self, heads: &[u16]) {
        self.next_avail = self.shared.offer_from(self.next_avail, heads);
    }

    /// The heads that came back since this was last asked, with what was written of each.
    pub(super) fn used(&mut self) -> Vec<(u32, u32)> {
        let shared = &self.shared;
        let mut all = Vec::new();
        while self.next_used != shared.used_idx() {
            let entry = USED + 4 + 8 * u64::from(self.next_used % shared.size);
            let bytes = shared.read(entry, 8);
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            all.push((word(0), word(4)));
            self.next_used = self.next_used.wrapping_add(1);
        }
        all
    }

    /// How often it was called since this was last asked.
    pub(super) fn calls(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.call, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }
}

/// The device's side.
pub(super) struct Device<B: Bitmap + 'static> {
    pub(super) vring: Vring<B>,
    memory: Memory<B>,
    pub(super) scratch: RingScratch,
    pub(super) chain: ChainBuffer,
}

impl<B: Bitmap + 'static> Device<B> {
    /// Serves the ring for a while; `None` where it is not to be served.
    pub(super) fn serve<T>(
        &mut self,
        action: impl FnOnce(&mut ServedRing<'_, B>, &mut ChainBuffer) -> T,
    ) -> Option<T> {
        let mem = self.memory.memory();
        self.scratch.begin_batch();
        let mut ring = self.vring.usable(1, &mem, &mut self.scratch)?;
        let result = action(&mut ring, &mut self.chain);
        drop(ring);
        self.notify();
        Some(result)
    }

    /// Notifies the driver where it wants that, as a session does when nothing is locked.
    pub(super) fn notify(&mut self) {
        match self.scratch.take_notifications() {
            0 => {}
            queues => {
                assert_eq!(queues, 1 << 1);
                self.vring.notification_is_due();
                self.vring.notify().unwrap();
            }
        }
    }

    /// Takes all that is there, gives it back, each with its place in the order as length, and
    /// returns it.
    pub(super) fn serve_all(&mut self, idle: WhenIdle) -> Vec<u16> {
        self.serve(|ring, chain| {
            ring.when_idle(idle);
            let mut heads = Vec::new();
            while let Some(head) = ring.next_chain(chain) {
                ring.give_back(head, heads.len() as u32);
                heads.push(head);
            }
            heads
        })
        .unwrap_or_default()
    }

    pub(super) fn is_started(&self) -> bool {
        self.vring.get_ref().get_queue().ready()
    }

    /// Where the crate takes the ring to be: the next available index and the next used one.
    pub(super) fn indices(&self) -> (u16, u16) {
        let state = self.vring.get_ref();
        let queue = state.get_queue();
        (queue.next_avail(), queue.next_used())
    }
}

/// A driver, and a device that has started its ring of so many descriptors at this index. Every
/// descriptor is a chain of its own: a byte to be read.
pub(super) fn pair<B>(size: u16, event_idx: bool, start: u16) -> (Driver<B>, Device<B>)
where
    B: NewBitmap + 'static,
{
    let border = BORDER as usize;
    let ranges = [
        (GuestAddress(0), border),
        (GuestAddress(BORDER), END as usize - border),
    ];
    let memory = Memory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let shared = Shared {
        memory: memory.clone(),
        size,
    };
    for index in 0..size {
        shared.describe(index, descriptor(BUFFERS, 1, 0, 0));
    }
    shared.set_avail_idx(start);
    shared.store(USED + 2, start);
    shared.set_used_event(start);

    let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let vring = Vring::new(memory.clone(), 1024).unwrap();
    vring.set_queue_size(size);
    vring.set_queue_info(TABLE, AVAIL, USED).unwrap();
    vring.set_queue_next_avail(start);
    vring.set_queue_next_used(start);
    vring.set_queue_event_idx(event_idx);
    vring.set_call(Some(File::from(call.try_clone().unwrap())));
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    let driver = Driver {
        shared,
        call,
        next_avail: start,
        next_used: start,
    };
    let device = Device {
        vring,
        memory,
        scratch: RingScratch::new(1024),
        chain: ChainBuffer::new(1024, ChainLimits::Message),
    };
    (driver, device)
}
