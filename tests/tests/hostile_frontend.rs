//! Frontends that break every rule. Whatever they do, the process lives, comes to rest, gives
//! its descriptors and threads back, serves the next frontend, and its VM is as it was.
//!
//! Run against the release build where there is one: `vhost-user-backend` has overflow checks
//! that only a debug build makes.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_tests::contract::{
    CNT, CTL, CVAL, Client, Info, VM, VmState, op, pause_body, request,
};
use vhost_user_timer_tests::raw_driver::{
    Control, Descriptor, Driver, INDIRECT, Layout, Memory, NEXT, PATIENCE, REGION_GPA, REGION_SIZE,
    REGION_VA, Rig, Ring, Setup, Usage, WRITE, fd_of, header, release_program, seed,
};

// Message codes of the control channel.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const RESET_DEVICE: u32 = 34;
const ADD_MEM_REG: u32 = 37;

const VIRTIO_FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;

/// A backend with a VM in it that nobody may change.
struct Victim {
    rig: Rig,
    info: Info,
    state: VmState,
    usage: Usage,
}

impl Victim {
    fn launch() -> Self {
        let rig = Rig::launch_release(&["--request-queues=2", "--log-level=error"]);
        let mut client = Client::connect(&rig);
        client.configure(2);
        client.set(0, &[(CTL, 1), (CVAL, 1 << 40), (CNT, 1 << 30)]);
        let (info, state) = (client.info().at_rest(), client.state().at_rest(false));
        drop(client);
        // Warm: what is made once is made.
        for _ in 0..3 {
            Client::connect(&rig).info();
        }
        assert!(rig.comes_to_rest());
        let usage = rig.usage();
        assert_eq!(usage.threads, 1, "between frontends there is one thread");
        Victim {
            rig,
            info,
            state,
            usage,
        }
    }

    fn driver(&self) -> Driver {
        self.rig.connect_with(Setup {
            queues: 3,
            size: 16,
            ..Setup::default()
        })
    }

    fn control(&self) -> Control {
        Control::over(self.rig.stream())
    }

    /// A connection on which features are negotiated and nothing else.
    fn negotiated(&self) -> Control {
        let mut control = self.control();
        control.message(SET_OWNER, false, &[], &[]).unwrap();
        control.message(GET_FEATURES, false, &[], &[]).unwrap();
        control.reply().unwrap();
        let code = GET_PROTOCOL_FEATURES;
        control.message(code, false, &[], &[]).unwrap();
        let (_, offered) = control.reply().unwrap();
        let code = SET_PROTOCOL_FEATURES;
        control.message(code, false, &offered, &[]).unwrap();
        assert_eq!(
            control.ask(SET_FEATURES, &[VIRTIO_FEATURES], &[]).unwrap(),
            0
        );
        control
    }

    /// The process lives and serves, and its VM is as it was.
    #[track_caller]
    fn unharmed(&self) {
        let mut client = Client::connect(&self.rig);
        assert_eq!(client.info().at_rest(), self.info);
        assert_eq!(client.state().at_rest(false), self.state);
        drop(client);
        let usage = self.rig.settled(self.usage.threads, self.usage.fds);
        assert_eq!(usage.threads, self.usage.threads, "threads");
        assert_eq!(usage.fds, self.usage.fds, "descriptors");
        assert!(self.rig.comes_to_rest(), "it spins with nobody there");
    }
}

fn blocking_eventfd(value: u32) -> OwnedFd {
    eventfd(value, EventfdFlags::CLOEXEC).unwrap()
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("hostile", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Two 32-bit halves, as SET_VRING_NUM and the like have them.
fn pair(index: u32, value: u32) -> u64 {
    u64::from(index) | u64::from(value) << 32
}

// Garbage on the control channel.

#[test]
fn thousands_of_malformed_messages_do_no_harm() {
    let seed = seed();
    println!("VUT_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let victim = Victim::launch();
    let (_, release) = release_program().unwrap();
    let files = [
        blocking_eventfd(0),
        memfd(0x1000).into(),
        std::io::pipe().unwrap().0.into(),
        File::open("/dev/null").unwrap().into(),
        UnixStream::pair().unwrap().0.into(),
    ];
    let mut messages = 0;
    while messages < 6000 {
        let control = victim.control();
        if random.u8(0..4) != 0 {
            // Further in: every feature there is.
            let _ = control.message(SET_OWNER, false, &[], &[]);
            let _ = control.message(GET_FEATURES, false, &[], &[]);
            let all = u64::MAX.to_le_bytes();
            let _ = control.message(SET_PROTOCOL_FEATURES, false, &all, &[]);
            let features = VIRTIO_FEATURES.to_le_bytes();
            let _ = control.message(SET_FEATURES, false, &features, &[]);
        }
        for _ in 0..random.usize(1..12) {
            messages += 1;
            let mut code = random.u32(0..48);
            if code == RESET_DEVICE {
                // Valid wherever it comes.
                code = SET_MEM_TABLE;
            }
            let body: Vec<u8> = match random.u8(0..4) {
                0 => (0..random.usize(0..64)).map(|_| random.u8(..)).collect(),
                1 => words(&[pair(random.u32(0..4), random.u32(0..70_000))]),
                2 => {
                    // Shaped like memory regions and ring addresses.
                    let count = *random.choice(&[1, 2, 4, 5, 8, 9, 33]).unwrap();
                    let mask = if release { u64::MAX } else { u64::MAX >> 16 };
                    let mut body = vec![u64::from(random.u8(0..4))];
                    body.extend((1..=count).map(|_| match random.u8(0..4) {
                        0 => 0x1000 * random.u64(0..16),
                        1 => random.u64(..) & mask,
                        2 => 0x4000_0000,
                        _ => mask,
                    }));
                    words(&body)
                }
                _ => vec![],
            };
            let fds: Vec<BorrowedFd<'_>> = (0..*random.choice(&[0, 0, 0, 1, 1, 2, 9, 40]).unwrap())
                .map(|_| random.choice(&files).unwrap().as_fd())
                .collect();
            let announced = match random.u8(0..6) {
                0 => random.u32(..),
                1 => random.u32(0..5000),
                _ => body.len() as u32,
            };
            let mut bytes = header(code, random.bool(), announced).to_vec();
            if random.u8(0..8) == 0 {
                bytes[4..8].copy_from_slice(&random.u32(..).to_le_bytes());
            }
            bytes.extend(body);
            if random.u8(0..8) == 0 {
                bytes.truncate(random.usize(1..=bytes.len()));
            }
            if control.send(&bytes, &fds).is_err() {
                break;
            }
        }
    }
    victim.unharmed();
}

#[test]
fn a_message_cut_short_anywhere_and_then_the_end_does_no_harm() {
    let victim = Victim::launch();
    let memory = Memory::new();
    let mut bytes = header(SET_MEM_TABLE, true, 40).to_vec();
    bytes.extend(words(&[1, REGION_GPA, REGION_SIZE, REGION_VA, 0]));
    for len in 1..bytes.len() {
        for fds in [&[][..], &[memory.file().as_fd()]] {
            let mut control = victim.control();
            control.send(&bytes[..len], fds).unwrap();
            control.finish();
            control.wait_for_end();
        }
    }
    victim.unharmed();
}

#[test]
fn a_frontend_that_says_nothing_or_reads_nothing_does_not_keep_the_next_one_out_for_long() {
    let victim = Victim::launch();
    drop(victim.rig.stream());
    let control = victim.control();
    // Until nothing more fits: it reads none of the answers.
    let stream = victim.rig.stream();
    stream.set_nonblocking(true).unwrap();
    let greedy = Control::over(stream);
    drop(control);
    while greedy.message(GET_FEATURES, false, &[], &[]).is_ok() {}
    drop(greedy);
    victim.unharmed();
}

#[test]
fn more_descriptors_than_belong_to_a_message_are_closed_again() {
    let victim = Victim::launch();
    let file = memfd(0x1000);
    let many = vec![file.as_fd(); 250];
    for code in [GET_FEATURES, SET_MEM_TABLE, SET_VRING_KICK, ADD_MEM_REG, 99] {
        for fds in [&many[..1], &many[..2], &many[..32], &many[..33], &many] {
            let mut control = victim.control();
            let _ = control.message(code, false, &[0; 8], fds);
            control.finish();
            control.wait_for_end();
        }
    }
    victim.unharmed();
}

// Hostile values in messages that are well-formed.

#[test]
fn ring_sizes_that_no_ring_has_do_no_harm() {
    let victim = Victim::launch();
    for num in [
        0,
        3,
        7,
        1000,
        1023,
        1025,
        2048,
        0x1_0000,
        0x1_0010,
        u32::MAX,
    ] {
        let mut control = victim.negotiated();
        let _ = control.ask(SET_VRING_NUM, &[pair(1, num)], &[]);
    }
    // Accepted or not, such a ring is not a way in.
    for num in [3u16, 1000] {
        let mut driver = victim.driver();
        driver.stop(1);
        let _ = driver.control.set_vring_num(1, num);
        drop(driver);
    }
    victim.unharmed();
}

#[test]
fn queues_that_there_are_not_do_no_harm() {
    let victim = Victim::launch();
    let fd = blocking_eventfd(0);
    for index in [3, 16, 17, 63, 64, 255, 256, u32::MAX] {
        for code in [SET_VRING_NUM, SET_VRING_BASE, 11, SET_VRING_ENABLE] {
            let mut control = victim.negotiated();
            let _ = control.ask(code, &[pair(index, 1)], &[]);
        }
        for code in [SET_VRING_KICK, SET_VRING_CALL, 14] {
            let mut control = victim.negotiated();
            let _ = control.ask(code, &[index.into()], &[fd.as_fd()]);
        }
    }
    victim.unharmed();
}

#[test]
fn rings_that_start_at_a_random_base_come_to_rest() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let victim = Victim::launch();
    for _ in 0..20 {
        let mut driver = victim.driver();
        driver.stop(1);
        let base = random.u16(1..);
        driver.start_at(1, base);
        driver.rings[1].kick_anyway();
        driver.rings[0].kick_anyway();
        assert!(victim.rig.comes_to_rest(), "VUT_SEED={seed} base {base}");
        still_serves(&mut driver, 2);
    }
    victim.unharmed();
}

#[test]
fn rings_at_addresses_where_they_cannot_be_do_no_harm() {
    let victim = Victim::launch();
    let end = REGION_VA + REGION_SIZE;
    let good = REGION_VA;
    for bad in [
        0,
        1,
        REGION_VA - 1,
        end - 16,
        end - 2,
        end,
        u64::MAX,
        u64::MAX - 15,
        good + 1,
    ] {
        for place in 0..3 {
            let mut driver = victim.driver();
            driver.stop(1);
            let mut config = driver.rings[1].config();
            match place {
                0 => config.desc_table_addr = bad,
                1 => config.avail_ring_addr = bad,
                _ => config.used_ring_addr = bad,
            }
            if driver.control.set_vring_addr(1, &config).is_ok() {
                let ring = &driver.rings[1];
                driver.control.set_vring_call(1, ring.call()).unwrap();
                driver.control.set_vring_kick(1, ring.kick_fd()).unwrap();
                ring.kick_anyway();
                still_serves(&mut driver, 2);
            }
        }
    }
    victim.unharmed();
}

#[test]
fn rings_that_lie_upon_each_other_do_no_harm() {
    let victim = Victim::launch();
    let mut driver = victim.driver();
    driver.stop(1);
    let mut config = driver.rings[1].config();
    config.avail_ring_addr = config.desc_table_addr;
    config.used_ring_addr = config.desc_table_addr;
    driver.control.set_vring_addr(1, &config).unwrap();
    driver.control.set_vring_base(1, 0).unwrap();
    let ring = &driver.rings[1];
    driver.memory.write(ring.descriptors_at(), &[1; 64]);
    driver.control.set_vring_call(1, ring.call()).unwrap();
    driver.control.set_vring_kick(1, ring.kick_fd()).unwrap();
    ring.kick_anyway();
    assert!(victim.rig.comes_to_rest());
    still_serves(&mut driver, 2);
    drop(driver);
    victim.unharmed();
}

// Hostile memory.

#[test]
fn memory_regions_that_make_no_sense_do_no_harm() {
    let victim = Victim::launch();
    let (_, release) = release_program().unwrap();
    let file = memfd(0x10_0000);
    let fd = file.as_fd();
    let mut regions = vec![
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0x1000, 0, 1],
        [0x1000, 0x1000, 0, !0xfff],
        [0x1000, 1 << 46, 0, 0],
        [0x1000, 1 << 62, 0, 0],
        [0x1000, i64::MAX as u64, 0, 0],
        [0x1000, u64::MAX, 0, 0],
        [u64::MAX, 0x1000, 0, 0],
        [u64::MAX - 0xfff, 0x1000, 0, 0],
    ];
    if release {
        // `vhost-user-backend` adds these without looking, and a debug build panics.
        regions.push([0, 0x1000, u64::MAX - 0xff, 0]);
        regions.push([0, 0x1000, u64::MAX, 0]);
    }
    for region in regions {
        let mut control = victim.negotiated();
        let table = [&[1], &region[..]].concat();
        let _ = control.ask(SET_MEM_TABLE, &table, &[fd]);
        drop(control);
        let mut control = victim.negotiated();
        let single = [&[0], &region[..]].concat();
        if control.ask(ADD_MEM_REG, &single, &[fd]).is_ok() {
            let addresses = [1, region[2], region[2], region[2], 0];
            let _ = control.ask(SET_VRING_ADDR, &addresses, &[]);
        }
    }
    victim.unharmed();
}

#[test]
fn overlapping_memory_regions_do_no_harm() {
    let victim = Victim::launch();
    let file = memfd(0x10_0000);
    let fd = file.as_fd();
    for second in [0x1000, 0x2000, 0x8000, 0x1_0fff] {
        let mut control = victim.negotiated();
        let first = [0x1000, 0x1_0000, REGION_VA, 0];
        let second = [second, 0x1_0000, REGION_VA + 0x8000, 0];
        let table = [&[2], &first[..], &second[..]].concat();
        let _ = control.ask(SET_MEM_TABLE, &table, &[fd, fd]);
        drop(control);
        let mut control = victim.negotiated();
        for region in [first, second, first] {
            if control
                .ask(ADD_MEM_REG, &[&[0], &region[..]].concat(), &[fd])
                .is_err()
            {
                break;
            }
        }
    }
    victim.unharmed();
}

#[test]
fn as_many_memory_regions_as_one_likes_are_given_back() {
    let victim = Victim::launch();
    let file = memfd(0x1000);
    let mut control = victim.negotiated();
    for n in 0..700u64 {
        let region = [0, n << 20, 0x1000, REGION_VA + (n << 20), 0];
        match control.ask(ADD_MEM_REG, &region, &[file.as_fd()]) {
            Ok(0) => {}
            _ => break,
        }
    }
    drop(control);
    victim.unharmed();
}

#[test]
fn what_cannot_be_mapped_is_no_memory() {
    let victim = Victim::launch();
    let pipe = std::io::pipe().unwrap();
    let null = File::open("/dev/null").unwrap();
    let folder = File::open("/").unwrap();
    let event = blocking_eventfd(0);
    let file = memfd(0x1000);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let read_only = File::open(path).unwrap();
    let fds = [
        pipe.0.as_fd(),
        null.as_fd(),
        folder.as_fd(),
        event.as_fd(),
        read_only.as_fd(),
    ];
    for fd in fds {
        for code in [SET_MEM_TABLE, ADD_MEM_REG] {
            let mut control = victim.negotiated();
            let region = [1, 0x1000, 0x1000, REGION_VA, 0];
            let _ = control.ask(code, &region, &[fd]);
        }
    }
    victim.unharmed();
}

#[test]
fn a_region_longer_than_its_file_is_refused_before_anything_touches_it() {
    // What lies past the end of a file is SIGBUS to whoever reads it.
    let victim = Victim::launch();
    for (len, offset) in [
        (0, 0),
        (0x1000, 0),
        (0x10_0000, 0x10_0000),
        (REGION_SIZE - 1, 0),
    ] {
        let file = memfd(len);
        for code in [SET_MEM_TABLE, ADD_MEM_REG] {
            let mut control = victim.negotiated();
            let region = [1, REGION_GPA, REGION_SIZE, REGION_VA, offset];
            let refused = control.ask(code, &region, &[file.as_fd()]);
            assert!(!matches!(refused, Ok(0)), "{len:#x} bytes in the file");
            // Whatever was said of it.
            for place in [0, 0x2000, REGION_SIZE - 0x1_0000] {
                let at = REGION_VA + place;
                let _ = control.ask(SET_VRING_ADDR, &[1, at, at, at, 0], &[]);
            }
        }
        victim.unharmed();
    }
}

#[test]
fn memory_that_is_taken_away_under_a_running_ring_stops_the_ring() {
    let victim = Victim::launch();
    let mut driver = victim.rig.connect_with(Setup {
        queues: 3,
        size: 16,
        add_mem_reg: true,
        ..Setup::default()
    });
    let wait = request(op::WAIT_RUN, 0, 0, &[]);
    driver.submit(1, &wait, 56, &Layout::plain());
    driver.call(1, &request(op::GET_INFO, VM, 0, &[]), 80, &Layout::plain());
    let region = driver.memory.region();
    driver.control.remove_mem_region(&region).unwrap();
    for ring in &driver.rings {
        ring.kick_anyway();
    }
    assert!(victim.rig.comes_to_rest());
    // What the ring holds goes nowhere, and that is all.
    for queue in 0..3 {
        driver.stop(queue);
    }
    driver.control.add_mem_region(&region).unwrap();
    driver.start(2);
    still_serves(&mut driver, 2);
    drop(driver);
    victim.unharmed();
}

#[test]
fn memory_that_is_replaced_under_held_requests_is_not_written_out_of_bounds() {
    let victim = Victim::launch();
    let mut driver = victim.driver();
    let wait = request(op::WAIT_RUN, 0, 0, &[]);
    driver.submit(1, &wait, 56, &Layout::plain());
    driver.call(1, &request(op::GET_INFO, VM, 0, &[]), 80, &Layout::plain());
    // The rings are in it, the buffers are not.
    let mut smaller = driver.memory.region();
    smaller.memory_size = 0x4_0000;
    driver.control.set_mem_table(&[smaller]).unwrap();
    driver.stop(1);
    drop(driver);
    victim.unharmed();
}

// Hostile rings.

/// A queue of the connection works as it should.
#[track_caller]
fn still_serves(driver: &mut Driver, queue: u16) {
    let info = request(op::GET_INFO, VM, 0, &[]);
    for _ in 0..3 {
        let used = driver.call(queue, &info, 80, &Layout::plain());
        assert_eq!(used.len, 80);
    }
}

/// Does this to queue 1 and sees that the rest of the connection, and everything else, goes on.
#[track_caller]
fn attack(victim: &Victim, what: &str, act: impl FnOnce(&mut Memory, &mut Ring)) {
    let mut driver = victim.driver();
    still_serves(&mut driver, 1);
    act(&mut driver.memory, &mut driver.rings[1]);
    driver.rings[1].kick_anyway();
    assert!(victim.rig.comes_to_rest(), "{what}: it spins");
    still_serves(&mut driver, 2);
    // Kicked again and again, it is no different.
    driver.rings[1].kick_anyway();
    still_serves(&mut driver, 2);
    // And the queue itself can be started anew.
    driver.stop(1);
    driver.start(1);
    still_serves(&mut driver, 1);
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

/// A buffer with RESUME in it, which must not take place.
fn resume(memory: &mut Memory) -> u64 {
    let at = memory.allocate(64);
    memory.write(at, &request(op::RESUME, VM, 0, &[]));
    at
}

#[test]
fn an_available_index_that_jumps_comes_to_rest() {
    let victim = Victim::launch();
    for jump in [17, 18, 1000, 0x7fff, 0x8000, 0xffff] {
        attack(&victim, &format!("a jump by {jump}"), |memory, ring| {
            ring.set_avail_index(memory, ring.next_avail().wrapping_add(jump));
        });
    }
    victim.unharmed();
}

#[test]
fn chains_that_loop_come_to_rest() {
    let victim = Victim::launch();
    for flags in [NEXT, NEXT | WRITE] {
        for (len, second) in [(0, 0), (1, 0), (64, 0), (u32::MAX, 0), (64, 5), (0x8000, 5)] {
            let what = format!("a loop of {len} bytes over {second}, flags {flags}");
            attack(&victim, &what, |memory, ring| {
                let at = resume(memory);
                ring.set_descriptor(memory, 0, descriptor(at, len, flags, second));
                ring.set_descriptor(memory, 5, descriptor(at, len, flags, 0));
                ring.make_available(memory, 0);
            });
        }
    }
    victim.unharmed();
}

#[test]
fn chains_that_lead_out_of_the_table_come_to_rest() {
    let victim = Victim::launch();
    for next in [16, 17, 255, 0x7fff, 0xffff] {
        attack(&victim, &format!("next is {next}"), |memory, ring| {
            let at = resume(memory);
            ring.set_descriptor(memory, 0, descriptor(at, 16, NEXT, next));
            ring.make_available(memory, 0);
        });
        attack(&victim, &format!("the head is {next}"), |memory, ring| {
            ring.make_available(memory, next);
        });
    }
    victim.unharmed();
}

#[test]
fn buffers_outside_the_shared_memory_are_neither_read_nor_written() {
    let victim = Victim::launch();
    let end = REGION_GPA + REGION_SIZE;
    for address in [
        0,
        REGION_GPA - 1,
        end - 8,
        end,
        1 << 52,
        u64::MAX,
        u64::MAX - 15,
        REGION_VA,
    ] {
        for len in [16, 4096, 0x4_0000, u32::MAX] {
            attack(
                &victim,
                &format!("{len} from {address:#x}"),
                |memory, ring| {
                    let at = resume(memory);
                    // Read from there; and write there.
                    ring.set_descriptor(memory, 0, descriptor(address, len, NEXT, 1));
                    ring.set_descriptor(memory, 1, descriptor(at, 64, WRITE, 0));
                    ring.set_descriptor(memory, 2, descriptor(at, 16, NEXT, 3));
                    ring.set_descriptor(memory, 3, descriptor(address, len, WRITE, 0));
                    ring.make_available(memory, 0);
                    ring.make_available(memory, 2);
                },
            );
        }
    }
    victim.unharmed();
}

#[test]
fn the_same_chain_made_available_twice_comes_to_rest() {
    let victim = Victim::launch();
    for op in [op::WAIT_RUN, op::GET_REG_LIST] {
        attack(&victim, &format!("twice {op:#x}"), |memory, ring| {
            let at = memory.allocate(256);
            memory.write(at, &request(op, 0, 0, &[]));
            ring.set_descriptor(memory, 0, descriptor(at, 16, NEXT, 1));
            ring.set_descriptor(memory, 1, descriptor(at + 16, 64, WRITE, 0));
            for _ in 0..16 {
                ring.make_available(memory, 0);
            }
        });
    }
    victim.unharmed();
}

#[test]
fn indirect_tables_that_make_no_sense_come_to_rest() {
    let victim = Victim::launch();
    let end = REGION_GPA + REGION_SIZE;
    for len in [
        0,
        1,
        15,
        17,
        16,
        160,
        16 * 0xffff,
        16 * 0x1_0000,
        !15,
        u32::MAX,
    ] {
        for place in [0u64, end - 16, end, u64::MAX - 15] {
            attack(
                &victim,
                &format!("a table of {len} at {place:#x}"),
                |memory, ring| {
                    ring.set_descriptor(memory, 0, descriptor(place, len, INDIRECT, 0));
                    ring.make_available(memory, 0);
                },
            );
        }
    }
    for flags in [
        INDIRECT,
        INDIRECT | NEXT,
        INDIRECT | WRITE,
        INDIRECT | NEXT | WRITE,
    ] {
        attack(
            &victim,
            &format!("a table in a table, {flags}"),
            |memory, ring| {
                let at = resume(memory);
                let table = memory.allocate(64);
                let inner = descriptor(table, 64, flags, 0);
                memory.write(table, &inner.to_bytes());
                memory.write(table + 16, &descriptor(at, 64, WRITE, 0).to_bytes());
                ring.set_descriptor(memory, 0, descriptor(table, 64, flags, 0));
                ring.make_available(memory, 0);
            },
        );
        attack(
            &victim,
            &format!("a loop in a table, {flags}"),
            |memory, ring| {
                let at = resume(memory);
                let table = memory.allocate(0x1_0000);
                for slot in 0..0x1000u64 {
                    let next = (slot as u16 + 1) % 0x1000;
                    let turn = descriptor(at, 64, NEXT | (slot as u16 % 2 * WRITE), next);
                    memory.write(table + 16 * slot, &turn.to_bytes());
                }
                ring.set_descriptor(memory, 0, descriptor(table, 0x1_0000, flags, 0));
                ring.make_available(memory, 0);
            },
        );
    }
    victim.unharmed();
}

#[test]
fn answers_into_the_ring_itself_come_to_rest() {
    let victim = Victim::launch();
    let places: [fn(&Ring) -> u64; 3] = [Ring::descriptors_at, Ring::avail_at, Ring::used_at];
    for (n, place) in places.into_iter().enumerate() {
        attack(&victim, &format!("ring part {n}"), |memory, ring| {
            let at = memory.allocate(16);
            memory.write(at, &request(op::GET_INFO, VM, 0, &[]));
            ring.set_descriptor(memory, 0, descriptor(at, 16, NEXT, 1));
            ring.set_descriptor(memory, 1, descriptor(place(ring), 80, WRITE, 0));
            ring.make_available(memory, 0);
        });
    }
    victim.unharmed();
}

#[test]
fn hostile_buffers_on_the_event_queue_come_to_rest() {
    let victim = Victim::launch();
    for (address, len, flags) in [
        (0, 32, WRITE),
        (REGION_GPA, 32, 0),
        (REGION_GPA, u32::MAX, WRITE),
        (u64::MAX, u32::MAX, WRITE),
        (REGION_GPA, 16, INDIRECT),
        (REGION_GPA, 0, WRITE),
    ] {
        let mut driver = victim.driver();
        driver.call(1, &request(op::RESUME, VM, 0, &[]), 56, &Layout::plain());
        let ring = &mut driver.rings[0];
        for head in 0..8 {
            let bad = descriptor(address, len, flags, 0);
            ring.set_descriptor(&driver.memory, head, bad);
            ring.make_available(&driver.memory, head);
        }
        ring.kick_anyway();
        assert!(victim.rig.comes_to_rest());
        let jump = ring.next_avail().wrapping_add(99);
        ring.set_avail_index(&driver.memory, jump);
        ring.kick_anyway();
        assert!(victim.rig.comes_to_rest());
        still_serves(&mut driver, 2);
        // As it was: paused, at the count from before.
        let pause = request(op::PAUSE, VM, 0, &pause_body(0));
        driver.call(1, &pause, 56, &Layout::plain());
        let set = vhost_user_timer_tests::contract::regs_body(&[(CNT, 1 << 30)]);
        let set = request(op::SET_REGS, 0, 0, &set);
        driver.call(1, &set, 24, &Layout::plain());
    }
    victim.unharmed();
}

#[test]
fn random_bytes_for_a_ring_come_to_rest() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let victim = Victim::launch();
    for n in 0..200 {
        let mut driver = victim.driver();
        let ring = &mut driver.rings[1];
        for index in 0..16 {
            let address = match random.u8(0..3) {
                0 => random.u64(..),
                1 => REGION_GPA + random.u64(0..REGION_SIZE),
                // Never bytes that are a request.
                _ => REGION_GPA + 0x1f_0000,
            };
            let len = match random.u8(0..3) {
                0 => random.u32(..),
                _ => random.u32(0..300),
            };
            let hostile = descriptor(address, len, random.u16(0..8), random.u16(0..20));
            ring.set_descriptor(&driver.memory, index, hostile);
        }
        for _ in 0..random.u8(1..16) {
            ring.make_available(&driver.memory, random.u16(0..18));
        }
        ring.kick_anyway();
        still_serves(&mut driver, 2);
        if n % 20 == 0 {
            assert!(victim.rig.comes_to_rest(), "VUT_SEED={seed} at {n}");
        }
    }
    victim.unharmed();
}

// Hostile descriptors.

/// A connection whose queue 1 has these for kick and call and a request in it. Whatever comes
/// of it, the backend comes to rest.
fn with_fds(victim: &Victim, kick: BorrowedFd<'_>, call: BorrowedFd<'_>) {
    let mut control = victim.negotiated();
    let mut memory = Memory::new();
    let mut ring = Ring::new(1, 16, true);
    let info = request(op::GET_INFO, VM, 0, &[]);
    ring.add(&mut memory, &info, 80, &Layout::plain());
    let config = ring.config();
    let (table, used) = (config.desc_table_addr, config.used_ring_addr);
    let addresses = [1, table, used, config.avail_ring_addr, 0];
    let region = [1, REGION_GPA, REGION_SIZE, REGION_VA, 0];
    let messages: [(u32, &[u64], &[BorrowedFd<'_>]); 6] = [
        (SET_MEM_TABLE, &region, &[memory.file().as_fd()]),
        (SET_VRING_NUM, &[pair(1, 16)], &[]),
        (SET_VRING_ADDR, &addresses, &[]),
        (SET_VRING_CALL, &[1], &[call]),
        (SET_VRING_KICK, &[1], &[kick]),
        // Enabling a ring is a kick, too.
        (SET_VRING_ENABLE, &[pair(1, 1)], &[]),
    ];
    for (code, body, fds) in messages {
        if !matches!(control.ask(code, body, fds), Ok(0)) {
            break;
        }
    }
    // With the connection open, if it still is.
    assert!(victim.rig.comes_to_rest());
}

#[test]
fn kick_and_call_descriptors_of_any_kind_do_no_harm() {
    let victim = Victim::launch();
    let event = blocking_eventfd(0);
    let full = blocking_eventfd(0);
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let semaphore = eventfd(3, EventfdFlags::SEMAPHORE).unwrap();
    let (dead_reader, writer) = std::io::pipe().unwrap();
    drop(writer);
    let (reader, dead_writer) = std::io::pipe().unwrap();
    drop(reader);
    let (short_reader, mut short_writer) = std::io::pipe().unwrap();
    short_writer.write_all(&[1, 2, 3]).unwrap();
    let (_unread, mut full_pipe) = std::io::pipe().unwrap();
    let file = memfd(0x1000);
    let null = File::open("/dev/null").unwrap();
    let folder = File::open("/").unwrap();
    let (socket, peer) = UnixStream::pair().unwrap();
    drop(peer);
    // Always readable.
    let random = File::open("/dev/random").unwrap();
    fill(&mut full_pipe);
    let fds = [
        event.as_fd(),
        full.as_fd(),
        semaphore.as_fd(),
        dead_reader.as_fd(),
        dead_writer.as_fd(),
        short_reader.as_fd(),
        full_pipe.as_fd(),
        file.as_fd(),
        null.as_fd(),
        folder.as_fd(),
        socket.as_fd(),
        random.as_fd(),
    ];
    for kick in fds {
        with_fds(&victim, kick, event.as_fd());
        victim.unharmed();
    }
    for call in fds {
        with_fds(&victim, event.as_fd(), call);
    }
    victim.unharmed();
}

/// Writes until no more fits.
fn fill(pipe: &mut std::io::PipeWriter) {
    let flags = fcntl_getfl(&*pipe).unwrap();
    fcntl_setfl(&*pipe, flags | OFlags::NONBLOCK).unwrap();
    while pipe.write(&[0; 4096]).is_ok() {}
    fcntl_setfl(&*pipe, flags).unwrap();
}

/// Makes a ring's call descriptor one that blocks whoever writes to it.
fn clog(ring: &Ring) {
    let call = fd_of(ring.call());
    ring.call().write(u64::MAX - 1).unwrap();
    let flags = fcntl_getfl(call).unwrap();
    fcntl_setfl(call, flags & !OFlags::NONBLOCK).unwrap();
}

#[test]
fn a_call_descriptor_that_takes_no_more_does_not_hold_the_others_up() {
    let victim = Victim::launch();
    let mut driver = victim.driver();
    clog(&driver.rings[1]);
    driver
        .control
        .set_vring_call(1, driver.rings[1].call())
        .unwrap();
    let info = request(op::GET_INFO, VM, 0, &[]);
    for _ in 0..3 {
        driver.submit(1, &info, 80, &Layout::plain());
        still_serves(&mut driver, 2);
        assert!(victim.rig.comes_to_rest());
    }
    drop(driver);
    victim.unharmed();
}

#[test]
fn a_call_descriptor_made_to_block_later_does_not_keep_a_signal_out() {
    let mut victim = Victim::launch();
    let mut driver = victim.driver();
    clog(&driver.rings[1]);
    let info = request(op::GET_INFO, VM, 0, &[]);
    driver.submit(1, &info, 80, &Layout::plain());
    victim.rig.backend.signal(Signal::TERM);
    assert_eq!(victim.rig.backend.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_semaphore_of_endless_kicks_does_not_make_it_spin() {
    let victim = Victim::launch();
    let kick = eventfd(0, EventfdFlags::SEMAPHORE).unwrap();
    rustix::io::write(&kick, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    with_fds(&victim, kick.as_fd(), blocking_eventfd(0).as_fd());
    victim.unharmed();
}

#[test]
fn one_eventfd_for_kick_and_call_comes_to_rest() {
    let victim = Victim::launch();
    let driver = victim.driver();
    let same = driver.rings[1].kick_fd();
    driver.control.set_vring_call(1, same).unwrap();
    let mut driver = driver;
    for _ in 0..5 {
        let info = request(op::GET_INFO, VM, 0, &[]);
        driver.submit(1, &info, 80, &Layout::plain());
        assert!(victim.rig.comes_to_rest());
    }
    drop(driver);
    victim.unharmed();
}

#[test]
fn a_kick_descriptor_that_was_replaced_does_not_make_it_spin() {
    let victim = Victim::launch();
    let driver = victim.driver();
    let other = Ring::new(1, 16, true);
    // The old one is open here still, and so it is in the backend's epoll set.
    let _ = driver.control.set_vring_kick(1, other.kick_fd());
    driver.rings[1].kick_anyway();
    assert!(victim.rig.comes_to_rest());
    driver.rings[1].kick_anyway();
    other.kick_anyway();
    assert!(victim.rig.comes_to_rest());
    drop(driver);
    victim.unharmed();
}

#[test]
fn one_kick_descriptor_for_all_queues_does_no_harm() {
    let victim = Victim::launch();
    let driver = victim.driver();
    for queue in [1, 2] {
        let _ = driver.control.get_vring_base(queue);
        let _ = driver
            .control
            .set_vring_kick(queue, driver.rings[0].kick_fd());
    }
    for _ in 0..10 {
        driver.rings[0].kick_anyway();
    }
    assert!(victim.rig.comes_to_rest());
    drop(driver);
    victim.unharmed();
}

// Many times over.

#[test]
fn a_thousand_frontends_leave_no_descriptor_no_thread_and_no_memory_behind() {
    let victim = Victim::launch();
    let visit = |n: u32| {
        let mut client = Client::connect_with(
            &victim.rig,
            Setup {
                queues: 3,
                add_mem_reg: n.is_multiple_of(2),
                event_idx: n.is_multiple_of(3),
                ..Setup::default()
            },
        );
        client.wait_run(1, 0);
        client.post_event_buffer();
        client.info();
        if n.is_multiple_of(5) {
            client.driver.stop(1);
        }
    };
    (0..50).for_each(visit);
    let before = victim.rig.settled(victim.usage.threads, victim.usage.fds);
    (0..1000).for_each(visit);
    let after = victim.rig.settled(before.threads, before.fds);
    assert_eq!((after.threads, after.fds), (before.threads, before.fds));
    let grown = after.anonymous_kib.saturating_sub(before.anonymous_kib);
    assert!(grown < 2048, "{grown} KiB more");
    victim.unharmed();
}

#[test]
fn a_million_requests_leave_no_memory_behind() {
    let victim = Victim::launch();
    let mut client = Client::connect_with(
        &victim.rig,
        Setup {
            size: 1024,
            ..Setup::default()
        },
    );
    let mut flood = |requests: u32| {
        let info = request(op::GET_INFO, VM, 0, &[]);
        for _ in 0..requests / 500 {
            for _ in 0..500 {
                client.driver.add(1, &info, 80, &Layout::plain());
            }
            client.driver.rings[1].kick(&client.driver.memory);
            for _ in 0..500 {
                client.driver.used(1);
            }
        }
    };
    flood(10_000);
    let before = victim.rig.usage();
    flood(100_000);
    let grown = victim
        .rig
        .usage()
        .anonymous_kib
        .saturating_sub(before.anonymous_kib);
    assert!(grown < 512, "{grown} KiB more");
}

#[test]
fn starting_and_stopping_rings_under_a_storm_of_kicks_does_no_harm() {
    let victim = Victim::launch();
    let mut driver = victim.driver();
    let over = Arc::new(AtomicBool::new(false));
    for _ in 0..100 {
        let kick = driver.rings[1].kick_fd().try_clone().unwrap();
        let stop = Arc::clone(&over);
        stop.store(false, Ordering::Relaxed);
        let storm = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = kick.write(1);
            }
        });
        still_serves(&mut driver, 1);
        driver.stop(1);
        over.store(true, Ordering::Relaxed);
        storm.join().unwrap();
        driver.start(1);
    }
    still_serves(&mut driver, 1);
    drop(driver);
    victim.unharmed();
}

/// A ring that is never empty: every chain in it is a request with effects, and its available
/// index runs away from whoever serves it.
fn endless(mut driver: Driver, over: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let over = Arc::clone(over);
    let mut heads = Vec::new();
    for (n, code) in [op::RESUME, op::PAUSE]
        .into_iter()
        .cycle()
        .take(8)
        .enumerate()
    {
        let at = driver.memory.allocate(256);
        let body = if code == op::PAUSE {
            pause_body(0)
        } else {
            vec![]
        };
        memory_request(&driver.memory, at, code, &body);
        let ring = &driver.rings[1];
        let len = 16 + body.len() as u32;
        let head = 2 * n as u16;
        let first = descriptor(at, len, NEXT, head + 1);
        ring.set_descriptor(&driver.memory, head, first);
        let second = descriptor(at + 64, 64, WRITE, 0);
        ring.set_descriptor(&driver.memory, head + 1, second);
        heads.push(head);
    }
    for head in heads.into_iter().cycle().take(16) {
        driver.rings[1].make_available(&driver.memory, head);
    }
    driver.rings[1].kick_anyway();
    let Driver {
        memory, mut rings, ..
    } = driver;
    std::thread::spawn(move || {
        while !over.load(Ordering::Relaxed) {
            let index = rings[1].used_index(&memory).wrapping_add(16);
            rings[1].set_avail_index(&memory, index);
        }
    })
}

fn memory_request(memory: &Memory, at: u64, code: u16, body: &[u8]) {
    memory.write(at, &request(code, VM, 0, body));
}

#[test]
fn a_ring_that_never_ends_does_not_keep_the_next_frontend_out() {
    let victim = Victim::launch();
    let over = Arc::new(AtomicBool::new(false));
    // Its control channel is closed at once; its memory lives on in the thread.
    let storm = endless(victim.driver(), &over);
    let mut client = Client::connect(&victim.rig);
    assert_eq!(client.info().vcpus, 2);
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
}

#[test]
fn a_ring_that_never_ends_does_not_keep_a_signal_out() {
    let mut victim = Victim::launch();
    let over = Arc::new(AtomicBool::new(false));
    let driver = victim.driver();
    let control = driver.control.clone();
    let storm = endless(driver, &over);
    victim.rig.backend.signal(Signal::TERM);
    let status = victim.rig.backend.wait(PATIENCE);
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    drop(control);
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_ring_that_never_ends_does_not_starve_the_other_queues() {
    let victim = Victim::launch();
    let over = Arc::new(AtomicBool::new(false));
    let mut driver = victim.driver();
    // Queue 2 is kept here, queue 1 goes to the storm.
    let mine = driver.rings.pop().unwrap();
    let control = driver.control.clone();
    let shared = Memory::sharing(&driver.memory);
    let storm = endless(driver, &over);
    let mut mine = mine;
    let mut memory = shared;
    let info = request(op::GET_INFO, VM, 0, &[]);
    for _ in 0..100 {
        mine.add(&mut memory, &info, 80, &Layout::plain());
        mine.kick(&memory);
        let used = mine.wait(&mut memory, PATIENCE).expect("an answer");
        assert_eq!(used.len, 80);
    }
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    drop(control);
}
