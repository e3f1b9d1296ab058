//! Frontends that break every rule. Whatever they do, the process lives, comes to rest, gives
//! its descriptors and threads back, serves the next frontend, and its VM is as it was.
//!
//! Run against the release build where there is one: `vhost-user-backend` has overflow checks
//! that only a debug build makes.

mod control;
mod descriptors;
mod endurance;
mod memory;
mod rings;
mod values;

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
use vhost_user_timer_kit::contract::{
    CNT, CTL, CVAL, Client, Info, VM, VmState, op, pause_body, request,
};
use vhost_user_timer_kit::raw_driver::{
    Control, Driver, INDIRECT, Layout, Memory, NEXT, PATIENCE, REGION_GPA, REGION_SIZE, REGION_VA,
    Rig, Ring, Usage, WRITE, descriptor, fd_of, header, pair, release_program, seed,
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
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const RESET_DEVICE: u32 = 34;
const ADD_MEM_REG: u32 = 37;

const VIRTIO_FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28;

/// A backend whose VM must not change.
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
        // Warmed up: what is made once is made now.
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
        self.rig.client().queues(3).queue_size(16).driver()
    }

    fn control(&self) -> Control {
        Control::over(self.rig.stream())
    }

    /// A connection on which only features are negotiated.
    fn negotiated(&self) -> Control {
        Control::negotiated(self.rig.stream(), VIRTIO_FEATURES)
    }

    /// Checks that the process lives and serves, and that its VM is as it was.
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

/// Checks that a queue of the connection works.
#[track_caller]
fn still_serves(driver: &mut Driver, queue: u16) {
    let info = request(op::GET_INFO, VM, 0, &[]);
    for _ in 0..3 {
        let used = driver.call(queue, &info, 80, &Layout::plain());
        assert_eq!(used.len, 80);
    }
}
