//! Reads the guest's counts without a request, from the page that the backend writes:
//!
//! ```sh
//! vhost-user-timer --socket-path /tmp/a.sock --counter-source monotonic &
//! cargo run --example time_page /tmp/a.sock
//! ```

use std::error::Error;
use std::time::{Duration, Instant};

use vhost_user_timer_frontend::{Abi, Frontend, HostClock, Options, Phase};

const SECOND: Duration = Duration::from_secs(1);
const READINGS: u32 = 1_000_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: time_page SOCKET")?;
    let frontend = Frontend::connect(path.as_str(), Options::default())?;
    let queue = frontend.queue();
    if queue.info(SECOND)?.phase == Phase::New {
        queue.configure(1, Abi::Arm64, None, SECOND)?;
    }
    frontend.time_page().start(queue, SECOND)?;
    // What `--counter-source` names; a wrong one is found out.
    let clock = queue.guest_clock(HostClock::MONOTONIC, SECOND)?;

    queue.resume(SECOND)?;
    // Returns at once, by the page, since the VM runs.
    let offsets = queue.wait_run_by_page(0, SECOND)?;
    println!("running with cntvoff {:#x}", offsets.cntvoff);

    let began = Instant::now();
    let first = clock.counts().ok_or("the page cannot be read")?;
    let mut last = first;
    for _ in 1..READINGS {
        let counts = clock.counts().ok_or("the page cannot be read")?;
        if counts.virt_count < last.virt_count {
            return Err("the virtual count decreased".into());
        }
        last = counts;
    }
    println!(
        "{READINGS} readings of {} ns each, from virtual count {} to {}",
        began.elapsed().as_nanos() / u128::from(READINGS),
        first.virt_count,
        last.virt_count
    );

    queue.pause(SECOND)?;
    let frozen = clock.counts().ok_or("the page cannot be read")?;
    println!("paused, and frozen, at virtual count {}", frozen.virt_count);
    Ok(frontend.close()?)
}
