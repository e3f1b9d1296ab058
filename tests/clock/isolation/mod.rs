//! What a guest can reach through the clock device: its clocks, and nothing of the timer device,
//! whatever it does; and the process behind the two sockets.

mod devices;
mod hostile_guests;
mod sockets;

use std::collections::BTreeSet;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

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
    Control, Driver, INDIRECT, Memory, NEXT, PATIENCE, POISON, REGION_GPA, REGION_SIZE, REGION_VA,
    RING_EVENT_IDX, RING_INDIRECT, Rig, Ring, Setup, VERSION_1, WRITE, descriptor, seed, until,
};

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;

fn both() -> Rig {
    Rig::launch_devices(Devices::TimerAndClock, &[])
}

/// The part of a VM that must not change.
fn at_rest(timer: &mut Client) -> (Info, VmState) {
    (timer.info().at_rest(), timer.state().at_rest(false))
}
