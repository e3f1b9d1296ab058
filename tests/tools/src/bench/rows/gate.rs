//! Row 5: how far apart the vCPUs are released.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::thread::futex;
use vhost_user_timer_frontend::{Error, Options, RequestQueue, RestoreOptions};

use super::{Bench, LIMIT, configured, other};
use crate::bench::crew::Crew;
use crate::bench::stats::Pair;

/// By then all vCPU threads sleep.
const ASLEEP: Duration = Duration::from_millis(5);

/// The vCPUs wait for a restore.
const RESTORE: usize = 0;
/// The vCPUs wait on a futex.
const FUTEX: usize = 1;

/// How a vCPU waits.
pub(super) type Wait = fn(&RequestQueue, u32) -> Result<(), Error>;

/// With a request of its own.
pub(super) fn by_queue(queue: &RequestQueue, vcpu: u32) -> Result<(), Error> {
    queue.wait_run(vcpu, LIMIT).map(drop)
}

pub(super) fn by_page(queue: &RequestQueue, vcpu: u32) -> Result<(), Error> {
    queue.wait_run_by_page(vcpu, LIMIT).map(drop)
}

/// Makes all threads of a crew wait, and releases them. Returns the time from first to last, ns.
fn apart(crew: &Crew<'_>, job: usize, release: impl FnOnce() -> io::Result<()>) -> io::Result<f64> {
    // If the release fails, they return at their time-out.
    let done = crew.round(job, || {
        std::thread::sleep(ASLEEP);
        release()
    })?;
    Ok(done.last - done.first)
}

/// Releases a crew by a restore, which ends when the last vCPU is done.
fn by_restore(crew: &Crew<'_>, queue: &RequestQueue) -> io::Result<f64> {
    let options = RestoreOptions::default().autorun(true);
    queue.restore_begin(options, LIMIT).map_err(other)?;
    let saved = queue.get_vm(0, crew.threads(), LIMIT).map_err(other)?;
    queue.set_vm(&saved.vcpus, LIMIT).map_err(other)?;
    for vcpu in 1..crew.threads() {
        queue.restore_done(vcpu, LIMIT).map_err(other)?;
    }
    let apart = apart(crew, RESTORE, || {
        queue.restore_done(0, LIMIT).map(drop).map_err(other)
    })?;
    queue.pause(LIMIT).map_err(other)?;
    Ok(apart)
}

/// Releases a crew by one futex.
fn by_futex(crew: &Crew<'_>, word: &AtomicU32) -> io::Result<f64> {
    word.store(0, Ordering::Release);
    apart(crew, FUTEX, || {
        word.store(1, Ordering::Release);
        futex::wake(word, futex::Flags::PRIVATE, i32::MAX as u32)?;
        Ok(())
    })
}

/// See the module.
pub(super) fn skew(bench: &mut Bench) -> io::Result<()> {
    for threads in [8, 64] {
        let ways: [(&str, Wait); 2] = [("queue", by_queue), ("time page", by_page)];
        for (way, wait) in ways {
            let backend = bench.backend(true, &[])?;
            let frontend = configured(&backend, threads, Options::default())?;
            let queue = frontend.queue();
            if way == "time page" {
                let page = frontend.time_page();
                page.start(queue, LIMIT).map_err(other)?;
            }
            let word = AtomicU32::new(0);
            let work = |job, vcpu| {
                if job == RESTORE {
                    return wait(queue, vcpu);
                }
                while word.load(Ordering::Acquire) == 0 {
                    let _ = futex::wait(&word, futex::Flags::PRIVATE, 0, None);
                }
                Ok(())
            };
            let rounds = bench.count(300, 30);
            let pair = Crew::run(threads, &work, |crew| {
                by_restore(crew, queue)?;
                by_futex(crew, &word)?;
                let mut pair = Pair::default();
                for _ in 0..rounds {
                    let ours = by_restore(crew, queue)?;
                    pair.add(vec![ours], vec![by_futex(crew, &word)?]);
                }
                Ok(pair)
            })?;
            let name = format!("5 gate skew, {threads} threads, by {way}");
            let reach = [Some("ratio ≤ 1.2"), None];
            bench.report.latency(&name, &pair, reach);
        }
    }
    Ok(())
}
