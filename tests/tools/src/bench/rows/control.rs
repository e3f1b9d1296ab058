//! Row 11: what a guest can do to its VMM's control messages by its ring alone, and how long the
//! process takes to end meanwhile.
//!
//! The guest keeps a ring of 1024 chains full, each an indirect table of 65,535 descriptors without
//! a byte: the most work for the fewest bytes. Compared with the same messages while the ring is
//! idle.

use std::io;
use std::time::Instant;

use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_timer_kit::backend_process::{BackendProcess, Devices};
use vhost_user_timer_kit::clock_driver::{ALARMQ, ClockDriver, REQUESTQ};
use vhost_user_timer_kit::raw_driver::{Driver, FullRing, Ring, Setup};

use super::{Bench, LIMIT, ns, other};
use crate::bench::place::Place;
use crate::bench::stats::{Pair, median};

const RING: u16 = 1024;

/// The messages that take a lock which the worker holds: a ring is stopped and started again.
fn stop_and_start(control: &mut Frontend, ring: &Ring) -> io::Result<()> {
    let index = ALARMQ.into();
    let base = control.get_vring_base(index).map_err(other)?;
    control.set_vring_base(index, base as u16).map_err(other)?;
    control.set_vring_call(index, ring.call()).map_err(other)?;
    control
        .set_vring_kick(index, ring.kick_fd())
        .map_err(other)?;
    control.set_vring_enable(index, true).map_err(other)
}

/// See the module.
pub(super) fn delays(bench: &mut Bench) -> io::Result<()> {
    let place = Place::TwoCpus;
    let mut pair = Pair::default();
    let mut worst: f64 = 0.0;
    let mut ends = Vec::new();
    for _ in 0..bench.count(5, 2) {
        let devices = Devices::TimerAndClock;
        let mut backend = BackendProcess::launch_devices(&bench.program, devices, &[""; 0])?;
        let setup = Setup {
            size: RING,
            ..ClockDriver::setup()
        };
        let mut driver = Driver::connect(&backend.clock_path(), setup);
        if bench.cpus.allows(place) {
            bench.cpus.split(place, backend.pid())?;
        }
        let count = bench.count(200, 40);
        let alarms = driver.rings.remove(ALARMQ.into());
        let mut floor = Vec::new();
        for _ in 0..count {
            floor.push(ns(|| stop_and_start(&mut driver.control, &alarms))?);
        }
        let requests = driver.rings.remove(REQUESTQ.into());
        let mut ring = FullRing::new(requests, &mut driver.memory);
        let (memory, control) = (&driver.memory, &mut driver.control);
        let ours = ring.while_full(memory, || {
            let mut ours = Vec::new();
            for _ in 0..count {
                ours.push(ns(|| stop_and_start(control, &alarms))?);
            }
            let begin = Instant::now();
            backend.signal(Signal::TERM);
            backend.wait(LIMIT);
            ends.push(begin.elapsed().as_secs_f64() * 1e3);
            Ok::<_, io::Error>(ours)
        })?;
        worst = ours.iter().copied().fold(worst, f64::max);
        pair.add(ours, floor);
    }
    let name = "11 a ring is stopped and started beside a guest's worst ring";
    bench.report.latency(name, &pair, [None; 2]);
    let reach = Some("< 20 ms");
    bench
        .report
        .number(format!("{name}: longest"), worst / 1e6, "ms", reach);
    let end = median(ends);
    let name = "11 SIGTERM to the end beside a guest's worst ring";
    bench.report.number(name, end, "ms", None);
    Ok(())
}
