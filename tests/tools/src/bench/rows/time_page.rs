//! Row 7: the guest's count, read by the time page.

use std::hint::black_box;
use std::io;

use rustix::time::{ClockId, clock_gettime};
use vhost_user_timer_counter::{HostCounter, Source};
use vhost_user_timer_frontend::{Frontend, HostClock, Options};
use vhost_user_timer_protocol::Abi;

use super::{Bench, LIMIT, other, samples};
use crate::bench::report::Row;
use crate::bench::stats::Pair;
use vhost_user_timer_kit::backend_process::BackendProcess;

/// Readings that are timed together, because one is as short as a reading of the clock.
const BATCH: usize = 1000;
/// Batches of each kind in a round.
const ROUND: usize = 10;

/// Times something that is read, in ns each.
fn readings(mut read: impl FnMut() -> io::Result<()>) -> io::Result<Vec<f64>> {
    let batch = || (0..BATCH).try_for_each(|_| read());
    let batches = samples(ROUND, batch)?;
    Ok(batches.into_iter().map(|ns| ns / BATCH as f64).collect())
}

fn gettime() -> io::Result<()> {
    black_box(clock_gettime(ClockId::Monotonic));
    Ok(())
}

/// A VM's own counter, read by the ioctl that a VMM would use.
#[cfg(target_arch = "x86_64")]
fn kvm() -> Result<impl FnMut() -> io::Result<()>, Box<dyn std::error::Error>> {
    const IA32_TSC: u32 = 0x10;
    let vcpu = kvm_ioctls::Kvm::new()?.create_vm()?.create_vcpu(0)?;
    let entry = kvm_bindings::kvm_msr_entry {
        index: IA32_TSC,
        ..Default::default()
    };
    let mut msrs = kvm_bindings::Msrs::from_entries(&[entry])?;
    Ok(move || match vcpu.get_msrs(&mut msrs) {
        Ok(1) => Ok(()),
        Ok(_) => Err(io::Error::other("KVM did not return the guest's counter")),
        Err(error) => Err(error.into()),
    })
}

/// Only x86-64's KVM is measured.
#[cfg(not(target_arch = "x86_64"))]
fn kvm() -> Result<fn() -> io::Result<()>, Box<dyn std::error::Error>> {
    Err(format!("no ioctl is measured on {}", std::env::consts::ARCH).into())
}

/// See the module.
pub(super) fn count(bench: &mut Bench) -> io::Result<()> {
    for source in ["monotonic", "tsc"] {
        let name = format!("7 count by the time page, {source}");
        let option = format!("--counter-source={source}");
        match bench.backend(true, &[&option]) {
            Ok(backend) => read(bench, &backend, source, &name)?,
            Err(_) => bench.report.skip(&name, "there is no such counter here"),
        }
    }
    Ok(())
}

fn read(bench: &mut Bench, backend: &BackendProcess, source: &str, name: &str) -> io::Result<()> {
    let options = Options::default();
    let frontend = Frontend::connect(backend.socket_path(), options).map_err(other)?;
    let queue = frontend.queue();
    let host = match source {
        "tsc" => {
            let tsc = HostCounter::open(Source::Tsc).map_err(other)?;
            let frequency = queue.info(LIMIT).map_err(other)?.frequency;
            HostClock::Counter(tsc.at_rate(frequency))
        }
        _ => HostClock::MONOTONIC,
    };
    queue.configure(1, Abi::Arm64, None, LIMIT).map_err(other)?;
    let page = frontend.time_page();
    page.start(queue, LIMIT).map_err(other)?;
    queue.resume(LIMIT).map_err(other)?;
    let clock = queue.guest_clock(host, LIMIT).map_err(other)?;
    let ours = || {
        let counts = black_box(clock.counts());
        let unreadable = || io::Error::other("the time page cannot be read although the VM runs");
        counts.map(|_| ()).ok_or_else(unreadable)
    };
    let mut kvm = kvm();
    let (mut to_gettime, mut to_kvm) = (Pair::default(), Pair::default());
    for _ in 0..bench.count(200, 40) {
        to_gettime.add(readings(ours)?, readings(gettime)?);
        if let Ok(kvm) = &mut kvm {
            to_kvm.add(readings(ours)?, readings(kvm)?);
        }
    }
    let reach = match source {
        "tsc" => "ratio < 1",
        _ => "ratio ≤ 1.2",
    };
    let row = |beside: &str, pair: &Pair, reach| {
        let [ours, floor] = pair.medians();
        Row {
            name: format!("{name}, to {beside}"),
            ours,
            floor: Some(floor),
            unit: "ns",
            ratio: Some(pair.ratio(0.5)),
            reach: Some(reach),
        }
    };
    bench.report.row(row("clock_gettime", &to_gettime, reach));
    if to_kvm.is_empty() {
        let name = format!("{name}, to a KVM ioctl");
        bench.report.skip(&name, "/dev/kvm cannot be used here");
    } else {
        bench.report.row(row("KVM_GET_MSRS", &to_kvm, "ratio < 1"));
    }
    Ok(())
}
