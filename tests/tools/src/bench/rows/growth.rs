//! Row 4: what a VM with many vCPUs costs.

use std::io;

use vhost_user_timer_frontend::{
    Answer, Operation, Options, RequestQueue, RestoreOptions, SavedVcpu,
};

use super::{Bench, LIMIT, configured, ns, other};
use crate::bench::report::{Plot, Series};
use crate::bench::stats::{exponent, median};

const SIZES: [u32; 5] = [1, 8, 64, 512, 4096];

/// Makes one request for each vCPU, as many at a time as fit into the queue.
fn each<T: Answer>(
    queue: &RequestQueue,
    vcpus: u32,
    call: fn(u32) -> Operation<'static, T>,
) -> io::Result<()> {
    // WAIT_RUNs get three quarters of a queue.
    let window = queue.capacity() as u32 / 2;
    let mut first = 0;
    while first < vcpus {
        let end = vcpus.min(first + window);
        let tickets: Result<Vec<_>, _> =
            (first..end).map(|vcpu| queue.submit(&call(vcpu))).collect();
        queue.kick();
        // The last request is answered last, so all answers are there then.
        for ticket in tickets.map_err(other)?.into_iter().rev() {
            ticket.wait(LIMIT).map_err(other)?;
        }
        first = end;
    }
    Ok(())
}

/// RESTORE_DONE of each vCPU.
pub(super) fn each_done(queue: &RequestQueue, vcpus: u32) -> io::Result<()> {
    each(queue, vcpus, Operation::restore_done)
}

fn restore(queue: &RequestQueue, rows: &[SavedVcpu]) -> io::Result<()> {
    let vcpus = rows.len() as u32;
    let options = RestoreOptions::default().autorun(true);
    queue.restore_begin(options, LIMIT).map_err(other)?;
    queue.set_vm(rows, LIMIT).map_err(other)?;
    each_done(queue, vcpus)?;
    each(queue, vcpus, Operation::wait_run)
}

/// See the module.
pub(super) fn vcpus(bench: &mut Bench) -> io::Result<()> {
    let (mut reads, mut restores) = (vec![], vec![]);
    for vcpus in SIZES {
        let backend = bench.backend(true, &["--max-vcpus=4096"])?;
        let options = Options::default().queue_size(1024);
        let frontend = configured(&backend, vcpus, options)?;
        let queue = frontend.queue();
        let rows = queue.get_vm(0, vcpus, LIMIT).map_err(other)?.vcpus;
        let (mut read, mut restored) = (vec![], vec![]);
        for _ in 0..bench.count(60, 10) {
            read.push(ns(|| queue.get_vm(0, vcpus, LIMIT).map(drop)).map_err(other)?);
            restored.push(ns(|| restore(queue, &rows))?);
            queue.pause(LIMIT).map_err(other)?;
        }
        let x = f64::from(vcpus);
        for (name, samples, points) in [
            ("GET_VM", read, &mut reads),
            ("restore, begin to last gate", restored, &mut restores),
        ] {
            let time = median(samples);
            let reach = (vcpus == 512 && name != "GET_VM").then_some("≤ 2000 µs");
            let name = format!("4 {name}, {vcpus} vCPUs");
            bench.report.number(name.clone(), time / 1e3, "µs", reach);
            bench
                .report
                .number(format!("{name}: per vCPU"), time / x, "ns", None);
            points.push((x, time));
        }
    }
    for (name, points) in [("GET_VM", &reads), ("restore", &restores)] {
        let name = format!("4 {name}: exponent of growth, 64 to 4096 vCPUs");
        let grown = exponent(&points[2..]);
        bench.report.number(name, grown, "", Some("≤ 1.05"));
    }
    let series = |name: &str, points: &[(f64, f64)]| Series {
        name: name.to_owned(),
        points: points.iter().map(|(x, y)| (*x, y / 1e3)).collect(),
    };
    bench.report.plot(Plot {
        title: "4 time by vCPUs".to_owned(),
        x: "vCPUs",
        y: "µs",
        log_y: true,
        series: vec![series("GET_VM", &reads), series("restore", &restores)],
    });
    Ok(())
}
