//! Row 10: a restore with DONE, and the same by requests of their own.

use std::io;

use vhost_user_timer_frontend::{
    Error, Frontend, Operation, Options, Phase, RequestQueue, RestoreOptions, SavedVcpu,
};

use super::gate::{by_page, by_queue};
use super::growth::each_done;
use super::{Bench, LIMIT, configured, ns, other};
use crate::bench::crew::Crew;
use crate::bench::stats::Pair;
use vhost_user_timer_kit::backend_process::BackendProcess;

/// vCPUs with a thread each.
const THREADS: u32 = 512;
/// vCPUs whose registers are in one place.
const MANY: u32 = 4096;

/// SET_VM with DONE, and the wait.
const DONE: usize = 0;
/// SET_VM, RESTORE_DONE and WAIT_RUN.
const APART: usize = 1;

/// See the module.
pub(super) fn done(bench: &mut Bench) -> io::Result<()> {
    threads(bench)?;
    whole_vm(bench)
}

fn begin(queue: &RequestQueue) -> io::Result<()> {
    let options = RestoreOptions::default().autorun(true);
    let begun = queue.restore_begin(options, LIMIT);
    begun.map(drop).map_err(other)
}

/// A VM of so many vCPUs, and their registers.
fn vm(bench: &Bench, vcpus: u32) -> io::Result<(BackendProcess, Frontend, Vec<SavedVcpu>)> {
    let backend = bench.backend(true, &["--max-vcpus=4096"])?;
    let options = Options::default().queue_size(1024);
    let frontend = configured(&backend, vcpus, options)?;
    let saved = frontend.queue().get_vm(0, vcpus, LIMIT).map_err(other)?;
    Ok((backend, frontend, saved.vcpus))
}

/// How a vCPU's thread restores its vCPU with DONE.
type Way = fn(&RequestQueue, &[SavedVcpu], u32) -> Result<(), Error>;

/// With one kick for both requests, as `VcpuRestore::run` does.
fn done_by_queue(queue: &RequestQueue, own: &[SavedVcpu], vcpu: u32) -> Result<(), Error> {
    let done = queue.submit(&Operation::set_vm_done(own))?;
    let run = queue.submit(&Operation::wait_run(vcpu))?;
    done.wait(LIMIT)?;
    run.wait(LIMIT).map(drop)
}

fn done_by_page(queue: &RequestQueue, own: &[SavedVcpu], vcpu: u32) -> Result<(), Error> {
    queue.set_vm_done(own, LIMIT)?;
    by_page(queue, vcpu)
}

/// Each vCPU's thread restores its vCPU, from the start of all threads to the last one's release.
fn threads(bench: &mut Bench) -> io::Result<()> {
    let ways: [(&str, Way); 2] = [("queue", done_by_queue), ("time page", done_by_page)];
    for (way, with_done) in ways {
        let (_backend, frontend, rows) = vm(bench, THREADS)?;
        let queue = frontend.queue();
        frontend.time_page().start(queue, LIMIT).map_err(other)?;
        let work = |job, vcpu: u32| -> Result<(), Error> {
            let own = std::slice::from_ref(&rows[vcpu as usize]);
            if job == DONE {
                return with_done(queue, own, vcpu);
            }
            queue.set_vm(own, LIMIT)?;
            queue.restore_done(vcpu, LIMIT)?;
            by_queue(queue, vcpu)
        };
        let rounds = bench.count(100, 20);
        let pair = Crew::run(THREADS, &work, |crew| {
            let restore = |job| -> io::Result<f64> {
                begin(queue)?;
                let done = crew.round(job, || Ok(()))?;
                queue.pause(LIMIT).map_err(other)?;
                Ok(done.last)
            };
            let mut pair = Pair::default();
            for _ in 0..rounds {
                let ours = restore(DONE)?;
                pair.add(vec![ours], vec![restore(APART)?]);
            }
            Ok(pair)
        })?;
        let name = format!("10 restore by {THREADS} threads, DONE and wait by {way}");
        bench
            .report
            .latency(&name, &pair, [Some("ratio ≤ 0.5"), None]);
    }
    Ok(())
}

/// One thread restores all vCPUs, from RESTORE_BEGIN until the time page says RUNNING.
fn whole_vm(bench: &mut Bench) -> io::Result<()> {
    let (_backend, frontend, rows) = vm(bench, MANY)?;
    let queue = frontend.queue();
    let page = frontend.time_page();
    page.start(queue, LIMIT).map_err(other)?;
    let until_running = || {
        while page.read().is_none_or(|time| time.phase != Phase::Running) {
            std::hint::spin_loop();
        }
    };
    let restore = |job| {
        let time = ns(|| -> io::Result<()> {
            begin(queue)?;
            if job == DONE {
                queue.set_vm_done(&rows, LIMIT).map_err(other)?;
            } else {
                queue.set_vm(&rows, LIMIT).map_err(other)?;
                each_done(queue, MANY)?;
            }
            until_running();
            Ok(())
        })?;
        queue.pause(LIMIT).map_err(other)?;
        io::Result::Ok(time)
    };
    let mut pair = Pair::default();
    for _ in 0..bench.count(200, 40) {
        let ours = restore(DONE)?;
        pair.add(vec![ours], vec![restore(APART)?]);
    }
    let name = format!("10 restore of {MANY} vCPUs by two requests, to a RESTORE_DONE each");
    bench.report.latency(&name, &pair, [Some("≤ 500 µs"), None]);
    Ok(())
}
