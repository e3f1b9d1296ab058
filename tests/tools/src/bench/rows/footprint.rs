//! Row 9: the resources that the process uses.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use vhost_user_timer_frontend::{Frontend, Options};

use super::timers::expire;
use super::{Bench, LIMIT, configured, other};
use crate::bench::place::{cpu_ns, kib, sleeps};
use crate::bench::report::Report;
use crate::bench::stats::median;
use vhost_user_timer_kit::backend_process::BackendProcess;
use vhost_user_timer_kit::raw_driver::Usage;

/// Long enough for everything that was started to end.
const SETTLE: Duration = Duration::from_millis(200);

fn resident(backend: &BackendProcess) -> io::Result<f64> {
    kib(backend.pid(), "status", "VmRSS:")
}

fn private(backend: &BackendProcess) -> io::Result<f64> {
    let of = |name| kib(backend.pid(), "smaps_rollup", name);
    Ok(of("Private_Clean:")? + of("Private_Dirty:")?)
}

/// See the module.
pub(super) fn footprint(bench: &mut Bench) -> io::Result<()> {
    let binary = fs::metadata(&bench.program)?.len() as f64;
    bench
        .report
        .number("9 binary size", binary / 1e6, "MB", None);
    start_up(bench)?;

    let backend = bench.backend(true, &["--max-vcpus=4096"])?;
    let frontend = configured(&backend, 8, Options::default())?;
    frontend.queue().resume(LIMIT).map_err(other)?;
    std::thread::sleep(SETTLE);
    let usage = Usage::of(backend.pid())?;
    let report = &mut bench.report;
    let mb = resident(&backend)? / 1e3;
    report.number("9 resident, a frontend connected", mb, "MB", Some("≤ 4 MB"));
    let mb = private(&backend)? / 1e3;
    report.number("9 private memory, a frontend connected", mb, "MB", None);
    report.number("9 threads", usage.threads as f64, "", None);
    report.number("9 descriptors", usage.fds as f64, "", None);
    let (slept, ran) = (sleeps(backend.pid())?, cpu_ns(backend.pid())?);
    let time = bench.count(5, 1);
    std::thread::sleep(Duration::from_secs(time as u64));
    let wakeups = (sleeps(backend.pid())? - slept) / time as f64;
    let cpu = (cpu_ns(backend.pid())? - ran) / time as f64 / 1e3;
    let report = &mut bench.report;
    report.number("9 wake-ups per second, idle", wakeups, "1/s", Some("0"));
    report.number("9 CPU per second, idle", cpu, "µs", None);
    drop(frontend);
    drop(backend);
    per_vcpu(bench)?;
    endurance(bench)
}

fn start_up(bench: &mut Bench) -> io::Result<()> {
    let mut times = Vec::new();
    for _ in 0..bench.count(30, 5) {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("socket");
        let mut command = std::process::Command::new(&bench.program);
        command
            .arg("--socket-path")
            .arg(&path)
            .arg("--log-level=off");
        let begin = Instant::now();
        let mut child = command.spawn()?;
        while std::os::unix::net::UnixStream::connect(&path).is_err() {
            if begin.elapsed() > LIMIT {
                return Err(io::Error::other("the backend does not listen"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        times.push(begin.elapsed().as_nanos() as f64);
        child.kill()?;
        child.wait()?;
    }
    let time = median(times) / 1e6;
    bench
        .report
        .number("9 start to listening", time, "ms", Some("≤ 10 ms"));
    Ok(())
}

fn per_vcpu(bench: &mut Bench) -> io::Result<()> {
    let mut used = [0.0; 2];
    for (used, vcpus) in used.iter_mut().zip([1, 4096]) {
        let backend = bench.backend(true, &["--max-vcpus=4096"])?;
        let frontend = configured(&backend, vcpus, Options::default())?;
        frontend.queue().resume(LIMIT).map_err(other)?;
        std::thread::sleep(SETTLE);
        *used = kib(backend.pid(), "status", "RssAnon:")?;
    }
    let bytes = (used[1] - used[0]) * 1024.0 / 4095.0;
    bench
        .report
        .number("9 memory per vCPU", bytes, "B", Some("≤ 512 B"));
    Ok(())
}

/// What an idle backend has.
struct Holdings {
    usage: Usage,
    private: f64,
}

impl Holdings {
    fn of(backend: &BackendProcess) -> io::Result<Self> {
        std::thread::sleep(SETTLE);
        Ok(Holdings {
            usage: Usage::of(backend.pid())?,
            private: private(backend)?,
        })
    }

    /// Reports how much more it has than before.
    fn report(&self, before: &Holdings, what: &str, report: &mut Report) {
        let more = |now: usize, before: usize| now as f64 - before as f64;
        let fds = more(self.usage.fds, before.usage.fds);
        let threads = more(self.usage.threads, before.usage.threads);
        let memory = self.private - before.private;
        for (of, more, unit, reach) in [
            ("descriptors", fds, "", Some("0")),
            ("threads", threads, "", Some("0")),
            ("private memory", memory, "KiB", None),
        ] {
            report.number(format!("9 more {of} {what}"), more, unit, reach);
        }
    }
}

fn endurance(bench: &mut Bench) -> io::Result<()> {
    let count = bench.count(10_000, 500);
    let backend = bench.backend(true, &[])?;
    let connect = || Frontend::connect(backend.socket_path(), Options::default());
    for _ in 0..50 {
        connect().map_err(other)?.close().map_err(other)?;
    }
    let before = Holdings::of(&backend)?;
    for _ in 0..count {
        connect().map_err(other)?.close().map_err(other)?;
    }
    let after = Holdings::of(&backend)?;
    let what = format!("after {count} reconnects");
    after.report(&before, &what, &mut bench.report);

    let mut frontend = configured(&backend, 1, Options::default())?;
    let mut events = frontend
        .take_events()
        .ok_or_else(|| io::Error::other("the events are taken"))?;
    let queue = frontend.queue();
    let offset = queue.resume(LIMIT).map_err(other)?.cntvoff;
    let before = Holdings::of(&backend)?;
    for _ in 0..count {
        expire(queue, &mut events, offset)?;
    }
    let after = Holdings::of(&backend)?;
    let what = format!("after {count} alarms");
    after.report(&before, &what, &mut bench.report);
    Ok(())
}
