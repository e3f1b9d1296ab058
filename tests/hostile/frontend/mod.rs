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
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::contract::{CNT, Client, VM, op, pause_body, request, words};
use vhost_user_timer_kit::raw_driver::message::{
    ADD_MEM_REG, GET_FEATURES, GET_VRING_BASE, RESET_DEVICE, SET_FEATURES, SET_MEM_TABLE,
    SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL,
    SET_VRING_ENABLE, SET_VRING_ERR, SET_VRING_KICK, SET_VRING_NUM,
};
use vhost_user_timer_kit::raw_driver::{
    Control, Driver, INDIRECT, Layout, Memory, NEXT, PATIENCE, REGION_GPA, REGION_SIZE, REGION_VA,
    Ring, WRITE, blocking_eventfd, descriptor, fd_of, fill, full_eventfd, header, make_blocking,
    memfd, pair, release_program, seed,
};
use vhost_user_timer_kit::victim::{TIMER_FEATURES, Victim};

/// Checks that a queue of the connection works.
#[track_caller]
fn still_serves(driver: &mut Driver, queue: u16) {
    let info = request(op::GET_INFO, VM, 0, &[]);
    for _ in 0..3 {
        let used = driver.call(queue, &info, 80, &Layout::plain());
        assert_eq!(used.len, 80);
    }
}
