//! Rows 1 and 2: a request's round trip at depth 1.

use std::io;

use vhost_user_timer_protocol::frontend::{Call, Options, RequestQueue};
use vhost_user_timer_protocol::{Abi, Register};

use super::{Bench, LIMIT, configured, other, samples};
use crate::bench::floor::{Floor, Kind};
use crate::bench::place::Place;
use crate::bench::stats::Pair;

/// Requests of each kind in a round.
const ROUND: usize = 500;

fn ask(queue: &RequestQueue) -> io::Result<()> {
    let ids = [Register::TimerCval.id(Abi::Arm64)];
    queue.get_regs(0, &ids, LIMIT).map(drop).map_err(other)
}

fn spin(queue: &RequestQueue) -> io::Result<()> {
    let ids = [Register::TimerCval.id(Abi::Arm64)];
    let ticket = queue.submit(&Call::get_regs(0, &ids)).map_err(other)?;
    ticket.spin(LIMIT).map(drop).map_err(other)
}

/// Row 1: a client that sleeps, and an epoll server that does nothing else.
pub(super) fn blocking(bench: &mut Bench) -> io::Result<()> {
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
            let queue = &frontend.queues()[0];
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

/// Row 2: both sides look at memory.
pub(super) fn polling(bench: &mut Bench) -> io::Result<()> {
    let name = "2 round trip, polling client, two CPUs";
    if !bench.cpus.allows(Place::TwoCpus) {
        bench.report.skip(name, "there is one CPU");
        return Ok(());
    }
    let backend = bench.backend(true, &[])?;
    let frontend = configured(&backend, 1, Options::default())?;
    let queue = &frontend.queues()[0];
    bench.cpus.split(Place::TwoCpus, backend.pid())?;
    let mut pair = Pair::default();
    for _ in 0..bench.count(40, 8) {
        // Enough of them for the backend to find out that polling pays.
        samples(ROUND, || spin(queue))?;
        let ours = samples(4 * ROUND, || spin(queue))?;
        // One that spins would disturb ours: it lives for its half of the round.
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
