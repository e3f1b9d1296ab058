//! The rows, by number.

mod clock;
mod control;
mod footprint;
mod gate;
mod growth;
mod latency;
mod restore;
mod throughput;
mod time_page;
mod timers;

use std::io;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use vhost_user_timer_frontend::{Frontend, Options};
use vhost_user_timer_protocol::Abi;

use super::Bench;
use vhost_user_timer_kit::backend_process::BackendProcess;

/// Measures a row.
type Row = fn(&mut Bench) -> io::Result<()>;

/// From 1.
pub(super) const ALL: [Row; 11] = [
    latency::round_trips,
    latency::polling,
    throughput::requests,
    growth::vcpus,
    gate::skew,
    timers::lateness,
    time_page::count,
    clock::readings,
    footprint::footprint,
    restore::done,
    control::delays,
];

/// Whatever takes longer has hung.
const LIMIT: Duration = Duration::from_secs(30);

fn other<E: std::error::Error + Send + Sync + 'static>(error: E) -> io::Error {
    io::Error::other(error)
}

/// A frontend whose VM has this many vCPUs.
fn configured(backend: &BackendProcess, vcpus: u32, options: Options) -> io::Result<Frontend> {
    let frontend = Frontend::connect(backend.socket_path(), options).map_err(other)?;
    let queue = frontend.queue();
    queue
        .configure(vcpus, Abi::Arm64, NonZeroU64::new(1_000_000_000), LIMIT)
        .map_err(other)?;
    Ok(frontend)
}

/// How long an action takes, ns.
fn ns<E>(act: impl FnOnce() -> Result<(), E>) -> Result<f64, E> {
    let begin = Instant::now();
    act()?;
    Ok(begin.elapsed().as_nanos() as f64)
}

/// The same, this many times.
fn samples<E>(count: usize, mut act: impl FnMut() -> Result<(), E>) -> Result<Vec<f64>, E> {
    (0..count).map(|_| ns(&mut act)).collect()
}
