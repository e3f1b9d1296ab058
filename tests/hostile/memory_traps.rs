//! Memory that is not there when the backend touches it: touching it is SIGBUS, or blocks. The
//! frontend that shares it loses its connection, and nothing else happens.
//!
//! The driver's rings and what it reads itself lie in a region of their own; what is taken away
//! lies in a second one, in which the driver never looks.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_timer_kit::clock_driver::{ClockDriver, UTC, msg, proper};
use vhost_user_timer_kit::contract::{VM, op, request};
use vhost_user_timer_kit::raw_driver::{
    Control, Descriptor, Driver, Layout, NEXT, REGION_SIZE, Setup, WRITE, descriptor, huge_memfd,
    memfd,
};
use vhost_user_timer_kit::victim::Victim;

use crate::namespaces::{MOUNTS, can_unshare};

/// The second region.
const GPA: u64 = 0x1_0000_0000;
const VA: u64 = 0x1234_0000_0000;
const SIZE: u64 = 16 << 20;

const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const ADD_MEM_REG: u32 = 37;

/// How the log calls the second region.
const REGION: &str = "its memory region of 0x1000000 bytes at 0x100000000 cannot be touched";

/// A driver whose end can be waited for.
struct Attacker {
    driver: Driver,
    /// The same socket.
    socket: UnixStream,
}

impl Attacker {
    fn over(stream: UnixStream, setup: Setup) -> Self {
        let socket = stream.try_clone().unwrap();
        Attacker {
            driver: Driver::over(stream, setup),
            socket,
        }
    }

    /// On the timer device.
    fn of_timer(victim: &Victim) -> Self {
        let setup = Setup {
            queues: 3,
            size: 16,
            ..Setup::default()
        };
        Self::over(victim.rig.stream(), setup)
    }

    /// On the clock device.
    fn of_clock(victim: &Victim) -> Self {
        Self::over(victim.rig.clock_stream(), ClockDriver::setup())
    }

    fn share(&mut self, file: &File) {
        share(&mut self.driver.control, file).expect("the second region");
    }

    /// Offers one chain and kicks.
    fn offer(&mut self, queue: usize, chain: &[Descriptor]) {
        let Driver { memory, rings, .. } = &mut self.driver;
        rings[queue].offer_table(memory, chain);
        rings[queue].kick_anyway();
    }

    /// These bytes in the driver's own memory.
    fn own(&mut self, bytes: &[u8], flags: u16, next: u16) -> Descriptor {
        let at = self.driver.memory.allocate(bytes.len());
        self.driver.memory.write(at, bytes);
        descriptor(at, bytes.len() as u32, flags, next)
    }

    /// The backend ends the connection, and says why.
    #[track_caller]
    fn loses_its_connection(self, victim: &Victim, why: &str) {
        let Attacker { driver, socket } = self;
        victim.in_time("the connection ends", || {
            Control::over(socket).wait_for_end();
        });
        drop(driver);
        victim.rig.log_with(why);
        victim.unharmed();
    }
}

fn share(control: &mut Frontend, file: &File) -> vhost::Result<()> {
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: GPA,
        memory_size: SIZE,
        userspace_addr: VA,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    control.add_mem_region(&region).map(drop)
}

fn get_info() -> Vec<u8> {
    request(op::GET_INFO, VM, 0, &[])
}

#[test]
fn a_response_in_memory_that_was_truncated_costs_the_connection() {
    let victim = Victim::launch();
    for place in [0, 0x1000, SIZE - 80] {
        let file = memfd(SIZE);
        let mut attacker = Attacker::of_timer(&victim);
        attacker.share(&file);
        let request = attacker.own(&get_info(), NEXT, 1);
        let answered = descriptor(GPA + place, 80, WRITE, 0);
        file.set_len(0).unwrap();
        attacker.offer(1, &[request, answered]);
        attacker.loses_its_connection(&victim, REGION);
    }
}

#[test]
fn a_request_whose_bytes_are_gone_is_not_carried_out_as_zeros() {
    let victim = Victim::launch();
    let file = memfd(SIZE);
    let mut attacker = Attacker::of_timer(&victim);
    attacker.share(&file);
    // With a body of zeros this is a valid request, which moves the VM's count.
    let header = request(op::SET_COUNTER_OFFSET, VM, 0, &[]);
    let header = attacker.own(&header, NEXT, 1);
    let answer = attacker.own(&[0; 80], WRITE, 0);
    file.set_len(0).unwrap();
    attacker.offer(1, &[header, descriptor(GPA, 16, NEXT, 2), answer]);
    attacker.loses_its_connection(&victim, REGION);
}

#[test]
fn a_chain_of_a_thousand_lost_pages_costs_the_connection() {
    let victim = Victim::launch();
    let file = memfd(SIZE);
    let mut attacker = Attacker::of_timer(&victim);
    attacker.share(&file);
    file.set_len(0).unwrap();
    let pages = 1000;
    let mut chain: Vec<Descriptor> = (0..pages)
        .map(|page| descriptor(GPA + 0x3000 * page, 4, NEXT, page as u16 + 1))
        .collect();
    chain.push(attacker.own(&[0; 80], WRITE, 0));
    attacker.offer(1, &chain);
    attacker.loses_its_connection(&victim, REGION);
}

/// The second ring of the timer device in the second region, which is truncated to this length
/// before or after the backend learns of it.
fn ring_in_lost_memory(victim: &Victim, len: u64, before: bool) {
    let file = memfd(SIZE);
    let mut attacker = Attacker::of_timer(victim);
    attacker.share(&file);
    attacker.driver.stop(1);
    let truncate = || file.set_len(len).unwrap();
    if before {
        truncate();
    }
    let at = |place: u64| VA + place;
    let config = VringConfigData {
        desc_table_addr: at(0),
        avail_ring_addr: at(0x4000),
        used_ring_addr: at(0x8000),
        ..attacker.driver.rings[1].config()
    };
    let Attacker { driver, .. } = &mut attacker;
    let ring = &driver.rings[1];
    // Whether the backend answers these is not the point: the connection may end at any of them.
    let _ = driver.control.set_vring_num(1, 16);
    let _ = driver.control.set_vring_addr(1, &config);
    let _ = driver.control.set_vring_base(1, 0);
    let _ = driver.control.set_vring_kick(1, ring.kick_fd());
    let _ = driver.control.set_vring_enable(1, true);
    if !before {
        truncate();
    }
    ring.kick_anyway();
    attacker.loses_its_connection(victim, REGION);
}

#[test]
fn a_ring_in_memory_that_was_truncated_costs_the_connection() {
    let victim = Victim::launch();
    for len in [0, 0x5000] {
        for before in [false, true] {
            ring_in_lost_memory(&victim, len, before);
        }
    }
}

#[test]
fn a_ring_that_is_polled_in_memory_that_was_truncated_costs_the_connection() {
    let victim = Victim::released().args(&["--poll-max-us=10000"]).start();
    ring_in_lost_memory(&victim, 0, false);
}

#[test]
fn a_time_page_in_memory_that_was_truncated_costs_the_connection() {
    let victim = Victim::launch();
    let file = memfd(SIZE);
    let mut attacker = Attacker::of_timer(&victim);
    attacker.share(&file);
    file.set_len(0).unwrap();
    let body: Vec<u8> = [GPA, 64_u64]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect();
    let order = request(op::SET_TIME_PAGE, VM, 0, &body);
    let order = attacker.own(&order, NEXT, 1);
    let answer = attacker.own(&[0; 80], WRITE, 0);
    attacker.offer(1, &[order, answer]);
    attacker.loses_its_connection(&victim, REGION);
}

#[test]
fn a_guests_memory_that_was_truncated_costs_its_connection() {
    let victim = Victim::launch();
    let file = memfd(SIZE);
    let mut attacker = Attacker::of_clock(&victim);
    attacker.share(&file);
    let request = attacker.own(&proper(msg::READ, UTC), NEXT, 1);
    file.set_len(0).unwrap();
    attacker.offer(0, &[request, descriptor(GPA, 16, WRITE, 0)]);
    attacker.loses_its_connection(&victim, REGION);
}

/// A log of this length in a file of `len` bytes.
fn log(control: &Frontend, file: &File) -> vhost::Result<()> {
    let region = VhostUserDirtyLogRegion {
        mmap_size: LOG,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    control.set_log_base(0, Some(region))
}

/// Enough for the addresses of both regions.
const LOG: u64 = (GPA + SIZE) / 0x8000;

#[test]
fn a_log_that_was_truncated_costs_the_connection() {
    let victim = Victim::launch();
    let file = memfd(LOG);
    let mut attacker = Attacker::of_clock(&victim);
    log(&attacker.driver.control, &file).unwrap();
    let read = proper(msg::READ, UTC);
    attacker.driver.call(0, &read, 16, &Layout::plain());
    let request = attacker.own(&proper(msg::READ, UTC), NEXT, 1);
    let answer = attacker.own(&[0; 16], WRITE, 0);
    file.set_len(0).unwrap();
    attacker.offer(0, &[request, answer]);
    attacker.loses_its_connection(&victim, "its dirty log cannot be touched");
}

#[test]
fn a_log_shorter_than_it_says_does_no_harm() {
    let victim = Victim::launch();
    for len in [0, 1, LOG - 1] {
        let file = memfd(len);
        let mut attacker = Attacker::of_clock(&victim);
        // Refused, or lost when it is touched.
        let _ = log(&attacker.driver.control, &file);
        let request = attacker.own(&proper(msg::READ, UTC), NEXT, 1);
        let answer = attacker.own(&[0; 16], WRITE, 0);
        attacker.offer(0, &[request, answer]);
        drop(attacker);
        victim.unharmed();
    }
    let zero = File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    let mut control = victim.clock_negotiated(1 << 26);
    let answer = control.ask(SET_LOG_BASE, &[LOG, 0], &[zero.as_fd()]);
    drop((answer, control));
    victim.unharmed();
}

#[test]
fn a_region_past_its_files_end_is_not_touched_while_a_ring_is_served() {
    let victim = Victim::launch();
    for _ in 0..20 {
        let mut driver = victim.driver();
        let ended = AtomicBool::new(false);
        let kick = driver.rings[1].kick_fd().try_clone().unwrap();
        let short = memfd(0x1000);
        let mut region = driver.memory.region();
        region.mmap_handle = short.as_raw_fd();
        for _ in 0..8 {
            driver.add(1, &get_info(), 80, &Layout::plain());
        }
        thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    let _ = kick.write(1);
                }
            });
            let refused = driver.control.set_mem_table(&[region]);
            ended.store(true, Ordering::Relaxed);
            refused.expect_err("the file is shorter than the region");
        });
    }
    victim.unharmed();
}

#[test]
fn a_device_is_no_memory() {
    let victim = Victim::launch();
    let zero = File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    for code in [SET_MEM_TABLE, ADD_MEM_REG] {
        for len in [SIZE, REGION_SIZE, 2 << 30] {
            let mut control = victim.negotiated();
            let region = [1, GPA, len, VA, 0];
            let answer = control.ask(code, &region, &[zero.as_fd()]);
            assert!(!matches!(answer, Ok(0)), "/dev/zero of {len:#x} bytes");
            victim.rig.log_with("is a character device; send a memfd");
        }
    }
    victim.unharmed();
}

#[test]
fn huge_pages_that_the_host_does_not_have_cost_the_connection() {
    let victim = Victim::launch();
    let file = huge_memfd(SIZE);
    let mut attacker = Attacker::of_timer(&victim);
    attacker.share(&file);
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if !free.is_ok_and(|free| free.trim() == "0") {
        // This host has some.
        file.set_len(0).unwrap();
    }
    let request = attacker.own(&get_info(), NEXT, 1);
    attacker.offer(1, &[request, descriptor(GPA + 0x20_1000, 80, WRITE, 0)]);
    attacker.loses_its_connection(&victim, REGION);
}

/// A process in a mount namespace of its own, which needs no privileges, with a tmpfs in `/mnt`.
struct Namespace(Child);

impl Namespace {
    fn new(script: &str) -> Self {
        let child = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-ec", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare(1)");
        let mut namespace = Namespace(child);
        let mut ready = [0; 6];
        let out = namespace.0.stdout.as_mut().expect("a pipe");
        std::io::Read::read_exact(out, &mut ready).expect("a user namespace with a tmpfs");
        namespace
    }

    /// A path as the namespace has it.
    fn path(&self, path: &str) -> PathBuf {
        format!("/proc/{}/root{path}", self.0.id()).into()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_sparse_file_on_a_full_file_system_costs_the_connection() {
    if !can_unshare(MOUNTS) {
        return;
    }
    let victim = Victim::launch();
    let script = "mount -t tmpfs -o size=64k none /mnt; \
                  head -c 1000000 /dev/zero >/mnt/full 2>/dev/null || true; \
                  : >/mnt/sparse; echo ready; read end";
    let namespace = Namespace::new(script);
    let file = File::options()
        .read(true)
        .write(true)
        .open(namespace.path("/mnt/sparse"))
        .expect("the namespace's file");
    file.set_len(SIZE).unwrap();
    let mut attacker = Attacker::of_timer(&victim);
    attacker.share(&file);
    let request = attacker.own(&get_info(), NEXT, 1);
    attacker.offer(1, &[request, descriptor(GPA, 80, WRITE, 0)]);
    attacker.loses_its_connection(&victim, REGION);
}
