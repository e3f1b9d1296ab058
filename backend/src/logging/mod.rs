//! The log, on standard error.
//!
//! A thread that logs never waits for the reader of standard error, which may be a pipe that nobody
//! reads: lines go to a bounded queue, and one thread writes them. Lines without room are counted,
//! and the count is written when there is room again.
//!
//! What a peer does cannot flood the log: each place in the code has a limit for each peer, and
//! lines beyond it are counted and reported every 10 s. A thread that serves a peer says so by
//! [`Peer::owns_thread`]. Lines of other threads are limited the same way, as those of no peer.
//! Lines at debug and trace, one for each request, have no such limit: they are asked for by the
//! launcher. They take half of the queue at most, so that they cost no other line its place.
//!
//! The end of the process waits for lines that are not written yet: 100 ms for the reader of
//! standard error, 1 s for the writing thread where standard error takes lines.

mod journal;
mod limit;
mod line;
mod peer;
mod queue;
mod utc;
mod writer;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write as _};
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::event::Timespec;

use limit::{Limiter, Place, REPORT_AFTER, Verdict};
use line::Form;
pub use peer::Peer;
use queue::Queue;
use writer::{Stderr, Writer, is_writable};

/// How long the process waits, before it ends, for a reader of standard error.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long it waits for the writing thread where no reader is waited for. On a busy machine that
/// thread may not have run for a while, and the line that is left may say why a start failed.
const LIMIT: Duration = Duration::from_secs(5);

/// The writing thread's name.
const THREAD: &str = "log";

/// The thread calls few functions, and none of them recursively.
const STACK: usize = 128 * 1024;

static LOGGER: Logger = Logger {
    limiter: Limiter::new(),
    queue: Queue::new(),
    form: OnceLock::new(),
    started: OnceLock::new(),
};

struct Logger {
    limiter: Limiter,
    queue: Queue,
    /// How lines are written, once that is known.
    form: OnceLock<Form>,
    /// There is a writing thread.
    started: OnceLock<()>,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let (level, peer, now) = (record.level(), Peer::of_thread(), Instant::now());
        let text = || record.args().to_string();
        let entry = || self.form().entry(SystemTime::now(), level, peer, &text());
        if level > Level::Info {
            self.queue.push_detail(entry());
            return;
        }
        let place = Place::of(record, peer);
        match self.limiter.judge(place, now, level, peer, text) {
            Verdict::Write => {
                self.queue.push(entry());
            }
            Verdict::LeaveOut => {}
            Verdict::LeaveOutFirst => self.queue.report_at(now + REPORT_AFTER),
        }
    }

    fn flush(&self) {}
}

impl Logger {
    fn form(&self) -> &Form {
        self.form.get_or_init(|| Form::new(None))
    }
}

/// Has each line name the VM, where it has a name. To be called before anything else here.
pub fn name_vm(name: Option<&str>) {
    LOGGER.form.get_or_init(|| Form::new(name));
}

/// Starts the log: lines of this level and more severe ones are written. Where stderr is the
/// journal's, lines have the journal's form. With [`LevelFilter::Off`] there is no thread. A panic
/// is reported by the log as well from now on.
///
/// # Errors
///
/// Where the system refuses the thread. Called a second time, this changes nothing.
pub fn start(level: LevelFilter) -> io::Result<()> {
    let form = LOGGER.form();
    if level != LevelFilter::Off && LOGGER.started.get().is_none() {
        std::thread::Builder::new()
            .name(THREAD.to_owned())
            .stack_size(STACK)
            .spawn(|| Writer::new(Stderr, form).run(&LOGGER.queue, &LOGGER.limiter))?;
        let _ = LOGGER.started.set(());
        if log::set_logger(&LOGGER).is_ok() {
            log::set_max_level(level);
        }
    }
    std::panic::set_hook(Box::new(panicked));
    Ok(())
}

/// Has lines wait for the log's first line ([`first`]). Where the process ends before it, they are
/// written then.
pub fn wait_for_first() {
    LOGGER.queue.hold();
}

/// Writes the log's first line, and after it those that wait for it.
pub fn first(text: &str) {
    let line = || {
        LOGGER
            .form()
            .entry(SystemTime::now(), Level::Info, None, text)
    };
    let is_wanted = Level::Info <= log::max_level();
    LOGGER.queue.release(is_wanted.then(line));
}

/// Whether standard error is a stream to the journal.
pub fn is_journal() -> bool {
    LOGGER.form().journal
}

/// Writes to standard error, after the program's name, whatever the log's level: the program's own
/// last words. Waits for the reader of standard error for 100 ms at most.
pub fn say(text: &str) {
    let words = LOGGER.form().words(Peer::of_thread(), text);
    if LOGGER.started.get().is_some() {
        LOGGER.queue.release(None);
        LOGGER.queue.push(words);
        finish();
    } else {
        write_directly(&words);
    }
}

/// Waits until the log is written, for 100 ms at most for the reader of standard error.
pub fn finish() {
    let start = Instant::now();
    while LOGGER.started.get().is_some()
        && !LOGGER.queue.drain(PATIENCE)
        && is_writable(Some(&Timespec::default()))
        && start.elapsed() < LIMIT
    {}
}

/// Reports a panic. The program then aborts (`panic = "abort"`), which waiting for the reader of
/// standard error would prevent.
fn panicked(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    let mut text = format!("thread '{name}': {panic}");
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        text += &format!("\n{backtrace}");
    }
    let line = LOGGER.form().words(Peer::of_thread(), &text);
    let is_writer = thread.name() == Some(THREAD);
    if LOGGER.started.get().is_some() && !is_writer && LOGGER.queue.try_push(line.clone()) {
        finish();
    } else {
        write_directly(&line);
    }
}

/// Writes to standard error if it takes that much within 100 ms: a pipe that poll(2) reports as
/// writable takes 4 KiB (PIPE_BUF) without waiting.
fn write_directly(line: &str) {
    let patience = Timespec::try_from(PATIENCE).ok();
    for part in line.as_bytes().chunks(4096) {
        if !is_writable(patience.as_ref()) || Stderr.write_all(part).is_err() {
            return;
        }
    }
}
