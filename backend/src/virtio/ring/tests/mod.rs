mod driver;
mod notifications;
mod properties;
mod races;

use driver::{AVAIL, BUFFERS, END, TABLE, USED, descriptor, pair};
use vhost_user_backend::VringT;
use vm_memory::GuestAddressSpace;

use super::*;
use crate::vhost_user::Vring;
use crate::virtio::Memory;
use crate::virtio::chain::{INDIRECT, NEXT};
use crate::virtio::tests::write_recorder::{WriteRecorder, writes};

const BOTH: [bool; 2] = [false, true];
const NONE: [u16; 0] = [];

/// Heads of a ring of this size, the last one first.
fn heads(size: u16, count: u16) -> Vec<u16> {
    (0..count).map(|n| size - 1 - n % size).collect()
}

#[test]
fn chains_are_served_once_and_in_order_in_rings_of_any_size_while_the_indices_wrap() {
    for (size, event_idx) in [1, 2, 8, 256, 512, 1024].into_iter().zip(BOTH.repeat(3)) {
        let start = 65_533;
        let (mut driver, mut device) = pair::<()>(size, event_idx, start);
        let mut total = 0;
        for count in [size, 1, size / 2, size, size] {
            let offered = heads(size, count);
            driver.offer(&offered);
            assert_eq!(device.serve_all(WhenIdle::AskForKick), offered);
            let expected: Vec<_> = (0..)
                .zip(&offered)
                .map(|(n, h)| (u32::from(*h), n))
                .collect();
            assert_eq!(driver.used(), expected);
            total += count;
            let end = start.wrapping_add(total);
            assert_eq!(device.indices(), (end, end));
        }
        assert_eq!(device.serve_all(WhenIdle::AskForKick), NONE);
    }
}

#[test]
fn one_look_at_the_available_index_finds_a_batch() {
    let (mut driver, mut device) = pair::<()>(1024, true, 65_500);
    driver.offer(&heads(1024, 700));
    let shared = driver.shared.clone();
    let batches = device.serve(|ring, chain| {
        let mut batches = vec![0];
        while ring.next_chain(chain).is_some() {
            *batches.last_mut().unwrap() += 1;
            if !ring.has_found() {
                batches.push(0);
            }
            if batches == [BATCH, 1] {
                // Nobody sees it before the second batch is used up.
                shared.set_avail_idx(1);
            }
        }
        batches
    });
    assert_eq!(batches.unwrap(), [BATCH, BATCH, 0]);
    assert!(
        !device.is_started(),
        "the third look found an index that makes no sense"
    );
}

#[test]
fn what_is_given_back_is_published_with_one_store_of_the_used_index() {
    let (mut driver, mut device) = pair::<WriteRecorder>(8, false, 65_533);
    driver.offer(&[5, 6, 7, 0, 1]);
    let mem = driver.shared.memory.memory();
    let shared = driver.shared.clone();
    writes(&mem);
    device.serve(|ring, chain| {
        for len in 0..5 {
            let head = ring.next_chain(chain).unwrap();
            ring.give_back(head, len);
            assert_eq!(shared.used_idx(), 65_533);
        }
        assert_eq!(writes(&mem), [(USED, 2)], "NO_NOTIFY");
        assert!(ring.publish());
        assert_eq!(shared.used_idx(), 2);
        // Entries 5 to 7 and 0 to 1, and then the index.
        let entries = USED + 4;
        let all = [(entries + 40, 24), (entries, 16), (USED + 2, 2)];
        assert_eq!(writes(&mem), all);
        assert!(!ring.publish(), "there is no more");
        assert_eq!(writes(&mem), []);
    });
    assert_eq!(driver.used(), [(5, 0), (6, 1), (7, 2), (0, 3), (1, 4)]);
}

#[test]
fn what_was_given_back_is_published_before_the_next_look() {
    let (mut driver, mut device) = pair::<()>(8, true, 0);
    driver.offer(&[0, 1]);
    let shared = driver.shared.clone();
    device.serve(|ring, chain| {
        for used_idx in [0, 0] {
            let head = ring.next_chain(chain).unwrap();
            assert_eq!(shared.used_idx(), used_idx);
            ring.give_back(head, 0);
        }
        shared.offer_from(2, &[2]);
        assert_eq!(ring.next_chain(chain), Some(2));
        assert_eq!(shared.used_idx(), 2);
    });
}

#[test]
fn a_ring_that_is_dropped_is_published_and_the_crate_knows_where_it_was() {
    for event_idx in BOTH {
        let (mut driver, mut device) = pair::<()>(4, event_idx, 65_534);
        driver.offer(&[3, 2, 1]);
        device.serve(|ring, chain| {
            let first = ring.next_chain(chain).unwrap();
            ring.next_chain(chain).unwrap();
            ring.give_back(first, 9);
        });
        assert_eq!(driver.used(), [(3, 9)]);
        assert_eq!(device.indices(), (0, 65_535));
        assert_eq!(driver.calls(), 1);
        assert_eq!(device.serve_all(WhenIdle::AskForKick), [1], "where it was");
    }
}

#[test]
fn what_was_found_and_not_taken_is_found_again_and_in_no_other_ring() {
    let (mut driver, mut device) = pair::<()>(8, true, 0);
    let (mut other, mut other_device) = pair::<()>(8, true, 3);
    driver.offer(&[0, 1, 2]);
    other.offer(&[7]);
    device.serve(|ring, chain| assert_eq!(ring.next_chain(chain), Some(0)));
    std::mem::swap(&mut device.scratch, &mut other_device.scratch);
    assert_eq!(other_device.serve_all(WhenIdle::AskForKick), [7]);
    assert_eq!(other_device.serve_all(WhenIdle::AskForKick), NONE);
    std::mem::swap(&mut device.scratch, &mut other_device.scratch);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), [1, 2]);
}

#[test]
fn a_chain_that_is_put_back_is_the_next_one() {
    for drops in BOTH {
        let (mut driver, mut device) = pair::<()>(4, true, 65_534);
        driver.offer(&[0, 1, 2, 3]);
        device.serve(|ring, chain| {
            let first = ring.next_chain(chain).unwrap();
            ring.give_back(first, 0);
            assert_eq!(ring.next_chain(chain), Some(1));
            ring.put_back();
            assert!(ring.has_found());
            if !drops {
                assert_eq!(ring.next_chain(chain), Some(1));
                ring.put_back();
            }
        });
        assert_eq!(device.indices(), (65_535, 65_535));
        assert_eq!(device.serve_all(WhenIdle::AskForKick), [1, 2, 3]);
        assert_eq!(driver.used(), [(0, 0), (1, 0), (2, 1), (3, 2)]);
    }
}

#[test]
fn the_last_chain_of_a_batch_can_be_put_back() {
    let (mut driver, mut device) = pair::<()>(4, true, 65_535);
    driver.offer(&[2]);
    device.serve(|ring, chain| {
        ring.next_chain(chain).unwrap();
        ring.put_back();
    });
    assert_eq!(device.indices(), (65_535, 65_535));
    assert_eq!(device.serve_all(WhenIdle::AskForKick), [2]);
}

#[test]
fn a_ring_whose_available_index_jumps_by_more_than_its_size_is_stopped() {
    for start in [0, 9, 65_535] {
        for jump in [5, 6, 0x7fff, 0x8000, 65_535] {
            let (driver, mut device) = pair::<()>(4, true, start);
            driver.shared.set_avail_idx(start.wrapping_add(jump));
            assert_eq!(device.serve_all(WhenIdle::AskForKick), NONE);
            assert!(!device.is_started(), "{start} {jump}");
            assert_eq!(device.indices(), (start, start));
            assert!(device.serve(|_, _| ()).is_none());
            assert_eq!((driver.shared.used_idx(), driver.calls()), (start, 0));
        }
        let (driver, mut device) = pair::<()>(4, true, start);
        driver.shared.set_avail_idx(start.wrapping_add(4));
        assert_eq!(
            device.serve_all(WhenIdle::AskForKick).len(),
            4,
            "as many as it has descriptors"
        );
        assert!(device.is_started());
    }
}

#[test]
fn an_index_that_makes_no_sense_keeps_nothing_back_that_was_answered_before() {
    let (mut driver, mut device) = pair::<()>(4, true, 0);
    driver.offer(&[0, 1]);
    let shared = driver.shared.clone();
    device.serve(|ring, chain| {
        for _ in 0..2 {
            let head = ring.next_chain(chain).unwrap();
            ring.give_back(head, 0);
        }
        shared.set_avail_idx(1);
        assert_eq!(ring.next_chain(chain), None);
    });
    assert!(!device.is_started());
    assert_eq!(driver.used(), [(0, 0), (1, 0)]);
    assert_eq!((device.indices(), driver.calls()), ((2, 2), 1));
}

#[test]
fn a_head_outside_the_table_stops_the_ring_after_what_came_before() {
    for bad in [4, 5, 0x8000, 65_535] {
        let (mut driver, mut device) = pair::<()>(4, true, 65_535);
        driver.offer(&[3, bad, 1]);
        assert_eq!(device.serve_all(WhenIdle::AskForKick), [3]);
        assert!(!device.is_started(), "{bad}");
        assert_eq!(driver.used(), [(3, 0)]);
        assert_eq!((device.indices(), driver.calls()), ((0, 0), 1));
    }
}

#[test]
fn a_ring_that_is_started_again_goes_on_where_the_frontend_says() {
    let (mut driver, mut device) = pair::<()>(4, true, 0);
    driver.offer(&[9]);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), NONE);
    assert!(!device.is_started());
    driver.shared.offer_from(0, &[1, 2]);
    device.vring.set_queue_next_avail(1);
    device.vring.set_queue_ready(true);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), [2]);
}

#[test]
fn a_ring_that_is_not_started_or_not_enabled_is_not_served() {
    let (mut driver, mut device) = pair::<()>(4, true, 0);
    driver.offer(&[0]);
    device.vring.set_enabled(false);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), NONE);
    assert!(device.is_started(), "it may be enabled again");
    device.vring.set_enabled(true);
    device.vring.set_queue_ready(false);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), NONE);
    device.vring.set_queue_ready(true);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), [0]);
}

#[test]
fn a_ring_that_is_being_stopped_takes_back_what_was_taken_of_it() {
    for enabled in BOTH {
        let (mut driver, mut device) = pair::<()>(4, true, 65_535);
        driver.offer(&[2, 1]);
        device.serve(|ring, chain| ring.next_chain(chain));
        device.vring.set_enabled(enabled);
        device.vring.set_queue_ready(false);
        let mem = driver.shared.memory.memory();
        let stopping = device.vring.stopping(1, &mem, &mut device.scratch);
        let mut ring = stopping.unwrap();
        ring.give_back(2, 8);
        drop(ring);
        device.notify();
        assert_eq!(driver.used(), [(2, 8)]);
        assert_eq!((device.indices(), driver.calls()), ((0, 0), 1));
    }
}

#[test]
fn a_ring_that_was_not_served_since_it_was_stopped_is_the_drivers_alone() {
    let (mut driver, mut device) = pair::<()>(4, true, 0);
    let is_touched = |device: &mut driver::Device<()>, driver: &driver::Driver<()>| {
        let mem = driver.shared.memory.memory();
        device
            .vring
            .stopping(1, &mem, &mut device.scratch)
            .is_some()
    };
    assert!(!is_touched(&mut device, &driver), "never served");
    driver.offer(&[2, 1]);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), [2, 1]);
    assert!(is_touched(&mut device, &driver));
    assert!(!is_touched(&mut device, &driver), "stopped twice");
}

#[test]
fn a_ring_that_is_not_in_the_memory_is_stopped() {
    let edge = |len: u64| END - len;
    for (avail, used) in [
        (0, USED),
        (END, USED),
        // used_event and avail_event are past the region's end.
        (edge(4 + 2 * 4), USED),
        (AVAIL, edge(4 + 8 * 4)),
        (!1, USED),
        (AVAIL, !3),
        (AVAIL, END),
    ] {
        let (mut driver, mut device) = pair::<()>(4, true, 7);
        driver.offer(&[0]);
        device.vring.set_queue_info(TABLE, avail, used).unwrap();
        assert!(device.serve(|_, _| ()).is_none());
        assert!(!device.is_started(), "{avail:#x} {used:#x}");
        assert_eq!(device.indices(), (7, 7));

        // Nothing can be given back, and nothing is said to have been.
        let mem = driver.shared.memory.memory();
        let stopping = device.vring.stopping(1, &mem, &mut device.scratch);
        let mut ring = stopping.unwrap();
        ring.give_back(0, 0);
        assert!(!ring.publish());
        ring.leave();
        drop(ring);
        device.notify();
        assert_eq!((device.indices(), driver.calls()), ((7, 7), 0));
    }
}

#[test]
fn a_ring_may_end_where_its_region_does() {
    let (driver, mut device) = pair::<()>(4, true, 0);
    let avail = END - (4 + 2 * 4 + 2);
    device.vring.set_queue_info(TABLE, avail, USED).unwrap();
    driver.shared.store(avail + 2, 1);
    driver.shared.store(avail + 4, 3);
    assert_eq!(device.serve_all(WhenIdle::AskForKick), [3]);
}

#[test]
fn a_ring_that_is_not_aligned_in_this_process_is_stopped() {
    // The guest's even addresses are odd ones here.
    let ranges = [(GuestAddress(1), 0x10_0000)];
    let memory = Memory::<()>::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let vring = Vring::new(memory.clone(), 4).unwrap();
    vring.set_queue_info(TABLE, AVAIL, USED).unwrap();
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    let (mem, mut scratch) = (memory.memory(), RingScratch::new(1024));
    assert!(vring.usable(1, &mem, &mut scratch).is_none());
    assert!(!vring.get_ref().get_queue().ready());
}

#[test]
fn the_available_index_can_be_looked_at_without_serving() {
    let (mut driver, device) = pair::<WriteRecorder>(4, true, 65_535);
    let mem = driver.shared.memory.memory();
    let mut regions = RegionCache::new(&*mem);
    let state = device.vring.get_ref();
    let index = available_index(state.get_queue(), &mut regions).unwrap();
    assert_eq!(index.load(Ordering::Relaxed), 65_535);
    driver.offer(&[0, 1]);
    writes(&mem);
    assert_eq!(index.load(Ordering::Relaxed), 1);
    assert_eq!(writes(&mem), []);
}

#[test]
fn chains_without_room_are_given_back_unchanged_and_count_towards_the_batch() {
    let (mut driver, mut device) = pair::<()>(512, true, 0);
    driver.offer(&heads(512, 400));
    // Every chain is one byte to be read: none has room.
    let stop = device.serve(|ring, chain| ring.next_with_room(chain, 1));
    assert_eq!(stop, Some(Err(Stop::BatchFull)));
    let given_back = driver.used();
    assert_eq!(given_back.len(), BATCH);
    assert!(given_back.iter().all(|(_, len)| *len == 0));
    let stop = device.serve(|ring, chain| ring.next_with_room(chain, 1));
    assert_eq!(stop, Some(Err(Stop::Drained)));
    assert_eq!(driver.used().len(), 400 - BATCH);
}

/// Takes chains that have room until there is a reason to stop; returns how many there were, and
/// the reason.
fn take_all(device: &mut driver::Device<()>) -> (usize, Stop) {
    let taken = device.serve(|ring, chain| {
        let mut taken = 0;
        loop {
            match ring.next_with_room(chain, 0) {
                Ok(head) => ring.give_back(head, 0),
                Err(stop) => return (taken, stop),
            }
            taken += 1;
        }
    });
    taken.unwrap()
}

#[test]
fn a_batch_ends_after_so_many_descriptors_those_without_bytes_included() {
    // Each chain is an indirect table of so many descriptors, all of which are the first one.
    for table in [64, 1000, 16_384, 65_535] {
        let (mut driver, mut device) = pair::<()>(512, true, 0);
        let first = descriptor(BUFFERS, 0, NEXT, 0);
        driver.shared.write(BUFFERS, &first);
        for index in 0..512 {
            let indirect = descriptor(BUFFERS, 16 * table, INDIRECT, 0);
            driver.shared.describe(index, indirect);
        }
        driver.offer(&heads(512, 512));
        let chains = budget::DESCRIPTORS.div_ceil(table).min(budget::CHAINS);
        assert_eq!(take_all(&mut device), (chains, Stop::BatchFull), "{table}");
        assert_eq!(take_all(&mut device), (chains, Stop::BatchFull), "{table}");
    }
}

#[test]
fn a_batch_ends_after_so_many_bytes_of_requests_and_answers() {
    const LONGEST: usize = vhost_user_timer_protocol::MAX_MESSAGE;
    let (mut driver, mut device) = pair::<()>(512, true, 0);
    driver.offer(&heads(512, 512));
    for index in 0..512 {
        driver
            .shared
            .describe(index, descriptor(BUFFERS, LONGEST, 0, 0));
    }
    assert_eq!(
        take_all(&mut device),
        (budget::BYTES / LONGEST, Stop::BatchFull)
    );
    // Answers count as well.
    let answer = vec![0; LONGEST];
    let answered = device.serve(|ring, chain| {
        let mut answered = 0;
        while let Ok(head) = ring.next_with_room(chain, 0) {
            ring.write(&[], &answer);
            ring.give_back(head, 0);
            answered += 1;
        }
        answered
    });
    assert_eq!(answered, Some(budget::BYTES / (2 * LONGEST)));
}

#[test]
fn a_batch_goes_on_from_one_ring_to_the_next() {
    let (mut driver, mut device) = pair::<()>(512, true, 0);
    driver.offer(&heads(512, 512));
    let mem = driver.shared.memory.memory();
    device.scratch.begin_batch();
    for taken in [100, 100, budget::CHAINS - 200, 0] {
        let mut ring = device.vring.usable(1, &mem, &mut device.scratch).unwrap();
        let chains = (0..100).map_while(|_| ring.next_with_room(&mut device.chain, 0).ok());
        assert_eq!(chains.count(), taken);
    }
}
