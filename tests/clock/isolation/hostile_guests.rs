//! Guests that break the rules disturb nobody.

use super::*;

/// A VMM that sends requests all the time, and checks that its VM is as it left it.
struct Vmm {
    over: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Vmm {
    fn at(rig: &Rig) -> Self {
        let mut timer = Client::connect(rig);
        timer.configure(2);
        timer.set(0, &[(CNT, 1 << 30), (CTL, 1), (CVAL, 1 << 40)]);
        let before = at_rest(&mut timer);
        let (over, rounds) = (Arc::default(), Arc::default());
        let (stop, done) = (Arc::clone(&over), Arc::clone(&rounds));
        let thread = thread::spawn(move || {
            while !AtomicBool::load(&stop, Ordering::Relaxed) {
                assert_eq!(at_rest(&mut timer), before);
                AtomicU64::fetch_add(&done, 1, Ordering::Relaxed);
            }
        });
        Vmm {
            over,
            rounds,
            thread,
        }
    }

    /// Checks that all was as it must be, and still is.
    #[track_caller]
    fn undisturbed(self) {
        let rounds = || self.rounds.load(Ordering::Relaxed);
        let before = rounds();
        until("the VMM is served", || {
            rounds() >= before + 20 || self.thread.is_finished()
        });
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("the VMM was served as ever");
    }
}

fn guest_with(rig: &Rig, size: u16) -> ClockDriver {
    let setup = Setup {
        size,
        ..ClockDriver::setup()
    };
    ClockDriver::connect_with(rig, setup)
}

/// Calls `act` on a ring of a guest that has an alarm due, and checks that the process goes on.
#[track_caller]
fn attack(rig: &Rig, what: &str, queue: u16, act: impl Fn(&mut Memory, &mut Ring)) {
    let mut guest = guest_with(rig, 16);
    guest.set_alarm(UTC, 1, true);
    let ring = usize::from(queue);
    act(&mut guest.driver.memory, &mut guest.driver.rings[ring]);
    for _ in 0..3 {
        guest.driver.rings[ring].kick_anyway();
    }
    // The other queue is served, and by then this one was.
    if queue == ALARMQ {
        guest.settle();
    } else {
        guest.post_alarm_buffer();
        guest.notified();
    }
    // And this one, when it is started again.
    guest.driver.stop(queue);
    guest.driver.start(queue);
    guest.reads_the_hosts(UTC);
    guest.set_alarm(UTC, 1, true);
    guest.post_alarm_buffer();
    assert_eq!(guest.notified(), UTC, "{what}");
}

#[test]
fn hostile_rings_disturb_nobody() {
    let rig = both();
    let vmm = Vmm::at(&rig);
    let end = REGION_GPA + REGION_SIZE;
    for queue in [REQUESTQ, ALARMQ] {
        for jump in [17, 1_000, 0x7fff, 0x8000, 0xffff] {
            attack(&rig, "a jump", queue, |memory, ring| {
                ring.set_avail_index(memory, ring.next_avail().wrapping_add(jump));
            });
        }
        for flags in [NEXT, NEXT | WRITE] {
            for (len, second) in [(0, 0), (16, 0), (u32::MAX, 5), (64, 5)] {
                attack(&rig, "a loop", queue, |memory, ring| {
                    let at = memory.allocate(64);
                    ring.set_descriptor(memory, 0, descriptor(at, len, flags, second));
                    ring.set_descriptor(memory, 5, descriptor(at, len, flags, 0));
                    ring.make_available(memory, 0);
                });
            }
        }
        for head in [16, 255, 0xffff] {
            attack(&rig, "a bad head", queue, |memory, ring| {
                ring.make_available(memory, head);
            });
        }
        for address in [0, REGION_GPA - 1, end - 8, end, u64::MAX - 15, REGION_VA] {
            for len in [16, 4_096, u32::MAX] {
                attack(&rig, "a bad address", queue, |memory, ring| {
                    let at = memory.allocate(64);
                    memory.write(at, &set_alarm(UTC, 1, true));
                    ring.set_descriptor(memory, 0, descriptor(address, len, NEXT, 1));
                    ring.set_descriptor(memory, 1, descriptor(at, 64, WRITE, 0));
                    ring.set_descriptor(memory, 2, descriptor(at, 24, NEXT, 3));
                    ring.set_descriptor(memory, 3, descriptor(address, len, WRITE, 0));
                    ring.make_available(memory, 0);
                    ring.make_available(memory, 2);
                });
            }
        }
        for (place, len) in [
            (0, 16),
            (end - 16, 160),
            (REGION_GPA, 15),
            (u64::MAX, u32::MAX),
        ] {
            attack(&rig, "a bad table", queue, |memory, ring| {
                ring.set_descriptor(memory, 0, descriptor(place, len, INDIRECT, 0));
                ring.make_available(memory, 0);
            });
        }
        let places: [fn(&Ring) -> u64; 3] = [Ring::descriptors_at, Ring::avail_at, Ring::used_at];
        for place in places {
            attack(&rig, "an answer into the ring", queue, |memory, ring| {
                let at = memory.allocate(24);
                memory.write(at, &set_alarm(MONOTONIC, 1, true));
                ring.set_descriptor(memory, 0, descriptor(at, 24, NEXT, 1));
                ring.set_descriptor(memory, 1, descriptor(place(ring), 80, WRITE, 0));
                ring.make_available(memory, 0);
            });
        }
        attack(
            &rig,
            "the same chain again and again",
            queue,
            |memory, ring| {
                let at = memory.allocate(64);
                memory.write(at, &proper(msg::READ, UTC));
                ring.set_descriptor(memory, 0, descriptor(at, 16, NEXT, 1));
                ring.set_descriptor(memory, 1, descriptor(at + 16, 16, WRITE, 0));
                for _ in 0..16 {
                    ring.make_available(memory, 0);
                }
            },
        );
    }
    vmm.undisturbed();
    assert!(rig.comes_to_rest());
}

#[test]
fn random_rings_disturb_nobody() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let rig = both();
    let vmm = Vmm::at(&rig);
    for _ in 0..200 {
        let mut guest = guest_with(&rig, 16);
        guest.set_alarm(UTC, 1, true);
        for queue in [REQUESTQ, ALARMQ] {
            let ring = &mut guest.driver.rings[usize::from(queue)];
            for index in 0..16 {
                let address = match random.bool() {
                    true => random.u64(..),
                    false => REGION_GPA + random.u64(0..REGION_SIZE),
                };
                let len = match random.u8(0..3) {
                    0 => random.u32(..),
                    _ => random.u32(0..300),
                };
                let hostile = descriptor(address, len, random.u16(0..8), random.u16(0..20));
                ring.set_descriptor(&guest.driver.memory, index, hostile);
            }
            for _ in 0..random.u8(1..16) {
                ring.make_available(&guest.driver.memory, random.u16(0..18));
            }
            ring.kick_anyway();
        }
    }
    ClockDriver::connect(&rig).reads_the_hosts(UTC);
    vmm.undisturbed();
    assert!(rig.comes_to_rest(), "VUT_SEED={seed}");
}

#[test]
fn a_storm_of_kicks_disturbs_nobody() {
    let rig = both();
    let vmm = Vmm::at(&rig);
    let mut guest = ClockDriver::connect(&rig);
    let over = Arc::new(AtomicBool::new(false));
    let storms: Vec<_> = [REQUESTQ, ALARMQ]
        .map(|queue| {
            let kick = guest.driver.rings[usize::from(queue)].kick_fd();
            let (kick, over) = (kick.try_clone().unwrap(), Arc::clone(&over));
            thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let _ = kick.write(1);
                    thread::yield_now();
                }
            })
        })
        .into();
    for _ in 0..100 {
        guest.reads_the_hosts(UTC);
    }
    for _ in 0..20 {
        let base = guest.driver.stop(REQUESTQ);
        guest.driver.start_at(REQUESTQ, base);
        guest.reads_the_hosts(UTC);
    }
    over.store(true, Ordering::Relaxed);
    for storm in storms {
        storm.join().unwrap();
    }
    drop(guest);
    vmm.undisturbed();
}

/// A requestq whose available index runs away from the backend. By the return, the backend has
/// served more than a ringful.
fn endless(mut guest: ClockDriver, over: &Arc<AtomicBool>) -> JoinHandle<()> {
    let over = Arc::clone(over);
    let Driver { memory, rings, .. } = &mut guest.driver;
    let at = memory.allocate(64);
    memory.write(at, &set_alarm(UTC, 1, true));
    let ring = &mut rings[usize::from(REQUESTQ)];
    ring.set_descriptor(memory, 0, descriptor(at, 24, NEXT, 1));
    ring.set_descriptor(memory, 1, descriptor(at + 32, 8, WRITE, 0));
    for _ in 0..16 {
        ring.make_available(memory, 0);
    }
    ring.kick_anyway();
    let (served, is_served) = channel();
    let storm = thread::spawn(move || {
        let Driver { memory, rings, .. } = &mut guest.driver;
        let (mut served, mut last) = (Some(served), 0);
        while !over.load(Ordering::Relaxed) {
            let used = rings[0].used_index(memory);
            if used > 16
                && let Some(served) = served.take()
            {
                let _ = served.send(());
            }
            rings[0].set_avail_index(memory, used.wrapping_add(16));
            // Where the backend was faster, it waits for that.
            if used != last {
                rings[0].kick_anyway();
            }
            last = used;
        }
    });
    let is_served = is_served.recv_timeout(PATIENCE);
    is_served.expect("the ring is served");
    storm
}

#[test]
fn a_ring_that_never_ends_disturbs_nobody_and_keeps_no_signal_out() {
    let mut rig = both();
    let vmm = Vmm::at(&rig);
    let over = Arc::new(AtomicBool::new(false));
    let storm = endless(guest_with(&rig, 16), &over);
    let mut control = Control::over(rig.stream());
    vmm.undisturbed();
    // The VMM is gone, so the next one is served.
    control.message(GET_FEATURES, false, &[], &[]).unwrap();
    assert_eq!(control.reply().unwrap().0, GET_FEATURES);
    rig.backend.signal(Signal::TERM);
    let status = rig.backend.wait(PATIENCE);
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_thousand_guests_leave_no_descriptor_no_thread_and_no_memory_behind() {
    let rig = both();
    let vmm = Client::connect(&rig);
    let visit = |n: u32| {
        let mut guest = ClockDriver::connect_with(
            &rig,
            Setup {
                add_mem_reg: n.is_multiple_of(2),
                event_idx: n.is_multiple_of(3),
                features: F_ALARM * u64::from(!n.is_multiple_of(7)),
                ..Setup::default()
            },
        );
        guest.post_alarm_buffer();
        guest.raw(&set_alarm(UTC, u64::from(n), n.is_multiple_of(5)), 8);
        guest.read(UTC);
        if n.is_multiple_of(11) {
            guest.driver.stop(REQUESTQ);
        }
    };
    (0..50).for_each(visit);
    assert!(rig.comes_to_rest());
    let before = rig.usage();
    let (threads, fds) = (before.threads, before.fds);
    (0..1_000).for_each(visit);
    let after = rig.settled(threads, fds);
    assert_eq!((after.threads, after.fds), (threads, fds));
    let grown = after.anonymous_kib.saturating_sub(before.anonymous_kib);
    assert!(grown < 2_048, "{grown} KiB more");
    drop(vmm);
}
