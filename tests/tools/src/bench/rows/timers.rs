//! Row 6: from a timer's deadline until the client knows that it has passed.

use std::io;

use vhost_user_timer_frontend::{Event, EventStream, Options, RegValue, RequestQueue};
use vhost_user_timer_protocol::{Abi, Register, wire};

use super::{Bench, LIMIT, configured, other};
use crate::bench::floor::{Floor, Kind};
use crate::bench::place::Place;
use crate::bench::stats::Pair;
use vhost_user_timer_kit::watch::host_count;

/// From the request to the deadline, ns.
const AHEAD: u64 = 300_000;
/// Timers in a round.
const ROUND: usize = 50;

fn late(deadline: u64) -> f64 {
    host_count().saturating_sub(deadline) as f64
}

/// Returns whether it was already due, which no event reports.
fn arm(queue: &RequestQueue, vcpu: u32, cval: u64) -> io::Result<bool> {
    let values = [
        RegValue::new(Register::TimerCval.id(Abi::Arm64), cval),
        RegValue::new(Register::TimerCtl.id(Abi::Arm64), wire::ctl::ENABLE),
    ];
    queue
        .set_regs(vcpu, &values, LIMIT)
        .map(|set| set.virtual_line)
        .map_err(other)
}

/// Lets one timer expire. Returns how long after its deadline the event arrived, ns.
pub(super) fn expire(
    queue: &RequestQueue,
    events: &mut EventStream,
    offset: u64,
) -> io::Result<f64> {
    let mut deadline = host_count() + AHEAD;
    while arm(queue, 0, deadline.wrapping_sub(offset))? {
        deadline = host_count() + AHEAD;
    }
    loop {
        if let Event::TimerAsserted { .. } = events.next(LIMIT).map_err(other)? {
            return Ok(late(deadline));
        }
    }
}

/// See the module.
pub(super) fn lateness(bench: &mut Bench) -> io::Result<()> {
    for place in Place::ALL {
        for armed in [1, 4096] {
            let name = format!("6 timer lateness, {armed} armed, {}", place.name());
            if !bench.cpus.allows(place) {
                bench.report.skip(&name, "there is one CPU");
                continue;
            }
            let backend = bench.backend(true, &["--max-vcpus=4096"])?;
            let mut frontend = configured(&backend, armed, Options::default())?;
            let mut events = frontend
                .take_events()
                .ok_or_else(|| io::Error::other("the events are taken"))?;
            let queue = frontend.queue();
            let offset = queue.resume(LIMIT).map_err(other)?.cntvoff;
            for vcpu in 1..armed {
                arm(queue, vcpu, (1 << 61) + u64::from(vcpu * 7919 % armed))?;
            }
            let floor = Floor::launch(Kind::Events)?;
            bench.cpus.split(place, backend.pid())?;
            bench.cpus.split(place, floor.pid())?;
            let mut pair = Pair::default();
            for _ in 0..bench.count(150, 8) {
                let ours: io::Result<Vec<_>> = (0..ROUND)
                    .map(|_| expire(queue, &mut events, offset))
                    .collect();
                let theirs: io::Result<Vec<_>> = (0..ROUND)
                    .map(|_| {
                        let deadline = host_count() + AHEAD;
                        floor.alarm(deadline)?;
                        Ok(late(deadline))
                    })
                    .collect();
                pair.add(ours?, theirs?);
            }
            let reach = Some("ratio ≤ 1.15");
            bench.report.latency(&name, &pair, [reach, reach]);
        }
    }
    Ok(())
}
