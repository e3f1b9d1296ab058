//! Row 3: many requests in flight.

use std::io;
use std::time::{Duration, Instant};

use vhost_user_timer_kit::reference::Ask;
use vhost_user_timer_model::vm::{Effects, Incoming, Now, Profile, Token, Vm};
use vhost_user_timer_protocol::{CounterSource, MAX_MESSAGE, Register, wire};

use super::Bench;
use crate::bench::driver::{Driver, SLOTS};
use crate::bench::place::{Place, cpu_ns};
use crate::bench::report::Row;
use crate::bench::stats::median;

const VCPUS: u32 = 64;
const HEADER: usize = size_of::<wire::ResponseHeader>();

/// SET_REGS of three registers, as for a guest that sets its timer.
fn set_regs(vcpu: u32, cval: u64) -> Vec<u8> {
    let values = [
        (Register::TimerCtl, wire::ctl::ENABLE),
        (Register::TimerCval, cval),
        (Register::PtimerCval, cval),
    ];
    Ask::set_regs(vcpu, &values).bytes()
}

/// Offset of TimerCval's value in that request.
const CVAL: usize = HEADER + 16 + 8;
/// A deadline that never comes, each a different one.
const FAR: u64 = 1 << 60;

fn answer_len() -> usize {
    HEADER + size_of::<wire::SetRegsResult>()
}

/// A driver whose VM is RUNNING.
fn running(path: &std::path::Path) -> io::Result<Driver> {
    let mut driver = Driver::connect(path, 1)?;
    for ask in [Ask::configure(VCPUS, 0, 0), Ask::resume()] {
        driver.fill(0, &ask.bytes(), 100);
        driver.push(0);
        driver.publish()?;
        driver.sleep(1)?;
        let slot = driver.pop();
        if driver.answer::<4>(slot) != [0; 4] {
            return Err(io::Error::other("the backend refuses to run the VM"));
        }
    }
    for slot in 0..SLOTS {
        let request = set_regs(u32::from(slot) % VCPUS, FAR + u64::from(slot));
        driver.fill(slot, &request, answer_len());
    }
    Ok(driver)
}

/// Keeps `depth` requests in flight for `time`. Returns how many were answered.
fn drive(driver: &mut Driver, depth: u16, place: Place, time: Duration) -> io::Result<f64> {
    let mut done = 0_u64;
    let mut cval = FAR;
    let mut ask = |driver: &mut Driver, slot: u16| {
        cval += 977;
        driver.amend(slot, CVAL, &cval.to_le_bytes());
        driver.push(slot);
    };
    driver.want_no_call();
    for slot in 0..depth {
        ask(driver, slot);
    }
    driver.publish()?;
    let end = Instant::now() + time;
    while Instant::now() < end {
        match place {
            // The backend cannot run while this thread polls.
            Place::OneCpu => driver.sleep(depth)?,
            Place::TwoCpus => driver.spin(1),
        }
        let count = driver.answered();
        for _ in 0..count {
            let slot = driver.pop();
            ask(driver, slot);
        }
        driver.publish()?;
        done += u64::from(count);
    }
    driver.sleep(depth)?;
    for _ in 0..depth {
        driver.pop();
    }
    Ok(done as f64 + f64::from(depth))
}

/// The same operations directly on the model: ns each.
fn straight(time: Duration) -> f64 {
    let profile = Profile {
        max_vcpus: VCPUS,
        request_queues: 1,
        frequency: 1_000_000_000,
        frequency_fixed: false,
        source: CounterSource::NotTold,
    };
    let mut vm = Vm::new(profile);
    let mut effects = Effects::default();
    let mut host = 1_000;
    let mut ask = |request: &[u8]| {
        host += 100;
        let call = Incoming::parse(request, MAX_MESSAGE, Token { queue: 1, head: 0 });
        let _ = vm.handle(Now::at(host), &call, &mut effects);
        effects.take_changed(|_| ());
        effects.notices.clear();
    };
    ask(&Ask::configure(VCPUS, 0, 0).bytes());
    ask(&Ask::resume().bytes());
    let mut requests: Vec<_> = (0..VCPUS).map(|vcpu| set_regs(vcpu, FAR)).collect();
    let mut cval = FAR;
    let mut done = 0_u64;
    let begin = Instant::now();
    while begin.elapsed() < time {
        for request in &mut requests {
            cval += 977;
            request[CVAL..CVAL + 8].copy_from_slice(&cval.to_le_bytes());
            ask(request);
        }
        done += u64::from(VCPUS);
    }
    begin.elapsed().as_nanos() as f64 / done as f64
}

/// See the module.
pub(super) fn requests(bench: &mut Bench) -> io::Result<()> {
    let turn = Duration::from_millis(60);
    for place in Place::ALL {
        for depth in [32, 128] {
            let name = format!("3 SET_REGS of 3, {depth} in flight, {}", place.name());
            if !bench.cpus.allows(place) {
                bench.report.skip(&name, "there is one CPU");
                continue;
            }
            let backend = bench.backend(true, &[])?;
            let mut driver = running(backend.socket_path())?;
            bench.cpus.split(place, backend.pid())?;
            drive(&mut driver, depth, place, turn)?;
            let (mut rates, mut costs, mut floors) = (vec![], vec![], vec![]);
            for _ in 0..bench.count(30, 5) {
                let (begin, before) = (Instant::now(), cpu_ns(backend.pid())?);
                let done = drive(&mut driver, depth, place, turn)?;
                let took = begin.elapsed().as_secs_f64();
                costs.push((cpu_ns(backend.pid())? - before) / done);
                rates.push(done / took);
                floors.push(straight(turn / 2));
            }
            let ratios = costs.iter().zip(&floors).map(|(cost, floor)| cost / floor);
            let ratio = Some(median(ratios));
            let floor = median(floors);
            bench.report.row(Row {
                name: format!("{name}: backend CPU per request"),
                ours: median(costs),
                floor: Some(floor),
                unit: "ns",
                ratio,
                reach: (depth == 128).then_some("≤ 250 ns"),
            });
            let rate = median(rates);
            bench.report.row(Row {
                name: format!("{name}: requests per second"),
                ours: rate / 1e6,
                floor: Some(1e3 / floor),
                unit: "M/s",
                ratio: Some(rate / (1e9 / floor)),
                reach: (depth == 128 && place == Place::TwoCpus).then_some("≥ 3 M/s"),
            });
        }
    }
    Ok(())
}
