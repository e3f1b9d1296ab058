//! Row 8: the guest's clock, virtio-rtc, by a driver that is the same for every backend.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Bench, samples};
use crate::bench::driver::{Driver, SLOTS};
use crate::bench::floor::{Floor, Kind};
use crate::bench::place::{Place, cpu_ns};
use crate::bench::report::Row;
use crate::bench::stats::{Pair, median};
use vhost_user_timer_kit::backend_process::BackendProcess;

/// VIRTIO_RTC_REQ_READ of clock 0 (virtio 1.4 §5.23.6).
const READ: [u8; 16] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const ANSWER: usize = 16;
const ROUND: usize = 500;

fn connect(path: &Path) -> io::Result<Driver> {
    let driver = Driver::connect(path, 0)?;
    for slot in 0..SLOTS {
        driver.fill(slot, &READ, ANSWER);
    }
    Ok(driver)
}

fn sleep(driver: &mut Driver) -> io::Result<()> {
    driver.push(0);
    driver.publish()?;
    driver.sleep(1)?;
    let slot = driver.pop();
    match driver.answer::<1>(slot) {
        [0] => Ok(()),
        [status] => Err(io::Error::other(format!("READ is answered with {status}"))),
    }
}

fn spin(driver: &mut Driver) -> io::Result<()> {
    driver.push(0);
    driver.publish()?;
    driver.spin(1);
    driver.pop();
    Ok(())
}

/// Keeps all slots in flight. Returns requests per second.
fn drive(driver: &mut Driver, place: Place, time: Duration) -> io::Result<(f64, f64)> {
    driver.want_no_call();
    for slot in 0..SLOTS {
        driver.push(slot);
    }
    driver.publish()?;
    let mut done = u64::from(SLOTS);
    let begin = Instant::now();
    while begin.elapsed() < time {
        match place {
            Place::OneCpu => driver.sleep(SLOTS)?,
            Place::TwoCpus => driver.spin(1),
        }
        let count = driver.answered();
        for _ in 0..count {
            let slot = driver.pop();
            driver.push(slot);
        }
        driver.publish()?;
        done += u64::from(count);
    }
    driver.sleep(SLOTS)?;
    for _ in 0..SLOTS {
        driver.pop();
    }
    Ok((done as f64, done as f64 / begin.elapsed().as_secs_f64()))
}

/// A backend with its clock device at a path.
fn ours(bench: &Bench) -> io::Result<(BackendProcess, PathBuf)> {
    let folder = tempfile::tempdir()?.keep();
    let path = folder.join("rtc.sock");
    let argument = format!("--rtc-socket-path={}", path.display());
    let backend = bench.backend(true, &[&argument])?;
    let deadline = Instant::now() + super::LIMIT;
    while !path.exists() {
        if Instant::now() > deadline {
            return Err(io::Error::other("the backend does not listen"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok((backend, path))
}

/// See the module.
pub(super) fn readings(bench: &mut Bench) -> io::Result<()> {
    let (backend, path) = ours(bench)?;
    let peer = bench.args.peer_socket.clone();
    let peer_pid = bench.args.peer_pid;
    for place in Place::ALL {
        if !bench.cpus.allows(place) {
            continue;
        }
        let mut driver = connect(&path)?;
        let mut other = peer.as_deref().map(connect).transpose()?;
        let floor = Floor::launch(Kind::Events)?;
        bench.cpus.split(place, backend.pid())?;
        bench.cpus.split(place, floor.pid())?;
        if let Some(pid) = peer_pid {
            bench.cpus.split(place, pid)?;
        }
        let (mut to_floor, mut to_peer, mut polled) =
            (Pair::default(), Pair::default(), Pair::default());
        for _ in 0..bench.count(40, 6) {
            samples(ROUND / 4, || sleep(&mut driver))?;
            let ours = samples(ROUND, || sleep(&mut driver))?;
            to_floor.add(ours.clone(), samples(ROUND, || floor.round_trip())?);
            if let Some(other) = &mut other {
                to_peer.add(ours, samples(ROUND, || sleep(other))?);
            }
            if place == Place::TwoCpus {
                samples(ROUND / 4, || spin(&mut driver))?;
                let ours = samples(ROUND, || spin(&mut driver))?;
                let theirs = match &mut other {
                    Some(other) => samples(ROUND, || spin(other))?,
                    None => vec![],
                };
                polled.add(ours, theirs);
            }
        }
        let at = place.name();
        let name = format!("8 virtio-rtc READ, blocking driver, {at}");
        bench
            .report
            .latency(&format!("{name}, to the floor"), &to_floor, [None, None]);
        if other.is_some() {
            let reach = [Some("ratio < 1"), Some("ratio < 1")];
            bench
                .report
                .latency(&format!("{name}, to the peer"), &to_peer, reach);
        }
        if place == Place::TwoCpus {
            let name = "8 virtio-rtc READ, polling driver, two CPUs";
            if other.is_some() {
                bench.report.latency(
                    &format!("{name}, to the peer"),
                    &polled,
                    [Some("ratio < 1"), None],
                );
            } else {
                let [ours, _] = polled.pooled();
                let p50 = median(ours) / 1e3;
                bench.report.number(format!("{name}: p50"), p50, "µs", None);
            }
        }

        let turn = Duration::from_millis(60);
        let mut measured = [(vec![], vec![]), (vec![], vec![])];
        for _ in 0..bench.count(30, 5) {
            let turns = [
                Some((&mut driver, Some(backend.pid()))),
                other.as_mut().map(|other| (other, peer_pid)),
            ];
            for (turn_of, (rates, costs)) in turns.into_iter().zip(&mut measured) {
                let Some((driver, pid)) = turn_of else {
                    continue;
                };
                let used = || pid.map(cpu_ns).transpose();
                let before = used()?;
                let (done, rate) = drive(driver, place, turn)?;
                rates.push(rate / 1e6);
                if let (Some(before), Some(after)) = (before, used()?) {
                    costs.push((after - before) / done);
                }
            }
        }
        let [(rates, costs), (peer_rates, peer_costs)] = measured;
        let beside = |name: String, ours: Vec<f64>, theirs: Vec<f64>, unit, reach| {
            let ours = median(ours);
            let floor = (!theirs.is_empty()).then(|| median(theirs));
            Row {
                name,
                ours,
                floor,
                unit,
                ratio: floor.map(|floor| ours / floor),
                reach,
            }
        };
        let name = format!("8 virtio-rtc READ, 128 in flight, {at}");
        let rate = format!("{name}: requests per second");
        let row = beside(rate, rates, peer_rates, "M/s", Some("ratio > 1"));
        bench.report.row(row);
        let cost = format!("{name}: backend CPU per request");
        let row = beside(cost, costs, peer_costs, "ns", Some("ratio ≤ 0.33"));
        bench.report.row(row);
        drop(driver);
    }
    if peer.is_none() {
        bench.report.skip(
            "8 virtio-rtc READ, beside another backend",
            "no --peer-socket",
        );
    }
    if let Some(folder) = path.parent() {
        let _ = std::fs::remove_dir_all(folder);
    }
    Ok(())
}
