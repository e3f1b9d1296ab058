//! Random drivers, and a device that serves them by halves, beside a model that knows nothing of
//! batches but when there is a look, and of notifications but the sentence in the standard.

use std::collections::VecDeque;

use proptest::collection::vec;
use proptest::prelude::*;

use super::driver::{BUFFERS, Device, Driver, descriptor, pair};
use super::*;
use crate::vhost_user::ServedRing;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// What is in writable bytes before anybody writes them.
const POISON: u8 = 0xa5;
/// Bytes for the buffers of one chain, and for each of them.
const AREA: u64 = 0x400;
const BUFFER: u64 = 0x40;
/// Where an indirect table is in an area.
const INDIRECT_TABLE: u64 = 0x200;
const PIECES: usize = 8;

/// How long the buffers of a chain are.
#[derive(Clone, Debug)]
struct Layout {
    readable: Vec<usize>,
    writable: Vec<usize>,
    indirect: bool,
    /// Which of the free descriptors are taken.
    from: usize,
}

#[derive(Clone, Debug)]
enum Step {
    Offer(Vec<Layout>),
    /// As many chains of one byte as there are descriptors for.
    Fill,
    /// When the driver wants to be called: with EVENT_IDX, and without.
    Wish(i16, u16),
    /// The device goes on.
    Take(usize),
    PutBack,
    GiveBack(usize, usize),
    Publish,
    WhenIdle(bool),
    /// Another one serves the ring from now on.
    End,
}

fn layout() -> impl Strategy<Value = Layout> {
    let pieces = || vec(0..=BUFFER as usize, 0..=PIECES / 2);
    let all = (pieces(), pieces(), any::<bool>(), any::<usize>());
    all.prop_map(|(mut readable, writable, indirect, from)| {
        if readable.is_empty() && writable.is_empty() {
            readable.push(1);
        }
        Layout {
            readable,
            writable,
            indirect,
            from,
        }
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => vec(layout(), 1..5).prop_map(Step::Offer),
        1 => Just(Step::Fill),
        3 => (-6..9_i16, 0..4_u16).prop_map(|(event, flags)| Step::Wish(event, flags)),
        6 => prop_oneof![4 => 1..6_usize, 1 => Just(600)].prop_map(Step::Take),
        1 => Just(Step::PutBack),
        6 => (any::<usize>(), 0..100_usize).prop_map(|(which, len)| Step::GiveBack(which, len)),
        1 => Just(Step::Publish),
        1 => any::<bool>().prop_map(Step::WhenIdle),
        3 => Just(Step::End),
    ]
}

/// A chain, as the driver made it.
#[derive(Clone)]
struct Made {
    head: u16,
    descriptors: Vec<u16>,
    request: Vec<u8>,
    writable: Vec<(u64, usize)>,
}

/// A driver, and what ought to become of what it does.
struct World {
    size: u16,
    event_idx: bool,
    driver: Driver<()>,
    free: Vec<u16>,
    made: u8,
    /// Chains that the device has yet to take, of which it has found so many.
    offered: VecDeque<Made>,
    found: usize,
    /// Those that it has taken, with where their answers go.
    held: Vec<(Made, Vec<Segment>)>,
    /// Given back and not published; published and not yet looked at by the driver.
    given: Vec<(Made, u32)>,
    published: Vec<(Made, u32)>,
    used_idx: u16,
    /// The used index at which each entry was put of which the driver was not notified.
    untold: Vec<u16>,
    used_event: u16,
    flags: u16,
    /// How often the driver is called once the ring was served.
    calls: u64,
    idle: WhenIdle,
    /// The driver has been asked to kick, and has made nothing available since.
    asked: bool,
}

impl World {
    fn new(size: u16, event_idx: bool, start: u16) -> (Self, Device<()>) {
        let (driver, device) = pair(size, event_idx, start);
        let world = World {
            size,
            event_idx,
            driver,
            free: (0..size).collect(),
            made: 0,
            offered: VecDeque::new(),
            found: 0,
            held: Vec::new(),
            given: Vec::new(),
            published: Vec::new(),
            used_idx: start,
            untold: Vec::new(),
            used_event: start,
            flags: 0,
            calls: 0,
            idle: WhenIdle::AskForKick,
            asked: false,
        };
        (world, device)
    }

    /// Lays a chain out, where there are descriptors for it.
    fn make(&mut self, layout: &Layout) -> Option<Made> {
        let pieces = layout.readable.len() + layout.writable.len();
        let count = if layout.indirect { 1 } else { pieces };
        if count > self.free.len() {
            return None;
        }
        let from = layout.from % self.free.len();
        self.free.rotate_left(from);
        let descriptors: Vec<u16> = self.free.drain(..count).collect();
        let head = descriptors[0];
        let area = BUFFERS + AREA * u64::from(head);
        let mut made = Made {
            head,
            descriptors,
            request: Vec::new(),
            writable: Vec::new(),
        };
        let shared = &self.driver.shared;
        let lens = layout.readable.iter().chain(&layout.writable);
        for (n, len) in lens.copied().enumerate() {
            let at = area + BUFFER * n as u64;
            self.made = self.made.wrapping_add(1);
            let mut flags = 0;
            if n < layout.readable.len() {
                let bytes = vec![self.made; len];
                shared.write(at, &bytes);
                made.request.extend(bytes);
            } else {
                flags |= WRITE;
                shared.write(at, &vec![POISON; len]);
                made.writable.push((at, len));
            }
            let mut next = 0;
            if n + 1 < pieces {
                flags |= NEXT;
                next = match layout.indirect {
                    true => n as u16 + 1,
                    false => made.descriptors[n + 1],
                };
            }
            let bytes = descriptor(at, len, flags, next);
            match layout.indirect {
                true => shared.write(area + INDIRECT_TABLE + 16 * n as u64, &bytes),
                false => shared.describe(made.descriptors[n], bytes),
            }
        }
        if layout.indirect {
            let table = descriptor(area + INDIRECT_TABLE, 16 * pieces, INDIRECT, 0);
            shared.describe(head, table);
        }
        Some(made)
    }

    fn offer(&mut self, layouts: &[Layout]) {
        for layout in layouts {
            let Some(made) = self.make(layout) else {
                return;
            };
            // An entry at this index asks for a kick, or a flag does.
            let asked = match self.event_idx {
                true => self.driver.shared.avail_event() == self.driver.next_avail,
                false => self.driver.shared.used_flags() & NO_NOTIFY == 0,
            };
            assert!(asked || !self.asked, "the device sleeps, and wants no kick");
            self.asked = false;
            self.driver.offer(&[made.head]);
            self.offered.push_back(made);
        }
    }

    fn wish(&mut self, event: i16, flags: u16) {
        self.used_event = self.used_idx.wrapping_add_signed(event);
        self.flags = flags;
        self.driver.shared.set_used_event(self.used_event);
        self.driver.shared.set_avail_flags(flags);
    }

    fn publish(&mut self) {
        for given in self.given.drain(..) {
            self.untold.push(self.used_idx);
            self.used_idx = self.used_idx.wrapping_add(1);
            self.published.push(given);
        }
    }

    /// The device MUST tell where the index at which it put an entry was used_event, or where flags
    /// is not 1 (virtio 1.2 §2.7.7.2).
    #[must_use]
    fn tell(&mut self) -> bool {
        let must = match self.event_idx {
            true => self.untold.contains(&self.used_event),
            false => !self.untold.is_empty() && self.flags & 1 == 0,
        };
        self.untold.clear();
        must
    }

    fn take(&mut self, ring: &mut ServedRing<'_, ()>, chain: &mut ChainBuffer) -> bool {
        assert_eq!(ring.has_found(), self.found != 0);
        let mut tells = false;
        if self.found == 0 {
            self.publish();
            self.found = self.offered.len().min(BATCH);
            if self.found == 0 {
                tells = self.tell();
                self.asked = self.idle == WhenIdle::AskForKick;
            }
        }
        let head = ring.next_chain(chain);
        assert_eq!(ring.scratch.take_notifications() != 0, tells);
        if self.found == 0 {
            assert_eq!(head, None);
            return false;
        }
        if !self.event_idx {
            assert_eq!(self.driver.shared.used_flags(), NO_NOTIFY);
        }
        self.found -= 1;
        let made = self.offered.pop_front().unwrap();
        assert_eq!(head, Some(made.head));
        assert_eq!(chain.request(), made.request);
        let room: usize = made.writable.iter().map(|(_, len)| len).sum();
        assert_eq!(chain.room(), room);
        self.held.push((made, chain.writable_for(room)));
        true
    }

    fn give_back(&mut self, ring: &mut ServedRing<'_, ()>, which: usize, len: usize) {
        if self.held.is_empty() {
            return;
        }
        let (made, segments) = self.held.swap_remove(which % self.held.len());
        let room = made.writable.iter().map(|(_, len)| len).sum();
        let len = len.min(room);
        let written = ring.write(&segments, &answer(made.head, len));
        assert_eq!(written as usize, len);
        ring.give_back(made.head, written);
        self.given.push((made, written));
    }

    /// The driver takes its answers, and finds in them what the device wrote and nothing else.
    fn check(&mut self) {
        assert_eq!(self.driver.calls(), self.calls);
        let used = self.driver.used();
        let published = std::mem::take(&mut self.published);
        assert_eq!(used.len(), published.len());
        for ((id, len), (made, written)) in used.into_iter().zip(published) {
            assert_eq!((id, len), (made.head.into(), written));
            let pieces = made.writable.iter();
            let bytes: Vec<u8> = pieces
                .flat_map(|(at, len)| self.driver.shared.read(*at, *len))
                .collect();
            let (answered, rest) = bytes.split_at(written as usize);
            assert_eq!(answered, answer(made.head, answered.len()));
            assert!(rest.iter().all(|byte| *byte == POISON));
            self.free.extend(made.descriptors);
        }
    }

    /// One that serves the ring, from its first step to its last.
    fn serve(&mut self, device: &mut Device<()>, steps: &[Step]) {
        let indices = device.serve(|ring, chain| {
            self.idle = WhenIdle::AskForKick;
            self.found = 0;
            // Whether what was taken last can be put back.
            let mut fresh = false;
            for step in steps {
                let was_fresh = std::mem::take(&mut fresh);
                match step {
                    Step::Offer(layouts) => self.offer(layouts),
                    Step::Fill => self.fill(),
                    Step::Wish(event, flags) => self.wish(*event, *flags),
                    Step::Take(count) => {
                        fresh = (0..*count).all(|_| self.take(ring, chain));
                    }
                    Step::PutBack if was_fresh => {
                        ring.put_back();
                        self.found += 1;
                        self.offered.push_front(self.held.pop().unwrap().0);
                    }
                    Step::PutBack => {}
                    Step::GiveBack(which, len) => self.give_back(ring, *which, *len),
                    Step::Publish => {
                        assert_eq!(ring.publish(), !self.given.is_empty());
                        self.publish();
                    }
                    Step::WhenIdle(look) => {
                        self.idle = if *look {
                            WhenIdle::KeepPolling
                        } else {
                            WhenIdle::AskForKick
                        };
                        ring.when_idle(self.idle);
                    }
                    Step::End => {}
                }
                assert_eq!(self.driver.shared.used_idx(), self.used_idx);
            }
            self.publish();
            self.calls = self.tell().into();
            let left = self.offered.len() as u16;
            (self.driver.next_avail.wrapping_sub(left), self.used_idx)
        });
        assert_eq!(Some(device.indices()), indices);
        self.check();
    }

    fn fill(&mut self) {
        let byte = Layout {
            readable: vec![1],
            writable: vec![],
            indirect: false,
            from: 0,
        };
        self.offer(&vec![byte; self.free.len()]);
    }
}

fn answer(head: u16, len: usize) -> Vec<u8> {
    (0..len).map(|n| (n as u8 ^ head as u8) & 0x7f).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_chain_is_served_once_and_in_order_and_called_for_where_the_standard_says(
        size in (0..10_u32).prop_map(|log| 1_u16 << log),
        event_idx in any::<bool>(),
        start in prop_oneof![3 => 65_300..=65_535_u16, 1 => any::<u16>()],
        story in vec(step(), 1..80),
    ) {
        let (mut world, mut device) = World::new(size, event_idx, start);
        for steps in story.split_inclusive(|step| matches!(step, Step::End)) {
            world.serve(&mut device, steps);
        }
        // Whatever is left.
        let all = vec![Step::GiveBack(0, 0); usize::from(size)];
        for _ in 0..3 {
            world.serve(&mut device, &[Step::Take(600)]);
            world.serve(&mut device, &all);
        }
        prop_assert!(device.is_started());
        prop_assert_eq!(world.free.len(), usize::from(world.size));
    }
}
