//! What watches the guest's time from inside, in the background, and answers over a socket.
//!
//! On each vCPU there is a thread that reads the counter without end, and one that sleeps until
//! set times. No reading may be below one that was made before it, on any vCPU; no sleep may end
//! early. With `busy` there is one more thread on each vCPU, which writes to memory.
//!
//! Each answer is lines of `key=value`.

mod reader;
mod sleeper;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::nice;
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use self::reader::Reader;
use self::sleeper::Sleeper;
use crate::{Result, counter, number};

/// Where a witness listens.
const SOCKET: &str = "/run/witness";

/// What a witness says when it watches.
const READY: &str = "ready";

/// How long a reader may take to read once more.
const LIMIT: Duration = Duration::from_secs(10);

/// From one check whether it has read to the next.
const CHECK: Duration = Duration::from_millis(1);

/// The part of a second from which on the time between two readings is a gap: 20 µs.
const GAPS_A_SECOND: u64 = 50_000;

/// The page size of AArch64's Linux in this guest, or a divisor of it.
const PAGE: usize = 4096;

const MEBIBYTE: usize = 1 << 20;

/// Starts a witness in the background that also writes to so many MiB of memory, and returns when
/// it watches.
pub(crate) fn start(busy: &str) -> Result<()> {
    number::<usize>(busy)?;
    let mut child = Command::new("/proc/self/exe")
        .args(["witness", "run", busy])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    match line.trim_end() == READY {
        true => Ok(()),
        false => Err(format!("the witness did not start: {}", child.wait()?).into()),
    }
}

/// Asks the witness in the background, and prints its answer.
pub(crate) fn ask(question: &str) -> Result<()> {
    let mut stream =
        UnixStream::connect(SOCKET).map_err(|error| format!("no witness at {SOCKET}: {error}"))?;
    writeln!(stream, "{question}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.strip_prefix("error: ") {
        None => print!("{answer}"),
        Some(error) => return Err(error.trim_end().into()),
    }
    Ok(())
}

/// Watches and answers, until it is asked to stop.
pub(crate) fn run(busy: &str) -> Result<()> {
    // A witness that was killed leaves its socket.
    let _ = fs::remove_file(SOCKET);
    let listener = UnixListener::bind(SOCKET).map_err(|error| format!("{SOCKET}: {error}"))?;
    let mebibytes: usize = number(busy)?;
    let witness = Witness::start(std::thread::available_parallelism()?.get(), mebibytes);
    println!("{READY}");
    loop {
        let (stream, _) = listener.accept()?;
        let mut question = String::new();
        BufReader::new(&stream).read_line(&mut question)?;
        let words: Vec<_> = question.split_whitespace().collect();
        let answer = match words[..] {
            ["report"] => Ok(witness.report()),
            ["around", from, to] => witness.around(number(from)?, number(to)?),
            ["stop"] => return Ok(()),
            _ => Err(format!("no question: {question}").into()),
        };
        let answer = answer.unwrap_or_else(|error| format!("error: {error}\n"));
        // A peer that has gone is not waited for.
        let _ = (&stream).write_all(answer.as_bytes());
    }
}

/// Moves this thread to a CPU, if it is not there. While the CPU is offline it stays where it is.
fn pin(cpu: usize) {
    if sched_getcpu() != cpu {
        let mut set = CpuSet::new();
        set.set(cpu);
        let _ = sched_setaffinity(None, &set);
    }
}

/// The threads that watch.
struct Witness {
    readers: Vec<Arc<Reader>>,
    sleepers: Vec<Arc<Sleeper>>,
    /// Passes over each writer's memory.
    passes: Vec<Arc<AtomicU64>>,
}

impl Witness {
    fn start(vcpus: usize, busy: usize) -> Self {
        let published = Arc::new(AtomicU64::new(0));
        let threshold = counter::frequency() / GAPS_A_SECOND;
        let mut witness = Witness {
            readers: Vec::new(),
            sleepers: Vec::new(),
            passes: Vec::new(),
        };
        for cpu in 0..vcpus {
            let sleeper = Arc::new(Sleeper::default());
            witness.sleepers.push(Arc::clone(&sleeper));
            std::thread::spawn(move || sleeper.run(cpu));

            let reader = Arc::new(Reader::default());
            witness.readers.push(Arc::clone(&reader));
            let published = Arc::clone(&published);
            std::thread::spawn(move || {
                // Whatever else there is to do comes first: the readers are never done.
                let _ = nice(10);
                reader.run(cpu, &published, threshold)
            });
            if busy > 0 {
                let passes = Arc::new(AtomicU64::new(0));
                witness.passes.push(Arc::clone(&passes));
                let bytes = busy * MEBIBYTE / vcpus;
                std::thread::spawn(move || {
                    let _ = nice(10);
                    write(cpu, bytes, &passes)
                });
            }
        }
        witness
    }

    fn report(&self) -> String {
        let mut text = format!("vcpus={}\n", self.readers.len());
        for (vcpu, reader) in self.readers.iter().enumerate() {
            text += &format!("reader vcpu={vcpu} {}\n", reader.report());
        }
        for (vcpu, sleeper) in self.sleepers.iter().enumerate() {
            text += &format!("sleeper vcpu={vcpu} {}\n", sleeper.report());
        }
        for (vcpu, passes) in self.passes.iter().enumerate() {
            let passes = passes.load(Ordering::Relaxed);
            text += &format!("writer vcpu={vcpu} passes={passes}\n");
        }
        text
    }

    /// For each vCPU the gap in its readings around these two counts, when all have read again.
    fn around(&self, from: u64, to: u64) -> Result<String> {
        let mut text = String::new();
        for (vcpu, reader) in self.readers.iter().enumerate() {
            let began = Instant::now();
            while reader.last() < to {
                if began.elapsed() > LIMIT {
                    return Err(format!("vCPU {vcpu} has not read {to} within {LIMIT:?}").into());
                }
                std::thread::sleep(CHECK);
            }
            let gaps = reader.lock();
            if gaps.dropped_until > from {
                return Err(format!("the gaps of vCPU {vcpu} around {from} are not kept").into());
            }
            text += &match gaps.around(from, to) {
                Some(gap) => format!("vcpu={vcpu} before={} after={}\n", gap.before, gap.after),
                None => format!("vcpu={vcpu} none\n"),
            };
        }
        Ok(text)
    }
}

/// Writes to each page of its own memory without end, on this CPU.
fn write(cpu: usize, bytes: usize, passes: &AtomicU64) -> ! {
    let mut memory = vec![0_u8; bytes.max(PAGE)];
    loop {
        pin(cpu);
        for page in memory.chunks_mut(PAGE) {
            page[0] = page[0].wrapping_add(1);
        }
        // The compiler must not leave the writes out.
        std::hint::black_box(&mut *memory);
        passes.fetch_add(1, Ordering::Relaxed);
    }
}
