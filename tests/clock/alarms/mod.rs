//! Alarms of the clock device (virtio 1.4 §5.23.6.6): when they are reported, and what they
//! outlive.

mod drivers;
mod notifications;
mod restarts;
mod transfers;

use std::io::Read;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_timer_kit::backend_process::Devices;
use vhost_user_timer_kit::clock_driver::{
    ALARMQ, ClockDriver, F_ALARM, MONOTONIC, MS, REQUESTQ, SECOND, UTC, host, msg, proper,
};
use vhost_user_timer_kit::contract::Client;
use vhost_user_timer_kit::raw_driver::{
    Control, Cut, Driver, Layout, POISON, Rig, Setup, load, save, start_save,
};

/// Some times that are soon past.
const SOON: u64 = 60 * MS;
const HOUR: u64 = 3_600 * SECOND;

fn launch() -> Rig {
    Rig::launch_devices(Devices::Clock, &[])
}

/// A guest that posted buffers for notifications.
fn listening(rig: &Rig) -> ClockDriver {
    let mut guest = ClockDriver::connect(rig);
    post(&mut guest);
    guest
}

fn post(guest: &mut ClockDriver) {
    for _ in 0..8 {
        guest.post_alarm_buffer();
    }
}

/// Checks that the next notification is of this clock, and that there is no other.
#[track_caller]
fn told_once(guest: &mut ClockDriver, clock: u16) {
    assert_eq!(guest.notified(), clock);
    guest.no_notification();
}
