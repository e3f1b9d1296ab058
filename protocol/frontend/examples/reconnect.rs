//! A VMM that outlives its backend. Each line of input asks for the VM's virtual count; kill the
//! backend and start it again in between, and the count goes on:
//!
//! ```sh
//! vhost-user-timer --socket-path /tmp/a.sock --state-file /dev/shm/a.state &
//! cargo run --example reconnect /tmp/a.sock
//! ```

use std::error::Error;
use std::io::BufRead;
use std::thread;
use std::time::Duration;

use vhost_user_timer_frontend::{Abi, Frontend, Options, Phase, Reconnect, Register};

const MINUTE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: reconnect SOCKET")?;
    let options = Options::default().reconnect(Reconnect::default().patience(MINUTE));
    let frontend = Frontend::connect(path.as_str(), options)?;
    let queue = frontend.queue();
    if queue.info(MINUTE)?.phase == Phase::New {
        queue.configure(1, Abi::Arm64, None, MINUTE)?;
    }
    queue.resume(MINUTE)?;
    println!("the VM runs; each line asks for its count, the end of input ends this");

    thread::scope(|scope| {
        // Brings a lost connection back at once, also while nobody asks for anything.
        let keeper = scope.spawn(|| frontend.keep_connected());
        let asked = ask(&frontend);
        // The keeper ends by the shutdown, or has ended since the backend did not come back.
        frontend.shutdown_handle().shut_down();
        let kept = keeper.join().map_err(|_| "a thread panicked")?;
        asked.map_err(|error| format!("{error} ({kept})").into())
    })
}

fn ask(frontend: &Frontend) -> Result<(), Box<dyn Error>> {
    let count = [Register::TimerCnt.id(Abi::Arm64)];
    for line in std::io::stdin().lock().lines() {
        line?;
        // If the backend is away, this waits until it is back.
        let values = frontend.queue().get_regs(0, &count, MINUTE)?;
        println!("virtual count {}", values[0].value);
    }
    Ok(())
}
