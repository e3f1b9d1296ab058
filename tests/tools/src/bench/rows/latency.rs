//! Rows 1 and 2: a request's round trip at depth 1.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost_user_timer_frontend::{Operation, Options, RequestQueue};
use vhost_user_timer_protocol::{Abi, Register};

use super::{Bench, LIMIT, configured, ns, other, samples};
use crate::bench::floor::{Floor, Kind};
use crate::bench::place::{Place, cpu_ns};
use crate::bench::report::Row;
use crate::bench::stats::Pair;

/// Requests of each kind in a round.
const ROUND: usize = 500;

fn ask(queue: &RequestQueue) -> io::Result<()> {
    let ids = [Register::TimerCval.id(Abi::Arm64)];
    queue.get_regs(0, &ids, LIMIT).map(drop).map_err(other)
}

fn spin(queue: &RequestQueue) -> io::Result<()> {
    let ids = [Register::TimerCval.id(Abi::Arm64)];
    let ticket = queue.submit(&Operation::get_regs(0, &ids)).map_err(other)?;
    ticket.spin(LIMIT).map(drop).map_err(other)
}

/// Row 1.
pub(super) fn round_trips(bench: &mut Bench) -> io::Result<()> {
    blocking(bench)?;
    paced(bench)
}

/// Row 1: a client that sleeps, and an epoll server that does nothing else.
fn blocking(bench: &mut Bench) -> io::Result<()> {
    for place in Place::ALL {
        for polling in [false, true] {
            let name = format!(
                "1 round trip, blocking client, {}, polling {}",
                place.name(),
                if polling { "on" } else { "off" }
            );
            if !bench.cpus.allows(place) {
                bench.report.skip(&name, "there is one CPU");
                continue;
            }
            if polling && !bench.polls {
                bench.report.skip(&name, "the backend does not poll");
                continue;
            }
            let backend = bench.backend(polling, &[])?;
            let frontend = configured(&backend, 1, Options::default())?;
            let queue = frontend.queue();
            let floor = Floor::launch(Kind::Events)?;
            bench.cpus.split(place, backend.pid())?;
            bench.cpus.split(place, floor.pid())?;
            let mut pair = Pair::default();
            samples(ROUND, || ask(queue))?;
            samples(ROUND, || floor.round_trip())?;
            for _ in 0..bench.count(60, 8) {
                let ours = samples(ROUND, || ask(queue))?;
                let theirs = samples(ROUND, || floor.round_trip())?;
                pair.add(ours, theirs);
            }
            let reach = match (polling, place) {
                (false, _) => [Some("ratio ≤ 1.05"), Some("ratio ≤ 1.3")],
                (true, Place::TwoCpus) => [Some("ratio ≤ 0.6"), None],
                (true, Place::OneCpu) => [None, None],
            };
            bench.report.latency(&name, &pair, reach);
        }
    }
    Ok(())
}

/// Pause between two requests, short enough for a backend to be still polling.
const PAUSE: Duration = Duration::from_micros(100);

/// Row 1, what polling gains and costs where requests come one by one: a backend that polls, and
/// one that does not; then the same on a CPU that another task wants as well.
fn paced(bench: &mut Bench) -> io::Result<()> {
    if !bench.polls || !bench.cpus.allows(Place::TwoCpus) {
        let name = "1 a request each 100 µs, polling on to off";
        bench.report.skip(name, "needs two CPUs and polling");
        return Ok(());
    }
    for busy in [false, true] {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| -> io::Result<()> {
            if busy {
                let (cpus, done) = (&bench.cpus, &done);
                scope.spawn(move || cpus.occupy_theirs(done));
            }
            let measured = pace(bench, busy);
            done.store(true, Ordering::Relaxed);
            let (name, times, costs) = measured?;
            bench.report.latency(&name, &times, [None, None]);
            let [ours, floor] = costs.medians();
            bench.report.row(Row {
                name: format!("{name}: backend CPU per request"),
                ours: ours / 1e3,
                floor: Some(floor / 1e3),
                unit: "µs",
                ratio: Some(costs.ratio(0.5)),
                reach: None,
            });
            Ok(())
        })?;
    }
    Ok(())
}

fn pace(bench: &Bench, busy: bool) -> io::Result<(String, Pair, Pair)> {
    let name = format!(
        "1 a request each 100 µs, {}, polling on to off",
        if busy { "busy CPU" } else { "two CPUs" }
    );
    let backends = [bench.backend(true, &[])?, bench.backend(false, &[])?];
    let mut frontends = Vec::new();
    for backend in &backends {
        frontends.push(configured(backend, 1, Options::default())?);
        bench.cpus.split(Place::TwoCpus, backend.pid())?;
    }
    let turn = |n: usize| -> io::Result<(Vec<f64>, Vec<f64>)> {
        let (queue, pid) = (frontends[n].queue(), backends[n].pid());
        let before = cpu_ns(pid)?;
        let mut times = Vec::with_capacity(ROUND);
        for _ in 0..ROUND {
            times.push(ns(|| ask(queue))?);
            let end = Instant::now() + PAUSE;
            while Instant::now() < end {
                std::hint::spin_loop();
            }
        }
        Ok((times, vec![(cpu_ns(pid)? - before) / ROUND as f64]))
    };
    let (mut times, mut costs) = (Pair::default(), Pair::default());
    for _ in 0..bench.count(60, 12) {
        let (on, on_cost) = turn(0)?;
        let (off, off_cost) = turn(1)?;
        times.add(on, off);
        costs.add(on_cost, off_cost);
    }
    Ok((name, times, costs))
}

/// Row 2: both sides poll memory.
pub(super) fn polling(bench: &mut Bench) -> io::Result<()> {
    let name = "2 round trip, polling client, two CPUs";
    if !bench.cpus.allows(Place::TwoCpus) {
        bench.report.skip(name, "there is one CPU");
        return Ok(());
    }
    let backend = bench.backend(true, &[])?;
    let frontend = configured(&backend, 1, Options::default())?;
    let queue = frontend.queue();
    bench.cpus.split(Place::TwoCpus, backend.pid())?;
    let mut pair = Pair::default();
    for _ in 0..bench.count(40, 8) {
        // Enough requests for the backend to learn that polling pays.
        samples(ROUND, || spin(queue))?;
        let ours = samples(4 * ROUND, || spin(queue))?;
        // A polling floor would disturb ours, so it lives only for its half of the round.
        let mut floor = Floor::launch(Kind::Spin)?;
        bench.cpus.split(Place::TwoCpus, floor.pid())?;
        let mut turn = || -> io::Result<()> {
            floor.spin();
            Ok(())
        };
        samples(ROUND, &mut turn)?;
        let theirs = samples(4 * ROUND, &mut turn)?;
        pair.add(ours, theirs);
    }
    bench.report.latency(name, &pair, [Some("ratio ≤ 2"), None]);
    Ok(())
}
