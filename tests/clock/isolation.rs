//! What a guest can reach through the clock device: its clocks, and nothing of the timer device, whatever
//! it does; and the process behind the two sockets.

use std::collections::BTreeSet;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::process::Signal;
use tempfile::TempDir;
use vhost_user_timer_kit::backend_process::{BackendProcess, Devices};
use vhost_user_timer_kit::clock_driver::{
    ALARMQ, ClockDriver, F_ALARM, F_LOG_ALL, MONOTONIC, REQUESTQ, UTC, msg, proper, request,
    rtc_status, set_alarm,
};
use vhost_user_timer_kit::contract::{
    self, CNT, CTL, CVAL, Client, Info, VM, VmState, op, phase, status,
};
use vhost_user_timer_kit::raw_driver::{
    Control, Descriptor, Driver, INDIRECT, Memory, NEXT, PATIENCE, POISON, REGION_GPA, REGION_SIZE,
    REGION_VA, RING_EVENT_IDX, RING_INDIRECT, Rig, Ring, Setup, VERSION_1, WRITE, seed,
};

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;

fn both() -> Rig {
    Rig::launch_devices(Devices::TimerAndClock, &[])
}

fn bits(mask: u64) -> BTreeSet<u32> {
    (0..64).filter(|bit| mask >> bit & 1 == 1).collect()
}

#[test]
fn the_features_are_exactly_those_of_a_clock() {
    let rig = both();
    let mut control = Control::over(rig.clock_stream());
    // Unfiltered by a library.
    let mut ask = |code| {
        control.message(code, false, &[], &[]).unwrap();
        let (answered, body) = control.reply().unwrap();
        assert_eq!(answered, code);
        u64::from_le_bytes(body.try_into().unwrap())
    };
    let protocol_features = 1 << 30;
    let common = VERSION_1 | RING_INDIRECT | RING_EVENT_IDX | protocol_features;
    assert_eq!(bits(ask(GET_FEATURES)), bits(common | F_ALARM | F_LOG_ALL));
    // MQ, LOG_SHMFD, REPLY_ACK, RESET_DEVICE, CONFIGURE_MEM_SLOTS, DEVICE_STATE; no CONFIG.
    let offered = bits(ask(GET_PROTOCOL_FEATURES));
    assert_eq!(offered, BTreeSet::from([0, 1, 3, 13, 15, 19]));
    drop(control);

    let mut control = Control::negotiated(rig.clock_stream(), common);
    assert_eq!(control.ask(GET_QUEUE_NUM, &[], &[]).unwrap(), 2);
}

/// What of a VM must not change.
fn at_rest(timer: &mut Client) -> (Info, VmState) {
    (timer.info().at_rest(), timer.state().at_rest(false))
}

#[test]
fn the_timer_devices_operations_are_nothing_to_it() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    timer.configure(2);
    timer.set(0, &[(CNT, 1 << 40), (CVAL, 77), (CTL, 1)]);
    let before = at_rest(&mut timer);
    let mut guest = ClockDriver::connect(&rig);
    for (op, _, body) in op::ALL {
        for vcpu in [0, 1, VM] {
            for epoch in [0, timer.info().epoch] {
                let bytes = contract::request(op, vcpu, epoch, &vec![0; body]);
                let used = guest.raw(&bytes, 8_192);
                let code = used.bytes()[0];
                if op != msg::READ && op != msg::READ_CROSS {
                    assert_eq!(code, rtc_status::EOPNOTSUPP, "{op:#x}");
                    assert_eq!(used.len, 8);
                } else if vcpu != 0 {
                    // By chance its code is one of the clock's; then a vCPU is what is reserved there.
                    let refused = [rtc_status::EINVAL, rtc_status::ENODEV];
                    assert!(refused.contains(&code), "{op:#x}: {code}");
                }
                guest.reads_the_hosts(UTC);
            }
        }
    }
    assert_eq!(at_rest(&mut timer), before);
}

#[test]
fn the_clocks_messages_are_nothing_to_the_timer_device() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    timer.configure(1);
    let mut guest = ClockDriver::connect(&rig);
    guest.set_alarm(UTC, 1 << 62, true);
    let before = at_rest(&mut timer);
    for (msg_type, ..) in msg::ALL {
        for bytes in [proper(msg_type, UTC), set_alarm(UTC, 1, true)] {
            let answer = timer.raw(&bytes, 80);
            assert_ne!(answer.status, status::OK, "{msg_type:#x}");
        }
    }
    assert_eq!(at_rest(&mut timer), before);
    assert_eq!(guest.read_alarm(UTC), Ok((1 << 62, true)));
}

#[test]
fn an_address_means_the_memory_of_the_connection_that_names_it() {
    let rig = both();
    let mut timer = Client::connect(&rig);
    timer.configure(1);
    let mut guest = ClockDriver::connect(&rig);
    // The same addresses in both.
    let (ask, answer) = (
        REGION_GPA + REGION_SIZE / 2,
        REGION_GPA + REGION_SIZE / 2 + 4_096,
    );
    let info = contract::request(op::GET_INFO, VM, 0, &[]);
    timer.driver.memory.write(ask, &info);
    timer.driver.memory.write(answer, &[POISON; 80]);
    guest.driver.memory.write(ask, &request(msg::CFG, 8, &[]));
    guest.driver.memory.write(answer, &[POISON; 80]);
    let add = |driver: &mut Driver, queue: u16, len| {
        let ring = &mut driver.rings[usize::from(queue)];
        let first = descriptor(ask, len, NEXT, 101);
        ring.set_descriptor(&driver.memory, 100, first);
        ring.set_descriptor(&driver.memory, 101, descriptor(answer, 80, WRITE, 0));
        let before = ring.used_index(&driver.memory);
        ring.make_available(&driver.memory, 100);
        ring.kick_anyway();
        before
    };
    let served = |driver: &Driver, queue: u16, before| {
        driver.rings[usize::from(queue)].used_index(&driver.memory) != before
    };
    let before = add(&mut guest.driver, REQUESTQ, 8);
    while !served(&guest.driver, REQUESTQ, before) {
        thread::yield_now();
    }
    let written = guest.driver.memory.read(answer, 80);
    assert_eq!((written[0], written[8]), (rtc_status::OK, 2));
    assert_eq!(timer.driver.memory.read(answer, 80), [POISON; 80]);

    let before = add(&mut timer.driver, 1, 16);
    while !served(&timer.driver, 1, before) {
        thread::yield_now();
    }
    let info = Info::of(&timer.driver.memory.read(answer, 80)[16..]);
    assert_eq!((info.phase, info.vcpus), (phase::PAUSED, 1));
    assert_eq!(guest.driver.memory.read(answer, 80), written);
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

/// A VMM that makes requests all the time, and sees that its VM is as it left it.
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

    /// All was as it should be, and still is.
    #[track_caller]
    fn undisturbed(self) {
        let rounds = || self.rounds.load(Ordering::Relaxed);
        let (before, deadline) = (rounds(), Instant::now() + PATIENCE);
        while rounds() < before + 20 && !self.thread.is_finished() {
            assert!(Instant::now() < deadline, "the VMM waits");
            thread::yield_now();
        }
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

/// Does this to a ring of a guest that has an alarm to be told, and sees that the process goes on.
#[track_caller]
fn attack(rig: &Rig, what: &str, queue: u16, act: impl Fn(&mut Memory, &mut Ring)) {
    let mut guest = guest_with(rig, 16);
    guest.set_alarm(UTC, 1, true);
    let ring = usize::from(queue);
    act(&mut guest.driver.memory, &mut guest.driver.rings[ring]);
    for _ in 0..3 {
        guest.driver.rings[ring].kick_anyway();
    }
    if queue == ALARMQ {
        // The other queue is served.
        guest.settle();
    }
    // And this one, when it is started anew.
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

/// A requestq whose available index runs away from whoever serves it.
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
    thread::spawn(move || {
        let Driver { memory, rings, .. } = &mut guest.driver;
        while !over.load(Ordering::Relaxed) {
            let index = rings[0].used_index(memory).wrapping_add(16);
            rings[0].set_avail_index(memory, index);
        }
    })
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

/// A backend on a pair's end for each device that has one, or on a listening socket.
struct OnSockets {
    rig: Rig,
    timer: Option<UnixStream>,
    clock: Option<UnixStream>,
    folder: TempDir,
}

/// What a device is served on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Connected,
    Listening,
}

fn launch_on(timer: Option<End>, clock: Option<End>) -> OnSockets {
    let folder = TempDir::new().unwrap();
    let mut ends = [(timer, "timer"), (clock, "clock")].map(|(end, name)| match end {
        None => (None, None),
        Some(End::Connected) => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            (Some(ours), Some(theirs.into()))
        }
        Some(End::Listening) => {
            let path = folder.path().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            let ours = UnixStream::connect(path).unwrap();
            (Some(ours), Some(listener.into()))
        }
    });
    let [(ours_timer, theirs_timer), (ours_clock, theirs_clock)] = &mut ends;
    let backend =
        BackendProcess::launch_on_sockets::<&str>(theirs_timer.take(), theirs_clock.take(), &[]);
    OnSockets {
        rig: Rig::watch(backend.expect("a backend")),
        timer: ours_timer.take(),
        clock: ours_clock.take(),
        folder,
    }
}

impl OnSockets {
    fn timer(&mut self) -> Client {
        Client::over(self.timer.take().expect("a timer device"))
    }

    fn guest(&mut self) -> ClockDriver {
        let stream = self.clock.take().expect("a clock device");
        ClockDriver::over(stream, ClockDriver::setup())
    }
}

#[test]
fn a_connected_socket_alone_is_served_in_full_and_its_end_is_the_programs() {
    let mut served = launch_on(None, Some(End::Connected));
    let mut guest = served.guest();
    guest.reads_the_hosts(UTC);
    guest.post_alarm_buffer();
    guest.set_alarm(UTC, 1, true);
    assert_eq!(guest.notified(), UTC);
    drop(guest);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_listening_socket_serves_one_guest_after_the_other() {
    let mut served = launch_on(None, Some(End::Listening));
    let path = served.folder.path().join("clock");
    served.guest().reads_the_hosts(UTC);
    for _ in 0..3 {
        let stream = UnixStream::connect(&path).unwrap();
        ClockDriver::over(stream, ClockDriver::setup()).reads_the_hosts(UTC);
    }
    assert_eq!(served.rig.backend.terminate().code(), Some(0));
    assert!(path.exists(), "whoever bound it removes it");
}

#[test]
fn with_two_connected_sockets_the_last_ones_end_is_the_programs() {
    let connected = Some(End::Connected);
    let mut served = launch_on(connected, connected);
    let (mut timer, mut guest) = (served.timer(), served.guest());
    timer.configure(1);
    guest.reads_the_hosts(UTC);
    drop(timer);
    served
        .rig
        .log_with("The frontend of the timer device disconnected");
    for _ in 0..20 {
        guest.reads_the_hosts(UTC);
    }
    drop(guest);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));

    let mut served = launch_on(connected, connected);
    let (mut timer, guest) = (served.timer(), served.guest());
    timer.configure(1);
    drop(guest);
    served
        .rig
        .log_with("The frontend of the clock device disconnected");
    for _ in 0..20 {
        timer.settle();
    }
    drop(timer);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn beside_a_listening_socket_the_connected_ones_end_is_the_programs() {
    let mut served = launch_on(Some(End::Listening), Some(End::Connected));
    let (mut timer, mut guest) = (served.timer(), served.guest());
    timer.configure(1);
    guest.reads_the_hosts(UTC);
    drop(guest);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));

    let mut served = launch_on(Some(End::Connected), Some(End::Listening));
    let (mut timer, mut guest) = (served.timer(), served.guest());
    timer.configure(1);
    guest.reads_the_hosts(UTC);
    drop(timer);
    assert_eq!(served.rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_signal_ends_it_with_both_connected() {
    for end in [End::Connected, End::Listening] {
        let mut served = launch_on(Some(end), Some(end));
        let (mut timer, mut guest) = (served.timer(), served.guest());
        timer.configure(1);
        guest.set_alarm(UTC, u64::MAX, true);
        assert_eq!(served.rig.backend.terminate().code(), Some(0));
    }
}
