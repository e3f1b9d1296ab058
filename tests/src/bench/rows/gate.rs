//! Row 5: how far apart the vCPUs are let go.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;
use vhost_user_timer_protocol::frontend::{Error, Options, RequestQueue, RestoreOptions};

use super::{Bench, LIMIT, configured, other};
use crate::bench::stats::Pair;

/// Time between the first and the last of these.
fn apart(instants: &[Instant]) -> f64 {
    let first = instants.iter().min();
    let last = instants.iter().max();
    first.zip(last).map_or(0.0, |(first, last)| {
        last.duration_since(*first).as_nanos() as f64
    })
}

/// How a vCPU waits.
type Wait = fn(&RequestQueue, u32) -> Result<(), Error>;

/// With a request of its own.
fn by_queue(queue: &RequestQueue, vcpu: u32) -> Result<(), Error> {
    queue.wait_run(vcpu, LIMIT).map(drop)
}

fn by_page(queue: &RequestQueue, vcpu: u32) -> Result<(), Error> {
    queue.wait_run_by_page(vcpu, LIMIT).map(drop)
}

/// A restore whose vCPUs wait in threads of their own.
fn restore(queue: &RequestQueue, threads: u32, wait: Wait) -> io::Result<f64> {
    let options = RestoreOptions {
        autorun: true,
        ..Default::default()
    };
    queue
        .restore_begin(threads, options, LIMIT)
        .map_err(other)?;
    let rows = queue.get_vm(0, threads, LIMIT).map_err(other)?.vcpus;
    queue.set_vm(&rows, LIMIT).map_err(other)?;
    for vcpu in 1..threads {
        queue.restore_done(vcpu, LIMIT).map_err(other)?;
    }
    let released = std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..threads)
            .map(|vcpu| {
                scope.spawn(move || {
                    wait(queue, vcpu)?;
                    Ok(Instant::now())
                })
            })
            .collect();
        // All of them sleep by then.
        std::thread::sleep(Duration::from_millis(5));
        queue.restore_done(0, LIMIT).map_err(other)?;
        let instants = waiting.into_iter().map(|thread| match thread.join() {
            Ok(instant) => instant.map_err(other::<Error>),
            Err(_) => Err(io::Error::other("a vCPU thread panicked")),
        });
        instants.collect::<io::Result<Vec<_>>>()
    })?;
    queue.pause(false, LIMIT).map_err(other)?;
    Ok(apart(&released))
}

/// As many threads on one futex.
fn by_futex(threads: u32) -> io::Result<f64> {
    let gate = AtomicU32::new(0);
    let flags = futex::Flags::PRIVATE;
    let released = std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    while gate.load(Ordering::Acquire) == 0 {
                        let _ = futex::wait(&gate, flags, 0, None);
                    }
                    Instant::now()
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(5));
        gate.store(1, Ordering::Release);
        futex::wake(&gate, flags, i32::MAX as u32)?;
        let instants = waiting.into_iter().map(|thread| {
            let instant = thread.join();
            instant.map_err(|_| io::Error::other("a thread panicked"))
        });
        instants.collect::<io::Result<Vec<_>>>()
    })?;
    Ok(apart(&released))
}

/// See the module.
pub(super) fn skew(bench: &mut Bench) -> io::Result<()> {
    for threads in [8, 64] {
        let ways: [(&str, Wait); 2] = [("queue", by_queue), ("time page", by_page)];
        for (way, wait) in ways {
            let backend = bench.backend(true, &[])?;
            let frontend = configured(&backend, threads, Options::default())?;
            let queue = &frontend.queues()[0];
            if way == "time page" {
                let page = frontend.time_page();
                page.start(queue, LIMIT).map_err(other)?;
            }
            restore(queue, threads, wait)?;
            by_futex(threads)?;
            let mut pair = Pair::default();
            for _ in 0..bench.count(150, 25) {
                let ours = restore(queue, threads, wait)?;
                pair.add(vec![ours], vec![by_futex(threads)?]);
            }
            let name = format!("5 gate skew, {threads} threads, by {way}");
            let reach = [Some("ratio ≤ 1.2"), None];
            bench.report.latency(&name, &pair, reach);
        }
    }
    Ok(())
}
