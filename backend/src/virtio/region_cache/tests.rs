use super::*;
use crate::virtio::tests::write_recorder::{WriteRecorder, writes};

/// Two regions side by side, and a third one beyond a hole.
const FIRST: u64 = 0x1000;
const SECOND: u64 = 0x3000;
const END: u64 = 0x5000;
const THIRD: u64 = 0x6000;
const THIRD_END: u64 = 0x7000;

type Mem = GuestMemoryMmap<WriteRecorder>;
const NOWHERE: [u64; 0] = [];

/// Memory in which no byte is as its neighbours are, so that none is taken for another.
fn memory() -> Mem {
    let ranges = [(FIRST, SECOND), (SECOND, END), (THIRD, THIRD_END)];
    let ranges = ranges.map(|(start, end)| (GuestAddress(start), (end - start) as usize));
    let mem = Mem::from_ranges(&ranges).unwrap();
    for (start, len) in ranges {
        let bytes: Vec<u8> = (start.0..).take(len).map(pattern).collect();
        mem.write_slice(&bytes, start).unwrap();
    }
    writes(&mem);
    mem
}

fn pattern(at: u64) -> u8 {
    (at % 251) as u8
}

fn expected(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(pattern).collect()
}

/// The addresses whose bytes are not the pattern's.
fn changed(mem: &Mem) -> Vec<u64> {
    let mut all = Vec::new();
    for (start, end) in [(FIRST, END), (THIRD, THIRD_END)] {
        let mut bytes = vec![0; (end - start) as usize];
        mem.read_slice(&mut bytes, GuestAddress(start)).unwrap();
        all.extend(
            (start..)
                .zip(bytes)
                .filter(|(at, byte)| pattern(*at) != *byte),
        );
    }
    all.into_iter().map(|(at, _)| at).collect()
}

/// The addresses that were marked as written.
fn marked(mem: &Mem) -> Vec<u64> {
    writes(mem)
        .into_iter()
        .flat_map(|(at, len)| (at..).take(len))
        .collect()
}

/// What is no pattern, from an address on.
fn other(at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64).map(|at| !pattern(at)).collect()
}

/// Places around the edges of the regions, and whether all their bytes are shared.
fn places() -> Vec<(u64, usize, bool)> {
    let mut all = Vec::new();
    for edge in [FIRST, SECOND, END, THIRD, THIRD_END] {
        for start in edge - 5..edge + 5 {
            for len in [1, 2, 4, 5, 9] {
                let end = start + len as u64;
                let shared = FIRST <= start && end <= END || THIRD <= start && end <= THIRD_END;
                all.push((start, len, shared));
            }
        }
    }
    all.push((FIRST, (END - FIRST) as usize, true));
    all.push((FIRST, (THIRD_END - FIRST) as usize, false));
    for start in [u64::MAX - 3, u64::MAX] {
        all.push((start, 4, false));
        all.push((start, usize::MAX, false));
    }
    all
}

/// A cache whose last region is each of the regions, and one that has none.
fn caches(mem: &Mem) -> impl Iterator<Item = RegionCache<'_, WriteRecorder>> {
    [None, Some(FIRST), Some(SECOND), Some(THIRD)]
        .into_iter()
        .map(|last| {
            let mut regions = RegionCache::new(mem);
            if let Some(last) = last {
                assert!(regions.has(GuestAddress(last), 1));
            }
            regions
        })
}

#[test]
fn bytes_are_read_across_regions_and_none_that_are_not_shared() {
    let mem = memory();
    for mut regions in caches(&mem) {
        for (at, len, shared) in places() {
            assert_eq!(regions.has(GuestAddress(at), len), shared, "{at:#x} {len}");
            if len > 0x1_0000 {
                continue;
            }
            let mut bytes = vec![0; len];
            assert_eq!(
                regions.read(GuestAddress(at), &mut bytes),
                shared,
                "{at:#x} {len}"
            );
            if shared {
                assert_eq!(bytes, expected(at, len), "{at:#x}");
            }
        }
    }
    assert_eq!(marked(&mem), NOWHERE, "nothing is written");
}

#[test]
fn bytes_are_written_across_regions_and_marked_and_no_others() {
    for (at, len, shared) in places() {
        if len > 0x1_0000 {
            continue;
        }
        let mem = memory();
        for mut regions in caches(&mem) {
            let bytes = other(at.min(THIRD_END), len);
            let named = at..at.saturating_add(len as u64);
            assert_eq!(
                regions.write(GuestAddress(at), &bytes),
                shared,
                "{at:#x} {len}"
            );
            let changed = changed(&mem);
            if shared {
                assert!(changed.iter().copied().eq(named), "{at:#x} {len}");
            } else {
                assert!(changed.iter().all(|at| named.contains(at)), "{at:#x} {len}");
            }
            assert_eq!(marked(&mem), changed);
        }
    }
}

#[test]
fn no_bytes_are_everywhere() {
    let mem = memory();
    for mut regions in caches(&mem) {
        for at in [0, FIRST, END, THIRD_END, u64::MAX] {
            assert!(regions.has(GuestAddress(at), 0));
            assert!(regions.read(GuestAddress(at), &mut []));
            assert!(regions.write(GuestAddress(at), &[]));
        }
    }
    assert_eq!(marked(&mem), NOWHERE);
}

#[test]
fn a_part_is_in_one_region() {
    let mem = memory();
    for mut regions in caches(&mem) {
        for (at, len, one) in [
            (FIRST, 0x2000, true),
            (SECOND, 0x2000, true),
            (SECOND - 8, 8, true),
            (SECOND - 8, 9, false),
            (SECOND - 8, 16, false),
            (END - 8, 9, false),
            (END, 1, false),
            (THIRD - 1, 2, false),
            (u64::MAX, 2, false),
        ] {
            assert_eq!(
                regions.ring_area(at, len).is_some(),
                one,
                "{at:#x} {len:#x}"
            );
        }
    }
}

#[test]
fn a_field_is_a_little_endian_number_and_marked_where_it_is_stored() {
    for at in [FIRST, SECOND - 16, SECOND, THIRD + 0xff0] {
        let mem = memory();
        for mut regions in caches(&mem) {
            let part = regions.ring_area(at, 16).unwrap();
            for offset in [0, 2, 14] {
                let place = at + offset as u64;
                let field = part.field(offset).unwrap();
                mem.write_slice(&[0x34, 0x12], GuestAddress(place)).unwrap();
                writes(&mem);
                assert_eq!(field.load(Ordering::Acquire), 0x1234);
                assert_eq!(marked(&mem), NOWHERE);
                field.store(0x5678, Ordering::Release);
                assert_eq!(marked(&mem), [place, place + 1]);
                let mut bytes = [0; 2];
                assert!(regions.read(GuestAddress(place), &mut bytes));
                assert_eq!(bytes, [0x78, 0x56]);
                mem.write_slice(&expected(place, 2), GuestAddress(place))
                    .unwrap();
                assert_eq!(changed(&mem), NOWHERE);
            }
        }
    }
}

#[test]
fn entries_are_read_and_written_within_their_part_and_marked() {
    for at in [FIRST, SECOND - 16, SECOND, THIRD + 0xff0] {
        let mem = memory();
        let mut regions = RegionCache::new(&mem);
        let part = regions.ring_area(at, 16).unwrap();
        for (offset, len) in [(0, 16), (3, 5), (15, 1), (16, 0)] {
            let mut bytes = vec![0; len];
            part.read(offset, &mut bytes);
            assert_eq!(bytes, expected(at + offset as u64, len));
        }
        let (offset, len) = (3, 9);
        let place = at + offset as u64;
        part.write(offset, &other(place, len));
        let named: Vec<u64> = (place..).take(len).collect();
        assert_eq!(marked(&mem), named);
        assert_eq!(changed(&mem), named);
    }
}

#[test]
fn nothing_past_the_end_of_a_part_is_read_or_written() {
    let mem = memory();
    let mut regions = RegionCache::new(&mem);
    let part = regions.ring_area(FIRST, 16).unwrap();
    for offset in [16, 17, 18, usize::MAX - 1, usize::MAX] {
        assert!(part.field(offset).is_none(), "{offset}");
    }
    for (offset, len) in [
        (0, 17),
        (15, 2),
        (16, 1),
        (usize::MAX, 2),
        (usize::MAX - 1, 1),
    ] {
        let mut bytes = vec![7; len];
        part.read(offset, &mut bytes);
        assert_eq!(bytes, vec![7; len]);
        part.write(offset, &bytes);
    }
    assert_eq!(marked(&mem), NOWHERE);
    assert_eq!(changed(&mem), NOWHERE);
}

#[test]
fn a_field_that_is_not_aligned_in_this_process_is_none() {
    let mem = memory();
    let mut regions = RegionCache::new(&mem);
    assert!(regions.ring_area(FIRST + 1, 16).unwrap().field(2).is_none());
    assert!(regions.ring_area(FIRST + 1, 16).unwrap().field(1).is_some());
}
