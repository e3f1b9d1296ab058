//! The driver against a foreign device side: virtio-queue's `Queue`, over a second mapping of
//! the same memory.

use std::fs::File;
use std::time::Duration;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::*;
use crate::error::RingFault;
use crate::sys::{drain, eventfd, poll, signal};

const SIZE: u16 = 8;

struct Device {
    queue: Queue,
    memory: GuestMemoryMmap,
}

/// A driver and a device that start at `start`. Descriptor n is a buffer of 16 + n bytes.
fn pair(event_idx: bool, start: u16) -> (DriverRing, Device) {
    let mut layout = Layout::default();
    let ring = RingLayout::reserve(&mut layout, SIZE);
    let buffers = layout.reserve(64 * usize::from(SIZE), 64);
    let memory = Arc::new(SharedMemory::new(&layout).unwrap());
    let driver = DriverRing::new(memory.clone(), ring, event_idx, start);
    for n in 0..SIZE {
        let buffer = memory.address(buffers + 64 * usize::from(n));
        let bytes = descriptor(buffer, 16 + u32::from(n), WRITE, 0);
        memory.write(driver.descriptor(n), &bytes);
    }

    let info = memory.region_info();
    let path = format!("/proc/self/fd/{}", info.mmap_handle);
    let file = File::options().read(true).write(true).open(path).unwrap();
    let region =
        MmapRegion::from_file(FileOffset::new(file, 0), info.memory_size as usize).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(info.guest_phys_addr)).unwrap();
    let memory_map = GuestMemoryMmap::from_regions(vec![region]).unwrap();

    let address = |offset| GuestAddress(memory.address(offset));
    let mut queue = Queue::new(SIZE).unwrap();
    queue
        .try_set_desc_table_address(address(ring.descriptors))
        .unwrap();
    queue
        .try_set_avail_ring_address(address(ring.avail))
        .unwrap();
    queue.try_set_used_ring_address(address(ring.used)).unwrap();
    queue.set_event_idx(event_idx);
    queue.set_next_avail(start);
    queue.set_next_used(start);
    queue.set_ready(true);
    assert!(queue.is_valid(&memory_map));
    let device = Device {
        queue,
        memory: memory_map,
    };
    (driver, device)
}

impl Device {
    /// The heads that are available.
    fn take(&mut self) -> Vec<u16> {
        self.queue
            .iter(&self.memory)
            .unwrap()
            .map(|chain| chain.head_index())
            .collect()
    }

    fn give_back(&mut self, head: u16, len: u32) {
        self.queue.add_used(&self.memory, head, len).unwrap();
    }

    /// Whether the driver wants to be called for what was given back.
    fn must_call(&mut self) -> bool {
        self.queue.needs_notification(&self.memory).unwrap()
    }

    fn want_kicks(&mut self, wanted: bool) {
        if wanted {
            self.queue.enable_notification(&self.memory).unwrap();
        } else {
            self.queue.disable_notification(&self.memory).unwrap();
        }
    }
}

fn heads(ring: &mut DriverRing) -> Vec<u16> {
    std::iter::from_fn(|| ring.pop().unwrap())
        .map(|used| used.head)
        .collect()
}

#[test]
fn the_indices_wrap() {
    for event_idx in [false, true] {
        let (mut ring, mut device) = pair(event_idx, 65533);
        for n in 0..40u32 {
            let head = (n % u32::from(SIZE)) as u16;
            device.want_kicks(true);
            ring.push(head, 16);
            assert!(ring.publish(), "kick {n}");
            assert!(!ring.arm());
            assert_eq!(device.take(), [head]);
            device.give_back(head, n % 17);
            assert!(device.must_call(), "call {n}");
            let used = ring.pop().unwrap();
            assert_eq!(used, Some(Used { head, len: n % 17 }));
            assert_eq!(ring.pop().unwrap(), None);
        }
    }
}

#[test]
fn a_batch_is_one_kick_and_a_busy_device_gets_none() {
    for event_idx in [false, true] {
        let (mut ring, mut device) = pair(event_idx, 65530);
        device.want_kicks(true);
        for head in 0..3 {
            ring.push(head, 16);
        }
        assert!(ring.publish());
        assert!(!ring.publish(), "nothing is new");
        assert_eq!(device.take(), [0, 1, 2]);

        device.want_kicks(false);
        ring.push(3, 16);
        assert!(!ring.publish());
        assert_eq!(device.take(), [3]);
    }
}

#[test]
fn nothing_is_available_before_it_is_published() {
    let (mut ring, mut device) = pair(true, 0);
    ring.push(5, 16);
    assert_eq!(ring.unpublished(), 1);
    assert!(device.take().is_empty());
    ring.publish();
    assert_eq!(ring.unpublished(), 0);
    assert_eq!(device.take(), [5]);
}

#[test]
fn the_device_calls_only_an_armed_driver() {
    let (mut ring, mut device) = pair(true, 65534);
    for head in 0..4 {
        ring.push(head, 16);
    }
    ring.publish();
    device.take();
    device.give_back(0, 0);
    // virtio-queue answers the first question with yes whatever used_event says.
    device.must_call();

    device.give_back(1, 0);
    assert!(!device.must_call());
    assert!(ring.arm(), "two are there already");
    assert_eq!(heads(&mut ring), [0, 1]);
    assert!(!ring.arm());
    device.give_back(2, 0);
    assert!(device.must_call());
    assert_eq!(heads(&mut ring), [2]);
    ring.disarm();
    device.give_back(3, 0);
    assert!(!device.must_call());
    assert_eq!(heads(&mut ring), [3]);
}

#[test]
fn without_event_idx_a_flag_says_whether_to_call() {
    // virtio-queue does not look at it.
    let (mut ring, mut device) = pair(false, 0);
    let flags = |ring: &DriverRing| u32::from(ring.load(ring.layout.avail, Ordering::Relaxed));
    assert_eq!(flags(&ring), VRING_AVAIL_F_NO_INTERRUPT);
    assert!(!ring.arm());
    assert_eq!(flags(&ring), 0);
    ring.push(0, 16);
    ring.publish();
    device.take();
    device.give_back(0, 0);
    assert!(ring.arm());
    ring.disarm();
    assert_eq!(flags(&ring), VRING_AVAIL_F_NO_INTERRUPT);
}

#[test]
fn a_full_ring_is_answered_in_any_order() {
    let (mut ring, mut device) = pair(true, 65535);
    for round in 0..5 {
        for head in 0..SIZE {
            ring.push(head, 16 + u32::from(head));
        }
        ring.publish();
        let mut order = device.take();
        assert_eq!(order.len(), usize::from(SIZE));
        order.rotate_left(round);
        order.reverse();
        for &head in &order {
            device.give_back(head, 16 + u32::from(head));
        }
        assert_eq!(heads(&mut ring), order);
    }
}

/// Writes a used entry as no honest device would.
fn forge(ring: &DriverRing, at: u16, id: u32, len: u32, used_idx: u16) {
    let [i0, i1, i2, i3] = id.to_le_bytes();
    let [l0, l1, l2, l3] = len.to_le_bytes();
    let entry = [i0, i1, i2, i3, l0, l1, l2, l3];
    ring.memory.write(ring.layout.used_entry(at), &entry);
    ring.store(ring.layout.used_idx(), used_idx, Ordering::Release);
}

/// A ring with heads 0 and 1 in flight, 16 bytes writable each, from index 65535 on.
fn two_in_flight() -> DriverRing {
    let (mut ring, _) = pair(true, 65535);
    ring.push(0, 16);
    ring.push(1, 16);
    ring.publish();
    ring
}

#[test]
fn a_used_chain_that_is_not_in_flight_is_a_fault() {
    for id in [2, 7, 8, 0xffff, 0x1_0000, 0x1_0001, u32::MAX] {
        let mut ring = two_in_flight();
        forge(&ring, 65535, id, 0, 0);
        assert_eq!(ring.pop(), Err(RingFault::UsedId { id }));
    }
    let mut ring = two_in_flight();
    forge(&ring, 65535, 1, 0, 0);
    assert!(ring.pop().is_ok());
    forge(&ring, 0, 1, 0, 1);
    assert_eq!(ring.pop(), Err(RingFault::UsedId { id: 1 }), "twice");
}

#[test]
fn more_bytes_written_than_there_is_room_for_are_a_fault() {
    for len in [17, u32::MAX] {
        let mut ring = two_in_flight();
        forge(&ring, 65535, 1, len, 0);
        let fault = RingFault::UsedLen {
            id: 1,
            len,
            writable: 16,
        };
        assert_eq!(ring.pop(), Err(fault));
    }
}

#[test]
fn a_used_index_beyond_what_is_in_flight_is_a_fault() {
    // Two in flight: up to index 1 is fine.
    for (used_idx, used) in [(2, 3), (0x8000, 0x8001), (65534, 65535)] {
        let mut ring = two_in_flight();
        forge(&ring, 65535, 0, 0, used_idx);
        let in_flight = 2;
        assert_eq!(ring.pop(), Err(RingFault::UsedIndex { used, in_flight }));
    }
}

#[test]
fn what_is_not_published_cannot_be_used() {
    let (mut ring, _) = pair(true, 0);
    ring.push(0, 16);
    forge(&ring, 0, 0, 0, 1);
    let fault = RingFault::UsedIndex {
        used: 1,
        in_flight: 0,
    };
    assert_eq!(ring.pop(), Err(fault));
}

#[test]
fn no_notification_is_lost_between_two_threads() {
    const ROUNDS: u32 = 30_000;
    for event_idx in [false, true] {
        let (mut ring, mut device) = pair(event_idx, 60_000);
        let (kick, call) = (eventfd().unwrap(), eventfd().unwrap());
        let sleep = |fd: &std::os::fd::OwnedFd| {
            let mut fds = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
            poll(&mut fds, Duration::from_secs(30).into()).unwrap();
            assert!(!fds[0].revents().is_empty(), "a notification was lost");
            drain(fd);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut served = 0;
                while served < ROUNDS {
                    device.want_kicks(false);
                    loop {
                        for head in device.take() {
                            device.give_back(head, 0);
                            served += 1;
                        }
                        if device.must_call() {
                            signal(&call);
                        }
                        if !device.queue.enable_notification(&device.memory).unwrap() {
                            break;
                        }
                    }
                    if served < ROUNDS {
                        sleep(&kick);
                    }
                }
            });
            let mut free: Vec<u16> = (0..SIZE).collect();
            let (mut sent, mut got) = (0, 0);
            while got < ROUNDS {
                // Batches of one to all, so that both sides sleep and overtake each other.
                let batch = (1 + sent as usize % usize::from(SIZE)).min(free.len());
                for head in free.drain(..batch) {
                    if sent < ROUNDS {
                        ring.push(head, 16);
                        sent += 1;
                    }
                }
                if ring.publish() {
                    signal(&kick);
                }
                loop {
                    let used = heads(&mut ring);
                    got += used.len() as u32;
                    let some = !used.is_empty();
                    free.extend(used);
                    if some {
                        break;
                    }
                    if !ring.arm() {
                        sleep(&call);
                    }
                }
            }
        });
    }
}
