//! Shows faults of `vhost-user-backend` 0.24: one by `upstream NAME`, all by `upstream`.
//!
//! Each runs in a process of its own, since some end or hang it. The exit status is 0 if every
//! fault is still there.

mod backend;
mod connection;
mod memory;
mod rings;
mod threads;

use std::env;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

use backend::PATIENCE;

/// What takes so long waits forever. Too short, it hides only that a fault is gone.
const HANGS: Duration = Duration::from_secs(5);

/// How a fault shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    /// The program sees it, and says what it saw.
    Seen,
    /// SIGBUS ends the process.
    Sigbus,
    /// The program prints a line, and then waits forever.
    Hang,
}

/// A fault: its name, how it shows, and what shows it, which returns whether it is there.
type Fault = (&'static str, Sign, fn() -> bool);

const FAULTS: [Fault; 12] = [
    ("short-log", Sign::Sigbus, memory::short_log),
    ("refused-memory", Sign::Seen, memory::refused_memory),
    ("mem-slots", Sign::Seen, memory::mem_slots),
    ("log-later-region", Sign::Seen, memory::log_later_region),
    ("drop-hangs", Sign::Hang, threads::drop_hangs),
    ("half-made", Sign::Seen, threads::half_made),
    ("exit-event-leak", Sign::Seen, threads::exit_event_leak),
    ("panic-hangs", Sign::Seen, threads::panic_hangs),
    ("replaced-kick", Sign::Seen, rings::replaced_kick),
    ("kick-ends-worker", Sign::Seen, rings::kick_ends_worker),
    ("vring-num", Sign::Seen, rings::vring_num),
    ("connected-socket", Sign::Seen, connection::connected_socket),
];

/// Runs one in a child process. Returns whether the fault is there.
fn run((name, sign, _): Fault) -> bool {
    println!("{name}:");
    let program = env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args(["--child", name]);
    if sign == Sign::Hang {
        command.stdout(Stdio::piped());
    }
    let mut child = command.spawn().expect("a child process");
    if let Some(stdout) = &mut child.stdout {
        let mut begins = String::new();
        let read = BufReader::new(stdout).read_line(&mut begins);
        assert!(read.expect("the child's line") > 0, "it ended at once");
        print!("{begins}");
    }
    let pid = Pid::from_child(&child);
    let ended = pidfd_open(pid, PidfdFlags::empty()).expect("a child's pidfd");
    // A child that gives up by itself does so after one time-out.
    let patience = match sign {
        Sign::Hang => HANGS,
        Sign::Seen | Sign::Sigbus => 2 * PATIENCE,
    };
    let patience = Timespec::try_from(patience).expect("seconds");
    let mut ended = [PollFd::new(&ended, PollFlags::IN)];
    let status = match poll(&mut ended, Some(&patience)).expect("poll") {
        0 => None,
        _ => Some(child.wait().expect("a child")),
    };
    let is_there = match (sign, status) {
        (Sign::Hang, None) => {
            println!("  the process hangs");
            true
        }
        (_, None) => {
            println!("  the process hangs, unlike before");
            false
        }
        (Sign::Sigbus, Some(status)) => {
            println!("  {status}");
            status.signal() == Some(Signal::BUS.as_raw())
        }
        (Sign::Seen, Some(status)) => status.success(),
        (Sign::Hang, Some(_)) => false,
    };
    let _ = child.kill();
    let _ = child.wait();
    println!(
        "  {}",
        if is_there {
            "the fault is there"
        } else {
            "gone"
        }
    );
    is_there
}

fn main() -> ExitCode {
    let args: Vec<_> = env::args().skip(1).collect();
    let named = |name: &str| FAULTS.into_iter().find(|(known, ..)| *known == name);
    let is_there = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => FAULTS.map(run).iter().all(|is_there| *is_there),
        ["--list"] => {
            FAULTS.iter().for_each(|(name, ..)| println!("{name}"));
            true
        }
        ["--child", name] => named(name).is_some_and(|(.., show)| show()),
        [name] => match named(name) {
            Some(fault) => run(fault),
            None => {
                let names = FAULTS.map(|(name, ..)| name).join(", ");
                eprintln!("{name}: no such fault; there are {names}");
                return ExitCode::from(2);
            }
        },
        _ => {
            eprintln!("upstream [NAME | --list]");
            return ExitCode::from(2);
        }
    };
    if is_there {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
