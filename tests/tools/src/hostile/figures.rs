//! What a run counts, and its table.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhost_user_timer_kit::raw_driver::Usage;

/// How often the process is looked at for its greatest use.
const SAMPLE: Duration = Duration::from_millis(5);

/// What one campaign did.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    /// Messages, writes to rings, requests.
    pub(super) acts: u64,
    /// Connections made.
    pub(super) connections: u64,
    /// Negative acknowledgements, refusing statuses, and connections that the backend ended.
    pub(super) refusals: u64,
    /// Backends started besides the one under attack.
    pub(super) restarts: u64,
    /// The longest that a valid control message of the attacker waited.
    pub(super) control: Duration,
    /// The longest that a correct frontend of the other socket waited.
    pub(super) neighbour: Duration,
    /// Rounds.
    pub(super) rounds: u64,
}

impl Tally {
    /// Adds a round.
    pub(super) fn add(&mut self, round: &Tally) {
        self.acts += round.acts;
        self.connections += round.connections;
        self.refusals += round.refusals;
        self.restarts += round.restarts;
        self.control = self.control.max(round.control);
        self.neighbour = self.neighbour.max(round.neighbour);
        self.rounds += 1;
    }
}

/// Samples what a process uses, until it is [ended](Self::end).
pub(super) struct HighWater {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Usage>,
    before: Usage,
}

impl HighWater {
    /// Of the process with this id, which used this much before.
    pub(super) fn watch(pid: u32, before: Usage) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let mut most = before;
            while !stop.load(Ordering::Relaxed) {
                if let Ok(now) = Usage::of(pid) {
                    most.fds = most.fds.max(now.fds);
                    most.threads = most.threads.max(now.threads);
                    most.anonymous_kib = most.anonymous_kib.max(now.anonymous_kib);
                }
                thread::sleep(SAMPLE);
            }
            most
        });
        HighWater {
            over,
            thread,
            before,
        }
    }

    /// What it used before, and at most.
    pub(super) fn end(self) -> [Usage; 2] {
        self.over.store(true, Ordering::Relaxed);
        [self.before, self.thread.join().unwrap_or(self.before)]
    }
}

/// The figures of the campaigns, and of the process that they attacked.
pub(super) fn table(rows: Vec<(&str, &Tally)>, [before, most]: &[Usage; 2]) -> String {
    let mut text = format!(
        "{:<9}{:>7}{:>10}{:>12}{:>10}{:>9}{:>12}{:>14}\n",
        "campaign",
        "rounds",
        "acts",
        "connections",
        "refusals",
        "restarts",
        "control/ms",
        "neighbour/ms"
    );
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    for (name, tally) in rows {
        text += &format!(
            "{name:<9}{:>7}{:>10}{:>12}{:>10}{:>9}{:>12.1}{:>14.1}\n",
            tally.rounds,
            tally.acts,
            tally.connections,
            tally.refusals,
            tally.restarts,
            ms(tally.control),
            ms(tally.neighbour),
        );
    }
    text + &format!(
        "the process, before and at most: RSS of its own {} and {} KiB, descriptors {} and {}, \
         threads {} and {}",
        before.anonymous_kib,
        most.anonymous_kib,
        before.fds,
        most.fds,
        before.threads,
        most.threads
    )
}
